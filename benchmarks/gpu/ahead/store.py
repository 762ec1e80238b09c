"""The cache of kernels where it is used: Triton finds them under any path, and every load and compilation is counted.

Triton names a compiled kernel by its source, compile-time arguments, options, ptxas and environment, and by its own
build: version, Python sources and the bytes of its compiled library. The last differs between builds of one version
for different Python versions, which were seen to make the same machine code; :func:`portable_key` leaves it out and
keeps all the rest. So a kernel whose source, arguments or compiler differ in anything else has another name, and is
compiled where it is needed.

Needs no PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import cache as triton_cache

from .spec import Spec

# The only version whose builds for different Python versions were compared.
VERSION = "3.6.0"
MANIFEST = "ahead.json"
# A file that every load and compilation is appended to, one line of JSON each.
LOG = "SPAFL_AHEAD_LOG"
# Files of a kernel that nothing reads.
TEXT = ".source"
ROOT = pathlib.Path(__file__).resolve().parents[3]


@functools.cache
def portable_key() -> str:
    """What stands for Triton in a kernel's name: its version and its Python sources, as Triton hashes them, without
    its compiled library."""
    root = pathlib.Path(triton.__file__).parent
    files = [root / "runtime" / "cache.py"]
    for part in ("compiler", "backends", "language"):
        files += sorted((root / part).rglob("*.py"))
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return f"{triton.__version__}-any-build-{whole.hexdigest()}"


class Store(triton_cache.FileCacheManager):
    """Triton's cache on disk that may be moved: the files of a kernel are found beside the list that names them."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        found = super().get_file(f"__grp__{filename}")
        if found is None:
            return None
        names = json.loads(pathlib.Path(found).read_text()).get("child_paths") or {}
        group = {name: self._make_path(name) for name in names}
        # All or nothing: a kernel without one of its files is compiled again.
        return group if all(os.path.exists(path) for path in group.values()) else None

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        if filename.endswith(".so"):  # a stub: Triton says nothing of those
            _log({"kernel": filename.partition(".")[0], "loaded": False, "seconds": 0.0})
        return super().put(data, filename, binary)

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        # Without the intermediate text that Triton always writes, so that a packed cache can leave it out.
        return super().put_group(filename, {name: name for name in group if not name.endswith(TEXT)})


def use(cache: pathlib.Path) -> None:
    """This process, and those it starts, keep kernels in ``cache`` and name them by :func:`portable_key`."""
    os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    os.environ["TRITON_CACHE_MANAGER"] = f"{__name__}:{Store.__name__}"
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in paths:  # the processes it starts import this module
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, paths)])
    _begin()


@contextlib.contextmanager
def naming() -> Iterator[None]:
    """Kernels are named by :func:`portable_key` while the context is open."""
    before, triton_cache.triton_key = triton_cache.triton_key, portable_key
    try:
        yield
    finally:
        triton_cache.triton_key = before


def _begin() -> None:
    """In a process that :func:`use` prepared: name kernels, and count them. Triton imports this module before it names
    the first kernel, for its driver's stubs are in the same cache."""
    if triton.__version__ == VERSION:
        triton_cache.triton_key = portable_key
    knobs.compilation.listener = _note


class Counts:
    """What a log holds: names of kernels ``loaded`` and ``compiled``, and the ``seconds`` that compiling took.

    ``specs``: lines of the compiled ones of this project, to be compiled ahead the next time. Launching stubs count as
    compiled, without seconds.
    """

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.compiled: list[str] = []
        self.seconds = 0.0
        self.specs: list[str] = []

    def __str__(self) -> str:
        words = f"{len(self.loaded)} kernels loaded, {len(self.compiled)} compiled here"
        return f"{words} in {self.seconds:.1f} s" if self.compiled else words


def counts(log: pathlib.Path) -> Counts:
    """Of all processes that wrote to a log; empty if there is none."""
    found = Counts()
    for line in log.read_text().splitlines() if log.is_file() else ():
        entry = json.loads(line)
        (found.loaded if entry["loaded"] else found.compiled).append(entry["kernel"])
        if not entry["loaded"]:
            found.seconds += entry["seconds"]
            found.specs += [json.dumps(entry["spec"])] if "spec" in entry else []
    return found


def _log(entry: dict[str, Any]) -> None:
    log = os.environ.get(LOG)
    if log:
        with open(log, "a") as file:
            file.write(json.dumps(entry) + "\n")


def _note(*, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
    """Called by Triton after each load and each compilation."""
    entry: dict[str, Any] = {"kernel": src.name, "loaded": cache_hit, "seconds": round(times.total / 1e6, 4)}
    if not cache_hit:
        try:
            entry["spec"] = json.loads(Spec.of(src, metadata, metadata["target"]).text)
        except Exception as error:  # a kernel of another library: counted, and not to be compiled ahead
            entry["why"] = f"{type(error).__name__}: {error}"
    _log(entry)


def fits(cache: pathlib.Path) -> bool:
    """Whether the kernels of a cache are those of the Triton that is here."""
    manifest = cache / MANIFEST
    return manifest.is_file() and json.loads(manifest.read_text())["key"] == portable_key()


def install(cache: pathlib.Path, log: pathlib.Path | None = None) -> str:
    """Use the kernels of ``cache`` in this process and those it starts; call it before the first launch.

    What is not in it is compiled and added. ``log``: file that loads and compilations are appended to, read by
    :func:`counts`; None: they are not counted.

    Returns:
        In a line, whether the kernels fit the Triton that is here, and if not, why.
    """
    if log is not None:
        os.environ[LOG] = str(log.resolve())
    use(cache)
    manifest = cache / MANIFEST
    if not manifest.is_file():
        return f"no kernels were compiled ahead: {cache.name} has no {MANIFEST}"
    made = json.loads(manifest.read_text())
    if triton.__version__ != VERSION:
        return f"kernels of Triton {made['triton']} are not used by Triton {triton.__version__}: everything is compiled"
    if made["key"] != portable_key():
        return f"this Triton {VERSION} has other sources than the one that compiled ahead: everything is compiled"
    return f"{made['kernels']} kernels compiled ahead for {made['target']}"


def finish(cache: pathlib.Path, kernels: int, target: GPUTarget) -> None:
    """Write what :func:`install` reads."""
    about = {
        "triton": triton.__version__,
        "key": portable_key(),
        "target": f"{target.backend} {target.arch}",
        "kernels": kernels,
    }
    (cache / MANIFEST).write_text(json.dumps(about, indent=1) + "\n")


# In a process that `use` prepared by the environment alone.
if os.environ.get("TRITON_CACHE_MANAGER") == f"{__name__}:{Store.__name__}":
    _begin()

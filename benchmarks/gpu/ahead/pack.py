"""Everything that a machine with a GPU and without a network needs, in build/gpu.

Kernels are recorded and compiled here; the extension is built if it is older than its sources; Python packages that the
simulator imports come as wheels, in the versions of requirements-dev.txt. Kernels that a visit had to compile itself
are added with --log, from the log that it brought back.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence

from . import spec, store
from .compile import SOME_FAILED, folders
from .spec import Spec
from .unpack import EXTENSION, KERNELS, PACKED, ROOT, WHEELS

LIMIT = 60_000_000
PACKAGES = ("annotated-types", "pydantic", "pydantic_core", "tomli_w", "typing-inspection")
# Of the machine with the GPU.
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


class TooLarge(Exception):
    """What would travel is larger than the limit."""


def run(command: Sequence[str], allowed: tuple[int, ...] = (0,), **environment: str) -> None:
    """Raises :class:`SystemExit` with what failed: an exit code that is not allowed."""
    print("+", *(part.replace(str(ROOT), ".") for part in command), flush=True)
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
    if code not in allowed:
        raise SystemExit(f"error: exit code {code} of {' '.join(command[:4])}")


def archive(path: pathlib.Path, files: Iterable[tuple[pathlib.Path, str]]) -> int:
    """Make a tar.xz of files, each with its name inside; the same files give the same bytes. Returns its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz") as tar:
        for source, name in sorted(files, key=lambda f: f[1]):
            entry = tar.gettarinfo(source, name)
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
            with source.open("rb") as data:
                tar.addfile(entry, data)
    return path.stat().st_size


def kernels(cache: pathlib.Path, specs: Sequence[Spec]) -> list[tuple[pathlib.Path, str]]:
    """The files of these kernels and of all launching stubs in a cache, and what :func:`store.install` reads.

    Raises:
        ValueError: a kernel is not in the cache under the name that it has in this interpreter.
    """
    wanted = folders(specs)
    missing = [
        one.name for one, folder in zip(specs, wanted, strict=True) if not any((cache / folder).glob("__grp__*"))
    ]
    if missing:
        raise ValueError(f"{len(missing)} of {len(specs)} kernels are not in {cache}: {sorted(set(missing))}")
    stubs = [path.parent.name for path in cache.glob("*/*.so")]
    found = [path for folder in {*wanted, *stubs} for path in (cache / folder).iterdir()]
    found = [path for path in found if path.is_file() and not path.name.endswith(store.TEXT)]
    return [(path, str(path.relative_to(cache))) for path in [*found, cache / store.MANIFEST]]


def extension() -> list[tuple[pathlib.Path, str]]:
    """The compiled extension with CUDA and its record, built anew if a source is newer."""
    from spafl_kernels import native

    here = ROOT / "spafl_kernels"
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()] + [ROOT / "setup.py", here / "native.py"]
    libraries = sorted(here.glob("_C*.so"))
    newest = max(path.stat().st_mtime for path in sources)
    if not libraries or libraries[0].stat().st_mtime < newest or not native.build_info().get("cuda"):
        run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], SPAFL_BUILD_CUDA="1")
        libraries = sorted(here.glob("_C*.so"))
    return [(path, path.name) for path in (libraries[0], here / "_build.json")]


def pinned(requirements: str) -> list[str]:
    """``name==version`` of :data:`PACKAGES` as the development environment has them.

    Raises:
        ValueError: one of them is not pinned.
    """
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)$", requirements, re.MULTILINE))
    if absent := [name for name in PACKAGES if name not in versions]:
        raise ValueError(f"requirements-dev.txt does not pin {', '.join(absent)}")
    return [f"{name}=={versions[name]}" for name in PACKAGES]


def wheels(into: pathlib.Path) -> None:
    """Download :data:`PACKAGES` for the machine with the GPU."""
    platforms = [f"--platform={name}" for name in PLATFORMS]
    names = pinned((ROOT / "requirements-dev.txt").read_text())
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={PYTHON}", *platforms, "--dest", str(into), *names]
    run(command)


def with_triton(python: str, environment: pathlib.Path) -> str:
    """The interpreter itself if it has Triton, else that of an environment made from it, with Triton alone."""
    own = environment / "bin" / "python"
    for candidate in (python, str(own)):
        if candidate != python and not own.exists():
            run([python, "-m", "venv", str(environment)])
            run([candidate, "-m", "pip", "install", "--quiet", f"triton=={store.VERSION}"])
        ask = "import sys, triton; print(triton.__version__, '{}.{}'.format(*sys.version_info))"
        done = subprocess.run([candidate, "-c", ask], capture_output=True, text=True)
        if done.stdout.split()[:1] == [store.VERSION]:
            if done.stdout.split()[1] != PYTHON:
                print(f"Python {done.stdout.split()[1]} compiles: Python {PYTHON} will build launching stubs itself")
            return candidate
    raise SystemExit(f"error: {python} has no Triton {store.VERSION}, nor has the environment that was made from it")


def tree() -> int:
    """Bytes of the checkout that travel: files that git tracks or does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum((ROOT / name).stat().st_size for name in filter(None, names) if (ROOT / name).is_file())


def commit() -> str:
    """What git calls the checkout; the copy has no history to ask."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def sizes(folder: pathlib.Path, checkout: int, limit: int = LIMIT) -> list[str]:
    """Lines of what travels with its size.

    Raises:
        TooLarge: more than ``limit`` bytes in all.
    """
    parts = {"checkout": checkout}
    for path in sorted(folder.iterdir()):
        files = path.rglob("*") if path.is_dir() else [path]
        parts[path.name] = sum(p.stat().st_size for p in files if p.is_file())
    total = sum(parts.values())
    lines = [f"{size / 1e6:7.2f} MB  {name}" for name, size in {**parts, "in all": total}.items()]
    if total > limit:
        raise TooLarge("\n".join([*lines, f"that is more than {limit / 1e6:g} MB: pack fewer kernels with --work"]))
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.ahead.pack", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", nargs="+", default=[], help="only kernels of this work; see record --list")
    parser.add_argument(
        "--log", type=pathlib.Path, nargs="+", default=[], help="logs of visits, whose kernels are added"
    )
    parser.add_argument(
        "--python", default=sys.executable,
        help="interpreter that compiles (default: this one); best of the Python version of the machine with the GPU,\n"
        f"{PYTHON}, whose launching stubs are then compiled too. Without Triton {store.VERSION} it gets an environment",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / "build" / "ahead", help="kept between calls")
    options = parser.parse_args(argv)
    began = time.monotonic()
    options.cache.mkdir(parents=True, exist_ok=True)
    listed = options.cache / "kernels.jsonl"
    run([sys.executable, "-m", f"{__package__}.record", *options.work, "--out", str(listed)])
    specs = spec.read(listed)
    brought = [Spec.from_text(line) for log in options.log for line in store.counts(log).specs]
    specs = list({one.text: one for one in [*specs, *brought]}.values())
    spec.write(specs, listed)
    cache = options.cache / "cache"
    python = with_triton(options.python, options.cache / "python")
    failed = options.cache / "failed.jsonl"
    command = [python, "-m", f"{__package__}.compile", str(listed), "--cache", str(cache), "--failed", str(failed)]
    run([*command, "--workers", str(options.workers)], allowed=(0, SOME_FAILED), PYTHONPATH=str(ROOT))
    if broken := {one.text for one in spec.read(failed)}:
        # Such as a tile that asks for too much memory: it fails on the GPU, too, where the visit says so.
        print(f"{len(broken)} kernels cannot be compiled and are left out; they are listed above")
        specs = [one for one in specs if one.text not in broken]
    fresh = pathlib.Path(tempfile.mkdtemp(dir=options.cache))
    try:
        archive(fresh / KERNELS, kernels(cache, specs))
        archive(fresh / EXTENSION, extension())
        wheels(fresh / WHEELS)
        (fresh / "COMMIT").write_text(commit() + "\n")
        print(*sizes(fresh, tree()), sep="\n")
        target = ROOT / PACKED
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.chmod(0o755)
        fresh.rename(target)
    except (TooLarge, ValueError) as error:
        print(f"error: nothing was packed: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    print(f"{len(specs)} kernels and all else in {PACKED}; {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

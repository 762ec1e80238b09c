"""Compiles recorded kernels into a cache: ``python -m benchmarks.gpu.ahead.compile SPECS --cache FOLDER``.

The interpreter needs Triton and no PyTorch. Best is one of the Python version of the machine with the GPU: then
Triton's launching stubs, which are extension modules, can be compiled as well.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence

from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler.compiler import make_backend
from triton.runtime import cache as triton_cache

from . import inert, spec, store
from .spec import HOPPER, Spec

SOME_FAILED = 3  # exit code


@dataclasses.dataclass
class Outcome:
    """What became of kernels.

    Attributes:
        seconds: of those that were compiled, by name.
        loaded: how many were there.
        failed: those that could not be compiled, and why.
        stubs: how many launching stubs the cache holds for this Python version.
        no_stubs: why it has none, or nothing.
    """

    seconds: dict[str, list[float]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    loaded: int = 0
    failed: dict[Spec, str] = dataclasses.field(default_factory=dict)
    stubs: int = 0
    no_stubs: str = ""

    @property
    def compiled(self) -> int:
        return sum(map(len, self.seconds.values()))

    def __str__(self) -> str:
        lines = [f"{self.compiled} kernels compiled, {self.loaded} were there, {len(self.failed)} failed"]
        for name, found in sorted(self.seconds.items()):
            lines.append(f"  {name}: {len(found)}, {sum(found) / len(found):.2f} s each, at most {max(found):.2f}")
        version = "{}.{}".format(*sys.version_info)
        why = f": {self.no_stubs}" if self.no_stubs else ""
        lines.append(f"{self.stubs} launching stubs for Python {version}{why}")
        return "\n".join([*lines, *self.failed.values()])


def _start(cache: str) -> None:
    """In every process that compiles."""
    os.environ.pop(store.LOG, None)
    inert.without_torch()
    store.use(pathlib.Path(cache))


def _no_stubs(driver: pathlib.Path) -> str:
    """Why launching stubs cannot be compiled here, in words, or nothing. ``driver``: an empty folder, filled with what
    they are linked to."""
    from . import launchers

    try:
        launchers.empty_driver(driver)
        launchers.begin(driver)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _compile(one: Spec, driver: pathlib.Path | None) -> tuple[float, bool, str]:
    """Seconds, whether it was there, and an error in words or nothing; its stub too with a ``driver``."""
    import triton
    from triton import knobs

    from . import launchers

    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    began = time.perf_counter()
    try:
        source = one.source()
        kernel = triton.compile(source, target=HOPPER, options=dict(one.options))
        seconds = time.perf_counter() - began
        if driver is not None:
            launchers.begin(driver)
            launchers.compile_for(source, kernel)
    except Exception as error:
        return 0.0, False, f"{one.name}: {type(error).__name__}: {error}"[:300]
    return seconds, hits == [True], ""


def compile_all(specs: Sequence[Spec], cache: pathlib.Path, workers: int = 2) -> Outcome:
    """Compile what is not in ``cache`` yet, in ``workers`` processes."""
    cache.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    # Kernels that take long come first, and the processes end at about the same time.
    order = sorted(specs, key=lambda s: ("forward" not in s.name, "wgrad" not in s.name))
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(str(cache),)
        ) as pool,
    ):
        driver = pathlib.Path(folder)
        outcome.no_stubs = pool.submit(_no_stubs, driver).result()
        call = functools.partial(_compile, driver=None if outcome.no_stubs else driver)
        for one, (seconds, there, error) in zip(order, pool.map(call, order, chunksize=4), strict=True):
            if error:
                outcome.failed[one] = error
            elif there:
                outcome.loaded += 1
            else:
                outcome.seconds[one.name].append(seconds)
    outcome.stubs = sum(1 for _ in cache.glob(f"*/__triton_launcher{sysconfig.get_config_var('EXT_SUFFIX')}"))
    store.finish(cache, outcome.compiled + outcome.loaded, HOPPER)
    return outcome


def size(folder: pathlib.Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def folders(specs: Iterable[Spec]) -> list[str]:
    """Where in a cache Triton looks for these kernels, in this interpreter."""
    backend, environment = make_backend(HOPPER), get_cache_invalidating_env_vars()
    with store.naming():
        keys = (
            triton_cache.get_cache_key(one.source(), backend, backend.parse_options(dict(one.options)), environment)
            for one in specs
        )
        return [triton_cache._base32(hashlib.sha256(key.encode()).hexdigest()) for key in keys]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ahead.compile", description=__doc__)
    parser.add_argument("specs", nargs="+", type=pathlib.Path, help="files of kernels, one a line")
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder to compile into")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--failed", type=pathlib.Path, help="file for the kernels that could not be compiled")
    parser.add_argument("--every", type=int, default=1, help="compile only every EVERY-th kernel")
    options = parser.parse_args(argv)
    specs = list({one.text: one for path in options.specs for one in spec.read(path)}.values())[:: options.every]
    began = time.monotonic()
    outcome = compile_all(specs, options.cache, options.workers)
    if options.failed is not None:
        spec.write(outcome.failed, options.failed)
    print(outcome)
    print(f"{time.monotonic() - began:.0f} s; {size(options.cache) / 1e6:.1f} MB in {options.cache}")
    return SOME_FAILED if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())

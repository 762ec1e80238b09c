"""Compiles recorded kernels into a cache: ``python -m benchmarks.gpu.ahead.compile SPECS --cache FOLDER``.

The interpreter needs Triton and no PyTorch. Best is one of the Python version of the machine with the GPU: then
Triton's launching stubs, which are extension modules, can be compiled as well.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Sequence

from . import inert, spec, store
from .spec import HOPPER, Spec


@dataclasses.dataclass
class Outcome:
    """``seconds``: of the kernels that were compiled, by name; ``loaded``: were there; ``failed``: in words."""

    seconds: dict[str, list[float]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    loaded: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)

    @property
    def compiled(self) -> int:
        return sum(map(len, self.seconds.values()))

    def __str__(self) -> str:
        lines = [f"{self.compiled} kernels compiled, {self.loaded} were there, {len(self.failed)} failed"]
        for name, found in sorted(self.seconds.items()):
            lines.append(f"  {name}: {len(found)}, {sum(found) / len(found):.2f} s each, at most {max(found):.2f}")
        return "\n".join([*lines, *self.failed])


def _start(cache: str) -> None:
    os.environ.pop(store.LOG, None)
    inert.without_torch()
    store.use(pathlib.Path(cache))


def _compile(one: Spec) -> tuple[str, float, bool, str]:
    """Name, seconds, whether it was there, and an error in words or nothing."""
    import triton
    from triton import knobs

    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    began = time.perf_counter()
    try:
        triton.compile(one.source(), target=HOPPER, options=dict(one.options))
    except Exception as error:
        return one.name, 0.0, False, f"{one.name}: {type(error).__name__}: {error}"[:300]
    return one.name, time.perf_counter() - began, hits == [True], ""


def compile_all(specs: Sequence[Spec], cache: pathlib.Path, workers: int = 2) -> Outcome:
    """Compile what is not in ``cache`` yet, in ``workers`` processes."""
    cache.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    # Kernels that take long come first, and the processes end at about the same time.
    order = sorted(specs, key=lambda s: ("forward" not in s.name, "wgrad" not in s.name))
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(str(cache),)
    ) as pool:
        for name, seconds, there, error in pool.map(_compile, order, chunksize=4):
            if error:
                outcome.failed.append(error)
            elif there:
                outcome.loaded += 1
            else:
                outcome.seconds[name].append(seconds)
    store.finish(cache, outcome.compiled + outcome.loaded, HOPPER)
    return outcome


def size(folder: pathlib.Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def keys(specs: Iterable[Spec]) -> list[str]:
    """The names that Triton gives to these kernels here."""
    import hashlib

    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime import cache

    backend = make_backend(HOPPER)
    found = []
    for one in specs:
        options = backend.parse_options(dict(one.options))
        text = cache.get_cache_key(one.source(), backend, options, get_cache_invalidating_env_vars())
        found.append(hashlib.sha256(text.encode()).hexdigest())
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ahead.compile", description=__doc__)
    parser.add_argument("specs", nargs="+", type=pathlib.Path, help="files of kernels, one a line")
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder to compile into")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--every", type=int, default=1, help="compile only every EVERY-th kernel")
    parser.add_argument("--keys", action="store_true", help="print what Triton calls the kernels, and compile none")
    options = parser.parse_args(argv)
    specs = list({one.text: one for path in options.specs for one in spec.read(path)}.values())[:: options.every]
    if options.keys:
        _start(str(options.cache))
        print(*keys(specs), sep="\n")
        return 0
    began = time.monotonic()
    outcome = compile_all(specs, options.cache, options.workers)
    print(outcome)
    print(f"{time.monotonic() - began:.0f} s; {size(options.cache) / 1e6:.1f} MB in {options.cache}")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())

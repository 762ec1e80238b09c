"""Which kernels some code launches: ``python -m benchmarks.gpu.ahead.record --list``."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import pretend, spec
from .spec import HOPPER, Spec


def record(what: Callable[[pretend.Cpu], object], target: GPUTarget = HOPPER) -> list[Spec]:
    """The distinct kernels that ``what(device)`` launches, in order; none is compiled or run.

    ``what`` is called once with a device in whose place ``"cpu"`` stands; see :mod:`benchmarks.gpu.ahead.pretend`.
    What it raises is raised here.
    """
    found: dict[Any, Spec] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if (fn.module, fn.name, key) not in found:
            source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
            found[fn.module, fn.name, key] = Spec.of(source, _options(compile), target)
        return True  # nothing is to be compiled

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        with pretend.gpu(target) as device:
            what(device)
    finally:
        knobs.runtime.jit_cache_hook = before
    return list({one.text: one for one in found.values()}.values())


def _options(compile: dict[str, Any]) -> dict[str, Any]:
    """All options of a launch: the hook's own arguments hold only some, its serialised form has all."""
    options: dict[str, Any] = json.loads(compile["specialization_data"])["options"]
    return options


def main(argv: list[str] | None = None) -> int:
    from .work import WORK

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ahead.record", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="WORK", help=f"all of {', '.join(WORK)} if none is named")
    parser.add_argument("--out", type=pathlib.Path, help="file of the kernels, one a line")
    parser.add_argument("--list", action="store_true", help="print the names")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in WORK]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(WORK)}")
    if options.list:
        print(*WORK, sep="\n")
        return 0
    everything: dict[str, Spec] = {}
    for name in options.names or WORK:
        began, before = time.monotonic(), len(everything)
        found = record(WORK[name])
        everything.update((one.text, one) for one in found)
        print(
            f"{name}: {len(found)} kernels, {len(everything) - before} of them new; {time.monotonic() - began:.1f} s",
            flush=True,
        )
    print(f"{len(everything)} kernels")
    if options.out is not None:
        spec.write(everything.values(), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

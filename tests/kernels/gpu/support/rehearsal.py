"""One small layer, compiled ahead and loaded elsewhere: ``python rehearsal.py compile|load CACHE``.

The checkout is that of PYTHONPATH. ``load`` compiles nothing: what is not in the cache is an error. Prints how many
kernels there were, or how many were loaded and compiled.
"""

from __future__ import annotations

import json
import pathlib
import sys

import torch
from triton.compiler import ASTSource

from benchmarks.gpu.ahead import pretend, spec, store
from benchmarks.gpu.ahead.compile import compile_all
from benchmarks.gpu.ahead.record import record
from spafl_kernels.gpu.geometry import Geometry
from spafl_kernels.gpu.triton import layer_forward, select_layer


def launch(device: pretend.Cpu) -> None:
    """Pass and forward of a linear layer of two clients."""
    x = torch.randn(2, 9, 37, 1, 1, device=device.where)
    weight, threshold = (torch.randn(*size, device=device.where) for size in ((2, 21, 37, 1, 1), (2, 21)))
    selection, packed, _ = select_layer(weight, threshold, "identity")
    layer_forward(x, packed, selection, None, Geometry(37))


def refuse(*_: object) -> None:
    raise AssertionError("a kernel is compiled")


def main(mode: str, cache: pathlib.Path) -> None:
    if mode == "compile":
        specs = record(launch)
        spec.write(specs, cache.parent / "specs.jsonl")
        outcome = compile_all(specs, cache, workers=1)
        assert not outcome.failed and outcome.compiled == len(specs), outcome
        print(len(specs))
        return
    ASTSource.make_ir = refuse
    log = cache.parent / "log.jsonl"
    print(store.install(cache, log), file=sys.stderr)
    with pretend.gpu() as device:
        launch(device)
    found = store.counts(log)
    print(json.dumps([len(found.loaded), len(found.compiled)]))


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))

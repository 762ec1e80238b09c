"""Launches of host code, compiled and executed here: see ``executing``."""

import contextlib
import dataclasses
import struct

import torch

from .. import compile_only
from .machine import machine
from .memory import Global

HIDDEN = 2  # pointers to scratch memory that Triton appends, unused by these kernels
FORMATS = {"i1": "<B", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<B", "u8": "<B", "u16": "<H",
           "u32": "<I", "u64": "<Q", "fp32": "<f", "fp64": "<d"}  # fmt: skip


@dataclasses.dataclass
class Options:
    seed: int = 0  # of the order of blocks and warps
    also: tuple = ()  # tensors that kernels reach through addresses in a table
    warp_by_warp: bool = False
    edit: object = None  # function of (kernel name, PTX text): seeded faults


def parameters(kernel, named):
    """Values of what the kernel still takes: arguments that specialisation did not make constants, then scratch."""
    values = []
    for name, kind in kernel.src.signature.items():
        if kind == "constexpr":
            continue
        value = named[name]
        if kind.startswith("*"):
            values.append(struct.pack("<Q", value.data_ptr()))
        else:
            values.append(struct.pack(FORMATS[kind], value))
    return [*values, *[bytes(8)] * HIDDEN]


def execute(launch, named, options):
    ptx = launch.kernel.asm["ptx"]
    ptx = options.edit(launch.name, ptx) if options.edit else ptx
    tensors = [(name, value) for name, value in named.items() if isinstance(value, torch.Tensor)]
    tensors += [(f"also[{i}]", t) for i, t in enumerate(options.also)]
    grid = (*launch.grid, 1, 1)[:3]
    runner = machine(ptx, 32 * launch.num_warps, launch.shared)
    runner.run(grid, parameters(launch.kernel, named), Global(tensors), options.seed, options.warp_by_warp)


@contextlib.contextmanager
def executing(target=compile_only.H200, **options):
    """Launches inside on CPU tensors compile for ``target`` as on the device and run at once, in the executor.

    with executing(("cuda", 90, 32), seed=1) as log:
        y = layer_forward(x, packed, selection, bias, geometry)
    """
    chosen = Options(**options)
    with compile_only.compiling(target, then=lambda launch, named: execute(launch, named, chosen)) as log:
        yield log

"""Executes the PTX that Triton generates for sm_80 and sm_90: does compiled code compute the right thing?

    with executing(("cuda", 90, 32), seed=0):  # host code runs unchanged, on CPU tensors
        y = layer_forward(x, packed, selection, bias, geometry)

The interpreter (``support.interpreter``) runs a kernel before the compiler has seen it. This runs what the compiler
made of it, on CPU tensors: layouts, swizzled shared memory, software pipelines with cp.async, wgmma and its
descriptors, assumed alignments.

bounds        every global access lies within a tensor of the launch, every shared access within the block's bytes.
alignment     an address that is no multiple of the size of its access is an error.
poison        shared memory and registers hold NaN until they are written.
masked copy   the address of a cp.async that reads nothing must lie within a tensor, too.
cp.async      the destination holds NaN from the copy to the wait that covers it: a wait that is too weak gives NaN.
wgmma         accumulators hold NaN until the wait that covers them; an operand overwritten before is an error.
barriers      threads that wait at different barriers, or a warp instruction that only a part of its warp reaches, are
              an error; ``warp_by_warp`` runs each warp alone up to the barrier, so that a missing barrier shows.
order         blocks run in random order.

Not modelled: time, caches, bank conflicts, concurrency of blocks, memory order and proxies (fences do nothing), the
order of additions in matrix products, and ptxas, which turns PTX into machine code. tf32 operands are truncated to 10
bits of mantissa. An instruction that no kernel here generates is not there, and raises ``Unsupported``.
"""

from ..compile_only import TARGETS as EVERY_TARGET
from .errors import Hazard, Misaligned, OutOfBounds, PtxError, Stuck, Unsupported
from .launch import executing
from .machine import machine
from .memory import Global

TARGETS = {name: EVERY_TARGET[name] for name in ("sm_80", "sm_90")}  # whose instructions are there

__all__ = [
    "TARGETS", "Global", "Hazard", "Misaligned", "OutOfBounds", "PtxError", "Stuck", "Unsupported", "executing",
    "machine",
]  # fmt: skip

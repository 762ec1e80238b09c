"""Addresses of masked lanes: a masked copy never has one outside of its tensor.

An asynchronous copy of zero bytes reads nothing, and yet some devices check its address (pytorch issues 187081 and
186440). So an index is replaced before it becomes an address, where its lane is masked off.

The compiler makes masked copies of its own: a pipelined loop fetches what later steps need, also of steps behind the
last one, and the first ones of a loop that has none. So loops over products take their addresses from ``last_of``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def within(index, live):
    """``index`` where ``live``, else 0; index: runs of 16 that count up by one, each from a multiple of 16.

    The compiler does not see those runs through the choice, and would copy single elements. How many lanes share a mask
    it sees by itself: it never joins those that do not.
    """
    return tl.max_contiguous(tl.multiple_of(tl.where(live, index, 0), 16), 16)


@triton.jit
def last_of(step, steps):
    """``step``, or the last of ``steps`` steps (0 if there are none) where the compiler asks for a later one."""
    return tl.minimum(step, tl.maximum(steps - 1, 0))

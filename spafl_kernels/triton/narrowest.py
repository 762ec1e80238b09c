"""The last tile over filters shrinks to what is left, so that work follows a count in steps of 16, not of a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrowest(
    body: tl.constexpr, args, left, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, SHAPE: tl.constexpr,
    MODE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``body(*args, A, B, C, SHAPE, MODE, PRECISION, width)`` with the narrowest width that holds ``left`` filters.

    The width is 16, 32 or TILE. Constants are listed one by one, as a tuple of Triton makes tensors of them.
    """
    if TILE > 16:
        if left <= 16:
            body(*args, A, B, C, SHAPE, MODE, PRECISION, 16)
        elif TILE > 32:
            if left <= 32:
                body(*args, A, B, C, SHAPE, MODE, PRECISION, 32)
            else:
                body(*args, A, B, C, SHAPE, MODE, PRECISION, TILE)
        else:
            body(*args, A, B, C, SHAPE, MODE, PRECISION, TILE)
    else:
        body(*args, A, B, C, SHAPE, MODE, PRECISION, TILE)

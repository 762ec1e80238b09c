"""The last tile over filters shrinks to what is left, so that work follows a count in steps of 16, not of a tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrowest(
    body: tl.constexpr, args, left, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, SHAPE: tl.constexpr,
    MODE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, LEAST: tl.constexpr = 16,
):  # fmt: skip
    """``body(*args, A, B, C, SHAPE, MODE, PRECISION, width)`` with the narrowest width that holds ``left`` filters.

    Widths are LEAST and its doubles up to TILE. Constants are listed one by one, as a tuple of Triton makes tensors of
    them.
    """
    if LEAST < TILE:
        if left <= LEAST:
            body(*args, A, B, C, SHAPE, MODE, PRECISION, LEAST)
        else:
            narrowest(body, args, left, A, B, C, SHAPE, MODE, PRECISION, TILE, 2 * LEAST)
    else:
        body(*args, A, B, C, SHAPE, MODE, PRECISION, TILE)

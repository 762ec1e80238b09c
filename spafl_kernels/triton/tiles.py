"""Tile sizes of the matrix kernels, as data. Nothing here is measured yet: shapes follow the static facts below.

* A matrix instruction of a Hopper warpgroup needs 64 rows and 4 warps; smaller tiles use the older instruction.
* 8 warps are not used: implicit convolution over a flattened tap and channel loop was seen to be silently wrong with
  them (pytorch issues 173068 and 177823).
* float32 without tf32 has no matrix instruction: its tiles are small to keep the accumulator in registers.

``rows`` are the large, dense dimension of a tile, ``filters`` the dimension over packed filters (or over input channels
in ``dgrad``), ``depth`` the reduction. The narrower dimensions shrink to fit the layer.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

Kind = Literal["half", "tf32", "ieee"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """``rows x filters`` outputs per program, reduced ``depth`` at a time."""

    rows: int
    filters: int
    depth: int
    warps: int
    stages: int


# operation -> kind of arithmetic -> (least number of rows for which the tile is used, tile), widest first
TILES: dict[str, dict[Kind, list[tuple[int, Tile]]]] = {
    "forward": {
        "half": [(4096, Tile(128, 64, 64, 4, 3)), (33, Tile(64, 64, 64, 4, 3)), (0, Tile(16, 64, 64, 4, 3))],
        "tf32": [(4096, Tile(128, 64, 32, 4, 3)), (33, Tile(64, 64, 32, 4, 3)), (0, Tile(16, 64, 32, 4, 3))],
        "ieee": [(33, Tile(64, 32, 16, 4, 2)), (0, Tile(16, 32, 32, 4, 2))],
    },
    # filters: input channels. 128 of them halve the passes over dL/dy: by the static bounds (not measured) the loop is
    # then limited by L2 and matrix units alike, with 64 by L2 alone.
    "dgrad": {
        "half": [(4096, Tile(128, 128, 32, 4, 3)), (33, Tile(64, 64, 32, 4, 3)), (0, Tile(16, 64, 32, 4, 3))],
        "tf32": [(4096, Tile(128, 64, 32, 4, 3)), (33, Tile(64, 64, 32, 4, 3)), (0, Tile(16, 64, 32, 4, 3))],
        "ieee": [(33, Tile(64, 32, 16, 4, 2)), (0, Tile(16, 32, 32, 4, 2))],
    },
    # rows: of the weight's n_in; depth: over batch and positions
    "wgrad": {
        "half": [(33, Tile(64, 64, 64, 4, 3)), (0, Tile(32, 64, 64, 4, 3))],
        "tf32": [(33, Tile(64, 64, 32, 4, 3)), (0, Tile(32, 64, 32, 4, 3))],
        "ieee": [(33, Tile(64, 32, 16, 4, 2)), (0, Tile(32, 32, 16, 4, 2))],
    },
}


def arithmetic(dtype: torch.dtype, tf32: bool) -> Kind:
    """Which tables and which instruction precision a dtype uses."""
    if dtype == torch.float32:
        return "tf32" if tf32 else "ieee"
    return "half"


def precision(kind: Kind) -> str:
    """``input_precision`` of ``tl.dot``: only float32 operands are affected by it."""
    return "tf32" if kind == "tf32" else "ieee"


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def choose(operation: str, kind: Kind, rows: int) -> Tile:
    """The first tile of the table whose least number of rows is reached."""
    for least, tile in TILES[operation][kind]:
        if rows >= least:
            return tile
    raise AssertionError("every table ends with 0 rows")

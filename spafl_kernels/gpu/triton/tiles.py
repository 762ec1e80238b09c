"""Tile sizes of the matrix kernels, as data. Nothing here is measured yet: shapes follow the static facts below.

* A matrix instruction of a Hopper warpgroup needs 64 rows and 4 warps; smaller tiles use the older instruction.
* A program reads its rows and its filters once per step, from L2: 44 operations per byte with 128 x 64, 64 with
  128 x 128. The wider tile needs 8 warps for its accumulator; with 4 the epilogue spills.
* 8 warps are among the candidates, but no rule takes them: implicit convolution over a flattened tap and channel loop
  was seen to be silently wrong with them (pytorch issues 173068 and 177823). The PTX of these kernels is right by the
  executor of the tests; what ptxas makes of it, and how fast it is, the measurement has to show.
* float32 without tf32 has no matrix instruction: its tiles are small to keep the accumulator in registers.

``rows`` are the large, dense dimension of a tile, ``filters`` the dimension over packed filters (or over input channels
in ``dgrad``), ``depth`` the reduction. The narrower dimensions shrink to fit the layer.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ..geometry import Geometry
from ..packing import WIDEST
from ..tables import tiles as measured
from ..tables.tiles import Kind, Operation, Tile

# operation -> kind of arithmetic -> (least number of rows for which the tile is used, tile), widest first
TILES: dict[Operation, dict[Kind, list[tuple[int, Tile]]]] = {
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


# What else may be faster, depending on the layer; which is, `python -m benchmarks.gpu --tune` measures. None takes more
# shared memory or registers than a program may have, on any layer and architecture that the checks compile.
CANDIDATES: dict[Operation, dict[Kind, tuple[Tile, ...]]] = {
    "forward": {
        "half": (
            Tile(128, 64, 64, 4, 3, True), Tile(128, 64, 32, 4, 4), Tile(128, 64, 32, 4, 4, True),
            Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4, True), Tile(64, 128, 64, 4, 3),
            Tile(128, 128, 64, 8, 3), Tile(64, 256, 64, 8, 3),
        ),
        "tf32": (
            Tile(128, 32, 32, 4, 3, True), Tile(64, 64, 32, 4, 4), Tile(64, 64, 32, 4, 4, True),
            Tile(64, 128, 32, 4, 3), Tile(128, 128, 32, 8, 3), Tile(64, 256, 32, 8, 3),
        ),
    },
    "dgrad": {
        "half": (
            Tile(128, 64, 32, 4, 4), Tile(128, 64, 32, 4, 4, True), Tile(128, 64, 64, 4, 3),
            Tile(128, 64, 64, 4, 3, True), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 4),
            Tile(128, 128, 64, 8, 3), Tile(64, 256, 64, 8, 3),
        ),
        "tf32": (
            Tile(128, 64, 32, 8, 3, True), Tile(64, 64, 32, 4, 4), Tile(64, 64, 32, 4, 4, True),
            Tile(64, 128, 32, 4, 3), Tile(128, 128, 32, 8, 3),
        ),
    },
    "wgrad": {
        "half": (
            Tile(128, 64, 64, 4, 3), Tile(128, 64, 32, 4, 4), Tile(64, 64, 32, 4, 4), Tile(64, 128, 64, 4, 3),
            Tile(128, 128, 64, 8, 3),
        ),
        "tf32": (
            Tile(64, 64, 32, 4, 4), Tile(64, 128, 32, 4, 3), Tile(64, 64, 64, 4, 2), Tile(128, 128, 32, 8, 3),
        ),
    },
}  # fmt: skip


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


def filters_of(tile: Tile, cap: int) -> int:
    """Filters of a tile for ``cap`` packed rows: so many that no tile, the last one shrunk, reads rows behind them."""
    filters = tile.filters
    # Between 129 and 192 filters that are left take a tile of 256, of which there may be 192 rows only.
    while filters > cap or (filters > WIDEST and cap % filters > filters // 2):
        filters //= 2
    return filters


def by_rule(operation: Operation, kind: Kind, rows: int) -> Tile:
    """The first tile of the table above whose least number of rows is reached."""
    for least, tile in TILES[operation][kind]:
        if rows >= least:
            return tile
    raise AssertionError("every table ends with 0 rows")


def rows_of(operation: Operation, geometry: Geometry, images: int) -> int:
    """Size of an operation's large dimension, for one client."""
    if operation == "forward":
        return images * math.prod(geometry.output)
    if operation == "wgrad":
        return geometry.n_in
    # Positions of one residue class modulo the stride.
    return images * -(-geometry.height // geometry.stride[0]) * -(-geometry.width // geometry.stride[1])


def choose(
    operation: Operation, kind: Kind, geometry: Geometry, out: int, images: int, device: torch.device, listed: bool
) -> Tile:
    """The tile that was measured to be the fastest on the device for such a layer, else that of the rule.

    Args:
        images: of one client; a cohort takes the tiles that were measured for a single client.
        listed: only listed input channels are read; those layers are not measured.
    """
    table, g = None if listed else measured.of(device), geometry
    tile = None
    if table is not None:
        positions = images * math.prod(g.output)
        tile = table.look_up(operation, kind, g.kernel, g.stride, g.channels, out, positions)
    return tile or by_rule(operation, kind, rows_of(operation, g, images))


def every(operation: Operation, kind: Kind) -> list[Tile]:
    """All tiles of an operation: those of the rule, then the other candidates."""
    return [*(tile for _, tile in TILES[operation][kind]), *CANDIDATES[operation].get(kind, ())]


def candidates(operation: Operation, kind: Kind, geometry: Geometry, out: int, images: int) -> list[Tile]:
    """Tiles worth measuring: that of the rule first, then those that differ where the layer has something to fill."""
    rows = rows_of(operation, geometry, images)
    columns = max(16, power_of_two(geometry.channels if operation == "dgrad" else out))
    rule = by_rule(operation, kind, rows)
    # Few channels make wgrad walk taps and channels as one dimension: that takes the registers of larger tiles.
    others = () if operation == "wgrad" and geometry.channels < 64 else CANDIDATES[operation].get(kind, ())
    different: dict[Tile, Tile] = {}
    for tile in (rule, *others):
        # Tiles of 8 warps are wide, and as small ones they would be slower than those of 4.
        if tile.rows <= max(64, power_of_two(rows)) and (tile.warps == 4 or tile.filters <= columns):
            different.setdefault(dataclasses.replace(tile, filters=min(tile.filters, columns)), tile)
    return list(different.values())

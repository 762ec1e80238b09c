"""Tile sizes that were measured to be the fastest, by device, operation, arithmetic and layer.

A file is written by ``python -m benchmarks.gpu --tables`` from measured rows:

.. code-block:: json

    {"format": 1, "device": "NVIDIA H200", "made": {"commit": "...", "torch": "...", "triton": "...", "time": "..."},
     "entries": {"forward": {"half": {"conv3x3/1 in64 out64 positions131072":
       {"rows": 128, "filters": 64, "depth": 64, "warps": 4, "stages": 3, "cache_l1": true}}}}}

A measured tile counts for layers of its class and for those that differ from it in the number of output positions
alone, by a factor of 4 at most. Elsewhere, and on a device without a file, the rule of
:mod:`spafl_kernels.gpu.triton.tiles` holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from . import Shelf
from .classes import power_down, shape_class

Operation = Literal["forward", "dgrad", "wgrad"]
Kind = Literal["half", "tf32", "ieee"]
# By how much the positions of a layer may differ from those that were measured, nearest first.
FACTORS = (1.0, 2.0, 0.5, 4.0, 0.25)


@dataclasses.dataclass(frozen=True)
class Tile:
    """``rows x filters`` outputs per program, reduced ``depth`` at a time."""

    rows: int
    filters: int
    depth: int
    warps: int
    stages: int
    # Copies of positions go through the L1 cache, which 8 bytes at a time do and 16 do not. A position is read once per
    # kernel tap; with few channels all that a program reads fits, and the L2 cache is asked once instead.
    cache_l1: bool = False

    def piece(self, dtype: torch.dtype) -> int:
        """Elements that a copy of positions takes at a time; 0: as many as it can."""
        return 8 // dtype.itemsize if self.cache_l1 else 0


Entries = Mapping[str, Mapping[str, Mapping[str, Tile]]]


@dataclasses.dataclass(frozen=True)
class Table:
    """The measured tiles of one device; see the module for the format."""

    device: str
    made: Mapping[str, str]
    entries: Entries

    def look_up(
        self, operation: Operation, kind: Kind, kernel: Sequence[int], stride: Sequence[int], channels: int, out: int,
        positions: int,
    ) -> Tile | None:  # fmt: skip
        """The tile for a layer, None if none was measured near it."""
        row = self.entries.get(operation, {}).get(kind)
        if not row:
            return None
        near = (int(power_down(positions) * factor) for factor in FACTORS)
        return next((row[c] for n in near if (c := shape_class(kernel, stride, channels, out, n)) in row), None)

    def to_json(self) -> dict[str, Any]:
        """Entries as a file has them."""
        return {
            operation: {
                kind: {shape: dataclasses.asdict(tile) for shape, tile in sorted(row.items())}
                for kind, row in sorted(kinds.items())
            }
            for operation, kinds in sorted(self.entries.items())
        }


_SIZES = {"rows": (16, 256), "filters": (16, 256), "depth": (16, 256), "warps": (4, 8), "stages": (1, 8)}


def _tile(data: Any) -> Tile:
    names = [f.name for f in dataclasses.fields(Tile)]
    if not isinstance(data, dict) or set(data) != set(names):
        raise ValueError(f"a tile needs {', '.join(names)}; got {data!r}")
    if not isinstance(data["cache_l1"], bool):
        raise ValueError(f"cache_l1 must be true or false; got {data['cache_l1']!r}")
    for name, (low, high) in _SIZES.items():
        size = data[name]
        if type(size) is not int or not low <= size <= high or (name != "stages" and size & (size - 1)):
            power = "" if name == "stages" else "a power of two "
            raise ValueError(f"{name} must be {power}in [{low}, {high}]; got {size!r}")
    return Tile(**data)


def _parse(device: str, made: dict[str, str], found: dict[str, Any]) -> Table:
    entries: dict[str, dict[str, dict[str, Tile]]] = {}
    for operation, kinds in found.items():
        if operation not in get_args(Operation):
            raise ValueError(f"an operation must be one of {', '.join(get_args(Operation))}; got {operation!r}")
        for kind, row in kinds.items():
            if kind not in get_args(Kind):
                raise ValueError(f"an arithmetic must be one of {', '.join(get_args(Kind))}; got {kind!r}")
            for shape, sizes in row.items():
                try:
                    tile = _tile(sizes)
                except ValueError as error:
                    raise ValueError(f"{operation}, {kind}, {shape}: {error}") from None
                entries.setdefault(operation, {}).setdefault(kind, {})[shape] = tile
    return Table(device, made, entries)


SHELF = Shelf("tiles", "a table of measured tiles", 1, _parse)


def of(device: torch.device) -> Table | None:
    """The table for tensors of a device: the one in use whatever the device, else the device's own, or None."""
    return SHELF.of(device.index or 0 if device.type == "cuda" else -1)

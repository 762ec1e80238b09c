"""Tile sizes: times of every candidate on a layer, and the tables of the fastest (:mod:`spafl_kernels.gpu.tables`)."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from spafl_kernels.gpu.tables.tiles import Kind, Operation, Table, Tile
from spafl_kernels.gpu.triton.tiles import TILES, arithmetic, candidates, every

from .clock import Device, in_words, measure
from .layers import GATE, Case, class_of
from .results import Row, origin
from .roofline import DTYPES
from .shapes import Layer

# By how much a tile must beat that of the rule, in the geometric mean, to replace it: less is noise.
MARGIN = 0.98


def name_of(tile: Tile) -> str:
    """How rows call a tile."""
    sizes = f"{tile.rows}x{tile.filters}x{tile.depth} {tile.warps} warps {tile.stages} stages"
    return f"{sizes} L1" if tile.cache_l1 else sizes


KNOWN = {
    name_of(tile): tile
    for operation, kinds in TILES.items() for kind in kinds for tile in every(operation, kind)
}  # fmt: skip


def kind_of(dtype: str) -> Kind:
    """The arithmetic for whose tiles a dtype of the benchmark speaks."""
    return arithmetic(DTYPES[dtype], dtype == "tf32")


def of(layer: Layer, batch: int, dtype: str, operation: Operation) -> list[Tile]:
    """The tiles to measure on a layer; that of the rule first."""
    return candidates(operation, kind_of(dtype), layer.geometry, layer.out, batch * layer.rows)


def warm(
    layer: Layer, batch: int, dtype: str, operations: Sequence[Operation], where: str, kernels: Any = None
) -> None:
    """Run every candidate once, to compile it. One that fails does not keep the others from being compiled."""
    case, failed = Case(layer, batch, dtype, 0.5, where, kernels), []
    for operation in operations:
        for tile in of(layer, batch, dtype, operation):
            try:
                case.ours(operation, tile)
            except Exception as error:
                failed.append(f"{operation} {name_of(tile)}: {in_words(error)}")
    if failed:
        raise RuntimeError("; ".join(failed))


def tile_rows(
    device: Device,
    layer: Layer,
    batch: int,
    dtype: str,
    densities: Sequence[float],
    operations: Sequence[Operation],
    kernels: Any = None,
) -> Iterator[Row]:
    """One row per density, operation and candidate, replayed from a graph; a wrong result has no time."""
    for density in densities:
        case = Case(layer, batch, dtype, density, device.where, kernels)
        for operation in operations:
            for tile in of(layer, batch, dtype, operation):
                row: Row = {
                    "kind": "tile", "model": layer.model, "layer": layer.name, "shape": layer.shape,
                    "shape_class": class_of(layer, case.n), "clients": 1, "batch": batch, "dtype": dtype,
                    "density": density, "count": case.count, "mode": operation, "provider": name_of(tile), "graph": 1,
                }  # fmt: skip
                call = functools.partial(case.ours, operation, tile)
                try:
                    error = case.error(call())
                except Exception as problem:
                    device.settle()
                    yield {**row, "gate": "fail", "error": in_words(problem)}
                    continue
                if error < GATE[dtype]:
                    yield {**row, "gate": "pass", **measure(device, call, True)}
                else:
                    yield {**row, "gate": f"fail {error:.1e}"}


def make(rows: Iterable[dict[str, str]]) -> list[Table]:
    """One table per device: for every shape class the tile with the smallest geometric mean of its times.

    The mean is over layers of the class and densities, each time divided by that of the rule's tile. A tile that has no
    time on one of them (it was wrong, or did not fit) is out; so is the whole class if the rule's tile has none.

    Raises:
        ValueError: the fastest tile is one that this version does not know.
    """
    groups: dict[tuple[str, ...], dict[tuple[str, ...], dict[str, str]]] = {}
    runs: dict[tuple[str, ...], str] = {}
    made: dict[str, dict[str, str]] = {}
    for r in rows:
        if r["kind"] != "tile":
            continue
        group = r["gpu"], r["mode"], r["dtype"], r["shape_class"]
        cell = r["model"], r["layer"], r["batch"], r["density"]
        cells = groups.setdefault(group, {})
        # The newest run of a cell alone: times of different runs do not compare.
        if runs.get(group + cell) != r["time"]:
            runs[group + cell], cells[cell] = r["time"], {}
        cells[cell][r["provider"]] = r["us"]
        made[r["gpu"]] = origin(r)
    entries: dict[str, Any] = {}
    for (gpu, operation, dtype, shape), cells in groups.items():
        fastest = _fastest(list(cells.values()))
        if fastest is not None:
            if fastest not in KNOWN:
                raise ValueError(f"the tile {fastest!r} is not one that this version knows; measure again")
            of_gpu = entries.setdefault(gpu, collections.defaultdict(lambda: collections.defaultdict(dict)))
            of_gpu[operation][kind_of(dtype)][shape] = KNOWN[fastest]
    return [Table(gpu, made[gpu], {o: dict(kinds) for o, kinds in found.items()}) for gpu, found in entries.items()]


def _fastest(cells: Sequence[dict[str, str]]) -> str | None:
    """The name of the best tile of a class. A run measures that of the rule first."""
    rules = [next(iter(cell)) for cell in cells]
    if not all(cell[rule] for cell, rule in zip(cells, rules, strict=True)):
        return None
    means = {}
    for name in set.intersection(*(set(cell) for cell in cells)):
        if all(cell[name] for cell in cells):
            ratios = [math.log(float(c[name]) / float(c[rule])) for c, rule in zip(cells, rules, strict=True)]
            means[name] = math.exp(sum(ratios) / len(ratios))
    best = min(means, key=means.__getitem__) if means else rules[0]
    return best if means.get(best, 1.0) < MARGIN else rules[0]

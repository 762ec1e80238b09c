"""The rows of a run: what they hold, and how they reach the CSV, one job at a time."""

from __future__ import annotations

import csv
import datetime
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from ..commit import commit

COLUMNS = (
    "kind", "model", "layer", "shape", "shape_class", "clients", "batch", "dtype", "density", "count", "tile_density",
    "mode", "provider", "graph", "us", "us_p20", "us_p80", "floor_us", "share_of_floor", "speedup_vs_dense", "ceiling",
    "one_over_density", "gate", "error", "gpu", "torch", "triton", "cuda", "roofline", "commit", "time",
)  # fmt: skip
Row = dict[str, object]


def environment(gpu: str, roofline: str) -> dict[str, str]:
    """What a figure depends on. Nothing of it names the machine or a folder on it."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return {
        "gpu": gpu, "torch": torch.__version__, "triton": version, "cuda": str(torch.version.cuda),
        "roofline": roofline, "commit": commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


class Recorder:
    """Appends rows to a CSV; what was written stays, whatever stops the run.

    Raises:
        ValueError: the file holds other columns.
    """

    def __init__(self, path: pathlib.Path, facts: Mapping[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists() or not path.stat().st_size
        if not fresh:
            with open(path, newline="") as file:
                found = next(csv.reader(file))
            if tuple(found) != COLUMNS:
                raise ValueError(f"{path} has the columns of another version of this benchmark; give another --out")
        self._facts = dict(facts)
        self._file = open(path, "a", newline="")  # noqa: SIM115 (the recorder itself is the context manager)
        self._writer = csv.DictWriter(self._file, COLUMNS)
        if fresh:
            self._writer.writeheader()

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._writer.writerow({**row, **self._facts})
        self._file.flush()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read(paths: Sequence[pathlib.Path]) -> list[dict[str, str]]:
    """All rows of some CSVs, as text.

    Raises:
        ValueError: a file without rows, or with other columns.
    """
    rows: list[dict[str, str]] = []
    for path in paths:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"{path} is not a result of this benchmark: its columns are {reader.fieldnames}")
            found = list(reader)
        if not found:
            raise ValueError(f"{path} has no rows")
        rows += found
    return rows


def latest(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Of rows about the same cell, the last one; a run appends, so later rows are newer."""
    cell = ("gpu", "kind", "model", "layer", "clients", "batch", "dtype", "density", "mode", "provider", "graph")
    return list({tuple(row[c] for c in cell): row for row in rows}.values())


def origin(row: dict[str, str]) -> dict[str, str]:
    """What a table says of how it was made."""
    return {k: row[k] for k in ("commit", "torch", "triton", "cuda", "time")}


def finish(row: Row, dense_us: float | None) -> Row:
    """Add what follows from ``us``: share of the floor, and speed-up over dense if dense was measured."""
    us, floor = row.get("us"), row.get("floor_us")
    if isinstance(us, float):
        if isinstance(floor, float):
            row["share_of_floor"] = round(floor / us, 4)
        if dense_us is not None:
            row["speedup_vs_dense"] = round(dense_us / us, 4)
        row.update({k: round(float(row[k]), 3) for k in ("us", "us_p20", "us_p80")})  # type: ignore[arg-type]
    return row

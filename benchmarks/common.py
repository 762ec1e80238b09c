"""What the benchmarks share: turns, quartiles, result files, tables and pictures."""

from __future__ import annotations

import argparse
import csv
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from spafl.report.figures import COLOURS, in_style
from spafl_kernels import native

from .commit import commit

__all__ = [
    "COLOURS", "IMAGES", "RESULTS", "Row", "Rows", "alone", "by_density", "check_densities", "evenly", "in_style",
    "in_turns", "markdown", "options", "over", "picture", "quartiles", "read", "right", "save", "start", "tell",
    "values",
]  # fmt: skip

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"

Row = dict[str, str]  # as it stands in a CSV file; an empty text where there is no figure
Sample = Callable[[], float]


# -- time --------------------------------------------------------------------------------------------------------------


def evenly(
    calls: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, Sample]:
    """By rival: a sample, seconds per call. Short calls are repeated in one, so that all samples take similar long.

    Every call is made twice on the way, which also warms it up.
    """
    lengths = {}
    for name, call in calls.items():
        call()
        begin = clock()
        call()
        lengths[name] = max(clock() - begin, 1e-9)
    longest = max(lengths.values(), default=0.0)

    def sample(call: Callable[[], object], repeat: int) -> float:
        begin = clock()
        for _ in range(repeat):
            call()
        return (clock() - begin) / repeat

    return {
        name: functools.partial(sample, call, max(1, round(longest / lengths[name] / 2)))
        for name, call in calls.items()
    }


def in_turns(samples: Mapping[str, Sample], turns: int, seconds: float = math.inf) -> dict[str, list[float]]:
    """``turns`` samples of every rival, in turns that each start with another rival.

    A slow machine ends it early, ``seconds`` after the start, but not before five turns.
    """
    names, end = list(samples), time.monotonic() + seconds
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        if turn >= 5 and time.monotonic() > end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(samples[name]())
    return times


def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(numbers) < 2:
        return (numbers[0],) * 3
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high


def over(rival: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the speed-up: the rival's time over ours within the same turn."""
    return quartiles([a / b for a, b in zip(rival, ours, strict=True)])


# -- results -----------------------------------------------------------------------------------------------------------


@functools.cache
def _facts() -> Row:
    """What every figure depends on."""
    return {
        "isa": native.cpu_isa() or "no extension",
        "torch": torch.__version__,
        # Without "-dirty": the results of a run are themselves tracked files.
        "commit": commit(changes=False),
    }


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Rows:
    """A CSV file that is complete after every row: a run that is stopped keeps what it has measured.

    A row replaces an older one with the same values in ``key``; the others stay, so that a part of a benchmark can be
    repeated. ``measured`` are the rows of this run.

    Args:
        path: the file; None keeps the rows in memory only.
        key: columns that say what was measured.
    """

    def __init__(self, path: Path | None, key: Sequence[str]) -> None:
        self.path, self.key = path, tuple(key)
        self.rows = [] if path is None else read(path)
        self.measured: list[Row] = []

    def add(self, row: Mapping[str, object]) -> None:
        new = {name: str(value) for name, value in row.items()} | _facts()
        self.measured.append(new)
        same = [i for i, old in enumerate(self.rows) if all(old.get(k) == new[k] for k in self.key)]
        if same:
            self.rows[same[0]] = new
        else:
            self.rows.append(new)
        if self.path is not None:
            self._write(self.path)

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The newest row's order of columns; older rows may have others.
        fields = dict.fromkeys(name for row in (*self.measured[-1:], *self.rows) for name in row)
        part = path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(fields), restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(part, path)

    def failed(self) -> int:
        """The exit status: 1 if a row of this run is wrong."""
        return int(any(row.get("wrong") for row in self.measured))


def right(rows: Iterable[Row]) -> list[Row]:
    """The rows whose results were right, so that they have figures."""
    return [row for row in rows if not row.get("wrong")]


def values(rows: Iterable[Row], column: str) -> list[str]:
    """The different values of a column, in the order they appear."""
    return list(dict.fromkeys(row[column] for row in rows))


# -- command line ------------------------------------------------------------------------------------------------------


def options(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take: ``--out`` and ``--quick``."""
    name = module.rpartition(".")[2]
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help=f"CSV file (default: benchmarks/results/{name}.csv; quick: none)")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; its figures mean nothing")
    parser.set_defaults(topic=name)
    return parser


def start(args: argparse.Namespace, key: Sequence[str]) -> Rows:
    """One thread, and the rows this run adds to."""
    torch.set_num_threads(1)
    return Rows(args.out or (None if args.quick else RESULTS / f"{args.topic}.csv"), key)


def check_densities(parser: argparse.ArgumentParser, densities: Iterable[float]) -> None:
    """End the program with a message unless all lie in (0, 1]."""
    if bad := [d for d in densities if not 0 < d <= 1]:
        parser.error(f"--densities must be in (0, 1]; got {bad}")


def tell(rows: Rows, row: Mapping[str, object], head: str, figures: str, kept_back: str = "timed") -> None:
    """Add a row and print it.

    Args:
        head: what was measured, in the format of ``str.format`` with the row's columns.
        figures: what was found, in the same format; not used for a row that is wrong.
        kept_back: what was not done with a wrong one.
    """
    rows.add(row)
    found = f"WRONG, not {kept_back}: {row['wrong']}" if row["wrong"] else figures.format(**row)
    print(head.format(**row), found, flush=True)


def alone(main: Callable[[], int]) -> None:
    """Run a benchmark as a program. Stopping it is no error: its rows are in the file."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; what was measured is kept", file=sys.stderr)
        sys.exit(130)


# -- tables and pictures -----------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def by_density(rows: Sequence[Row], head: Mapping[str, Callable[[Row], str]], cell: Callable[[Row], str]) -> str:
    """A Markdown table with a line for each case and a column for each density, the largest first.

    Args:
        head: the first columns, which tell the cases apart: their titles, and what a row has there.
        cell: what a row says, if it is not wrong.
    """
    densities = sorted({float(row["density"]) for row in rows}, reverse=True)
    cases: dict[tuple[str, ...], dict[float, Row]] = {}
    for row in rows:
        cases.setdefault(tuple(of(row) for of in head.values()), {})[float(row["density"])] = row

    def text(row: Row | None) -> str:
        return "-" if row is None else "wrong" if row["wrong"] else cell(row)

    lines = [[*case, *(text(found.get(density)) for density in densities)] for case, found in cases.items()]
    return markdown([*head, *(f"density {density:g}" for density in densities)], lines)


def picture(rows: Rows, plot: Callable[[Sequence[Row]], Figure]) -> None:
    """Redraw a benchmark's picture: the README's, or, for a result file elsewhere, one beside it."""
    shown = right(rows.rows)
    if rows.path is None or not shown:
        return
    usual = rows.path.resolve().parent == RESULTS
    save(plot(shown), IMAGES / f"{rows.path.stem}.png" if usual else rows.path.with_suffix(".png"))


def save(figure: Figure, path: Path) -> None:
    """Write a PNG that is the same for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})

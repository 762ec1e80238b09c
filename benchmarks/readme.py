"""Rewrite the tables of the README and the docs, and the pictures, from the results: nothing is measured.

    python -m benchmarks.readme [--check]

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->`` and is made from ``benchmarks/results/NAME.csv``
by the benchmark of that name; its picture, where there is one, follows it. The name of an experiment stands for its
table in ``experiments/results``, ``first`` for the README's part of the first of them. ``--check`` changes nothing and
fails if a table is not what the results give.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import common, experiment_tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/benchmarks.md", "docs/experiments.md", "docs/messages.md", "docs/deployment.md")
TABLES = (
    "training_step", "rebuild", "estimators", "memory", "inference", "federated", "workers", "encodings", "layer",
    "scale", "checkpoint", "leakage", "client", "flower", "zoo", "rivals", "side_by_side", "generalisation",
    "against",
)  # fmt: skip
# With what a picture shows; both are in the README.
PICTURES = {
    "training_step": "Speed-up of one training step over density, by model",
    "federated": "Rounds per minute over density, by setting",
}
NOTHING = "*Not measured yet.*"
MARK = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def table(name: str) -> str:
    """The table, and picture, of a benchmark's results as they are in the repository.

    Raises:
        ValueError: no benchmark of that name has a table.
    """
    if name in experiment_tables.TABLES:
        return experiment_tables.TABLES[name]()
    if name not in TABLES:
        known = (*experiment_tables.TABLES, *TABLES)
        raise ValueError(f"no table is called {name!r}; known: {', '.join(known)}")
    rows = common.read(common.RESULTS / f"{name}.csv")
    if not rows:
        return NOTHING
    text = importlib.import_module(f"benchmarks.{name}").table(rows)
    return f"{text}\n\n![{PICTURES[name]}](docs/images/{name}.png)" if name in PICTURES else text


def fill(text: str, make: Callable[[str], str] = table) -> str:
    """``text`` with every marked table replaced by ``make(name)``."""
    opened, closed = text.count("<!-- table:"), text.count("<!-- /table -->")
    filled, count = MARK.subn(lambda m: f"{m[1]}{make(m[2])}\n{m[3]}", text)
    if not opened == closed == count:
        raise ValueError(f"{opened} tables begin and {closed} end; each needs <!-- table:NAME --> and <!-- /table -->")
    return filled


def draw() -> None:
    """The pictures, from the results."""
    for name in PICTURES:
        rows = common.right(common.read(common.RESULTS / f"{name}.csv"))
        if rows:
            common.save(importlib.import_module(f"benchmarks.{name}").plot(rows), common.IMAGES / f"{name}.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    args = parser.parse_args(argv)
    old = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        filled = fill(text)
        if filled != text:
            old.append(page)
            if not args.check:
                path.write_text(filled)
                print(f"rewrote the tables of {page}")
    if args.check:
        if old:
            print(f"out of date, run python -m benchmarks.readme: {', '.join(old)}", file=sys.stderr)
        return int(bool(old))
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Sparsity against generalisation: the gap between training and test accuracy over density, of committed runs.

    python -m benchmarks.generalisation [--runs experiments/results/runs] [--out FILE.csv]

Nothing is trained: every run of Fashion-MNIST below ``--runs`` that measured accuracy on its clients' training data in
its last evaluated round gives a row. ``gap`` is training minus test accuracy in percentage points, mean over clients,
with half the width of its 95 % interval over them; ``across_clients`` is Spearman's rank correlation of density and
gap over the clients of the run, from -1 to 1. Models without thresholds have density 1. Runs of different rounds are
not compared: the gap grows as training accuracy nears 100 %. ``bound`` is :func:`counting_bound` in percentage points,
for a client of as many training examples and kept parameters as the mean: 32 bits for each of them, and one for every
filter.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from benchmarks import common
from benchmarks.common import Row
from spafl.models import build_model
from spafl.report.figures.sparsity import rank_correlation
from spafl.report.run_data import ReportError, Run, load_run
from spafl.table import over_seeds
from spafl_kernels import threshold_layers

KEY = ("experiment", "method", "seed")
DATA = "fashion-mnist"
RUNS = Path(__file__).resolve().parents[1] / "experiments" / "results" / "runs"


def counting_bound(bits: float, examples: float, confidence: float = 0.95) -> float:
    """What training minus test accuracy (a fraction) stays below, with this confidence, whatever the learner.

    Hoeffding's inequality for one model fixed beforehand fails with probability ``exp(-2 examples gap ** 2)``; a model
    that a prefix-free code writes with ``bits`` is granted the part ``2 ** -bits`` of ``1 - confidence``, and those
    parts sum to no more than that.
    """
    return math.sqrt((bits * math.log(2) + math.log(1 / (1 - confidence))) / (2 * examples))


def size(run: Run) -> tuple[int, int]:
    """Parameters without the thresholds, and thresholds, of a run's model."""
    channels = json.loads((run.folder / "partition.json").read_text())["image"][0]
    return _size(run.model, run.train.shape[1], channels)


@cache
def _size(name: str, classes: int, channels: int) -> tuple[int, int]:
    model = build_model(name, classes, channels)
    filters = sum(layer.threshold.numel() for _, layer in threshold_layers(model))
    return sum(p.numel() for p in model.parameters()) - filters, filters


def row_of(run: Run, experiment: str, method: str, seed: str) -> dict[str, object] | None:
    """What a run says; None if it measured no training accuracy."""
    gaps, last = run.gaps, run.last
    if gaps is None or last.accuracy is None:
        return None
    n, points = len(gaps.gap), 100 * gaps.gap
    bare = gaps.density is None
    density = np.ones(n) if gaps.density is None else gaps.density
    parameters, filters = size(run)
    kept = 1.0 if last.density_parameters is None else last.density_parameters
    bits, examples = 32 * kept * parameters + (0 if bare else filters), float(run.train.sum(1).mean())
    return {
        "experiment": experiment, "method": method, "seed": seed, "rounds": gaps.round + 1, "clients": n,
        "density": round(float(density.mean()), 4), "parameters": round(kept, 4),
        "train_accuracy": round(float(points.mean()) + 100 * last.accuracy, 2),
        "accuracy": round(100 * last.accuracy, 2),
        "gap": round(float(points.mean()), 3), "gap_half_width": round(float(1.96 * points.std(ddof=1) / n**0.5), 3),
        "across_clients": "" if bare else round(rank_correlation(density, gaps.gap), 3),
        "bound": round(100 * counting_bound(bits, examples)),
        "wrong": "",
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """A line for each method of an experiment, over its seeds, by rounds and then by density."""

    def seeds(own: Sequence[Row], name: str) -> dict[int, float]:
        return {int(row["seed"]): float(row[name]) for row in own if row[name] != ""}

    def mean(own: Sequence[Row], name: str) -> float:
        return fmean(seeds(own, name).values())

    key = ("experiment", "method", "rounds")
    groups = [list(own) for _, own in groupby(sorted(rows, key=itemgetter(*key)), itemgetter(*key))]
    groups.sort(key=lambda own: (own[0]["experiment"], -int(own[0]["rounds"]), mean(own, "density")))
    body = [
        [own[0]["experiment"], own[0]["method"].replace("_", " "), own[0]["rounds"], str(len(own)),
         f"{over_seeds(seeds(own, 'density'), 3)}, {mean(own, 'parameters'):.3f}",
         *(over_seeds(seeds(own, name), 1) for name in ("train_accuracy", "accuracy", "gap")),
         over_seeds(across, 2, "+") if (across := seeds(own, "across_clients")) else "", f"{mean(own, 'bound'):,.0f}"]
        for own in groups
    ]  # fmt: skip
    header = ["experiment", "run", "rounds", "seeds", "density by layer, by parameters", "training accuracy %",
              "test accuracy %", "gap, points", "correlation over clients", "counting bound, points"]  # fmt: skip
    return common.markdown(header, body)


@common.in_style
def plot(rows: Sequence[Row]) -> Figure:
    """Gap over density, a point for each run, a panel for each number of rounds."""
    groups = sorted({(row["experiment"], int(row["rounds"])) for row in rows}, key=lambda g: (g[0], -g[1]))
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(4.6 * across, 4.8 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    panels = list(grid.flat)
    for spare in panels[len(groups) :]:
        spare.remove()
    for panel, group in zip(panels, groups):
        own = [row for row in rows if (row["experiment"], int(row["rounds"])) == group]
        for i, method in enumerate(dict.fromkeys(row["method"] for row in own)):
            of = [row for row in own if row["method"] == method]
            x, y, half = ([float(row[name]) for row in of] for name in ("density", "gap", "gap_half_width"))
            colour = common.COLOURS[i % len(common.COLOURS)]
            marker = "os^"[i // len(common.COLOURS) % 3]  # other ones where the colours come round
            label = method.split("_", 1)[-1].replace("algorithm.", "")  # of a sweep: what was varied
            panel.errorbar(x, y, half, fmt=marker, capsize=3, color=colour, label=label)
        panel.set_xlim(0, 1.05)
        panel.set_xlabel("density, mean over layers and clients")
        panel.set_title(f"{group[0]}, {group[1]} rounds")
        # below, for points are everywhere
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    lowest = min(float(row["gap"]) - float(row["gap_half_width"]) for row in rows)
    panels[0].set_ylim(bottom=min(0.0, lowest))  # of all panels; any earlier it would fix the upper end too
    for left in grid[:, 0]:
        left.set_ylabel("training minus test accuracy\n(percentage points)")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.generalisation", __doc__)
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of run folders, EXPERIMENT/METHOD/seed-N")
    args = parser.parse_args(argv)
    rows = common.start(args, KEY)
    summaries = sorted(args.runs.glob("*/*/seed-*/summary.json"))
    for summary in summaries[:6] if args.quick else summaries:
        experiment, method, seed = summary.relative_to(args.runs).parts[:3]
        try:
            run = load_run(summary.parent)
        except ReportError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        row = row_of(run, experiment, method, seed.removeprefix("seed-")) if run.data == DATA else None
        if row is not None:
            common.tell(rows, row, "{experiment} {method} seed {seed}", "density {density}: gap {gap}", "read")
    if not rows.measured:
        print(f"error: no run with training accuracies below {args.runs}", file=sys.stderr)
        return 2
    common.picture(rows, plot)
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

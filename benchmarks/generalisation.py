"""Sparsity against generalisation: the gap between training and test accuracy over density, of committed runs.

    python -m benchmarks.generalisation [--runs experiments/results/runs] [--out FILE.csv]

Nothing is trained: every run folder below ``--runs`` that measured accuracy on its clients' training data in its last
evaluated round gives a row. ``gap`` is training minus test accuracy in percentage points, mean over clients, with half
the width of its 95 % interval over them; ``across_clients`` is Spearman's rank correlation of density and gap over the
clients of the run, from -1 to 1. Models without thresholds have density 1. Runs of different rounds are not compared:
the gap grows as training accuracy nears 100 %.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks import common
from benchmarks.common import Row
from spafl.report.figures.sparsity import rank_correlation
from spafl.report.run_data import ReportError, Run, load_run

KEY = ("experiment", "method", "seed")
RUNS = Path(__file__).resolve().parents[1] / "experiments" / "results" / "runs"


def row_of(run: Run, experiment: str, method: str, seed: str) -> dict[str, object] | None:
    """What a run says; None if it measured no training accuracy."""
    gaps, last = run.gaps, run.last
    if gaps is None or last.accuracy is None:
        return None
    n, points = len(gaps.gap), 100 * gaps.gap
    bare = gaps.density is None
    density = np.ones(n) if gaps.density is None else gaps.density
    return {
        "experiment": experiment, "method": method, "seed": seed, "rounds": gaps.round + 1, "clients": n,
        "density": round(float(density.mean()), 4),
        "train_accuracy": round(float(points.mean()) + 100 * last.accuracy, 2),
        "accuracy": round(100 * last.accuracy, 2),
        "gap": round(float(points.mean()), 3), "gap_half_width": round(float(1.96 * points.std(ddof=1) / n**0.5), 3),
        "across_clients": "" if bare else round(rank_correlation(density, gaps.gap), 3),
        "wrong": "",
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """A line for each run, by rounds and then by density; runs of an experiment stand together."""
    body = [
        [row["experiment"], row["method"].replace("_", " "), row["seed"], row["rounds"], f"{float(row['density']):.3f}",
         f"{float(row['train_accuracy']):.1f}", f"{float(row['accuracy']):.1f}",
         f"{float(row['gap']):.1f} ± {float(row['gap_half_width']):.1f}",
         f"{float(row['across_clients']):+.2f}" if row["across_clients"] else ""]
        for row in sorted(rows, key=lambda r: (r["experiment"], -int(r["rounds"]), float(r["density"])))
    ]  # fmt: skip
    header = ["experiment", "run", "seed", "rounds", "density by layer", "training accuracy %", "test accuracy %",
              "gap, points", "correlation over clients"]  # fmt: skip
    return common.markdown(header, body)


@common.in_style
def plot(rows: Sequence[Row]) -> Figure:
    """Gap over density, a point for each run, a panel for each number of rounds."""
    groups = sorted({(row["experiment"], int(row["rounds"])) for row in rows}, key=lambda g: (g[0], -g[1]))
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(4.6 * across, 4.0 * down), layout="constrained")
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
            panel.errorbar(x, y, half, fmt=marker, capsize=3, color=colour, label=method.split("_", 1)[-1])
        panel.set_xlim(0, 1.05)
        panel.set_xlabel("density, mean over layers and clients")
        panel.set_title(f"{group[0]}, {group[1]} rounds")
        panel.legend(fontsize=7)
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
    for summary in sorted(args.runs.glob("*/*/seed-*/summary.json")):
        experiment, method, seed = summary.relative_to(args.runs).parts[:3]
        try:
            row = row_of(load_run(summary.parent), experiment, method, seed.removeprefix("seed-"))
        except ReportError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if row is not None:
            common.tell(rows, row, "{experiment} {method} seed {seed}", "density {density}: gap {gap}", "read")
    if not rows.measured:
        print(f"error: no run with training accuracies below {args.runs}", file=sys.stderr)
        return 2
    common.picture(rows, plot)
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

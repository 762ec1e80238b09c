"""One training step: training as published, our masked trainer and the compact trainer, by model and density.

    python -m benchmarks.training_step [--models lenet5 ...] [--densities 1 .5 .25 .1] [--profile] [--out FILE.csv]

A step is forward, backward, penalty, clip, update and mask check, in exact semantics. The rivals run in one process,
one thread, in turn; a cell shows medians of the ratio within a turn and the quartiles around them. Before a cell is
timed its trainers take the same steps from the same state, in float64 and float32, and must agree; a cell that does
not is reported as wrong, without a speed. ``ideal`` is the ratio of multiply-accumulates, ``realised`` the share of it
that the clock shows; above 1 where other things than skipping help.

``--profile`` prints under each cell what keeps it from the ideal: by kind of operator (torch.profiler, both steps: our
time beyond the published time divided by the ideal) and by layer (``spafl_kernels.compact.audit``, layers alone).
``--clock cpu`` measures process CPU time, which neighbours on the machine disturb less than wall time.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from benchmarks import breakdown, common
from benchmarks.cases import CASES, RIVALS, Case, gate
from benchmarks.common import COLOURS, Row
from spafl_kernels.compact import CompactTrainer

KEY = ("model", "density")
# Nothing moves noticeably: after hundreds of steps on one batch at the usual rate, which a fast rival makes first, its
# gradients are denormal numbers, with which processors are several times slower.
RATE = 1e-6
DENSITIES = (1.0, 0.5, 0.25, 0.1)
LABELS = {"lenet5": "LeNet-5", "conv4": "Conv4", "resnet18": "ResNet-18 half width", "vit": "ViT"}


def ideal(case: Case, density: float, masked_macs: float) -> float:
    """The ratio of multiply-accumulates: the filters that are needed, without the zero rows that round them up."""
    exact = CompactTrainer(case.pruned(density), strict=True, multiple=1)
    exact.begin(case.options)
    exact.step(*next(case.batches(1)))
    return masked_macs / exact.finish().macs


def measure(
    case: Case, density: float, turns: int, seconds: float, clock: Callable[[], float], profile: bool = False
) -> dict[str, object]:
    """One cell of the table."""
    row: dict[str, object] = {"model": case.model, "batch": case.batch, "density": density}
    for rival in ("published", "compact"):
        if wrong := gate(case, functools.partial(case.pruned, density), rival):
            return row | {"wrong": wrong}
    base = case.pruned(density)
    x, y = next(case.batches(1))
    trainers = {name: RIVALS[name](copy.deepcopy(base)) for name in ("published", "masked", "compact")}
    for trainer in trainers.values():
        trainer.begin(dataclasses.replace(case.options, lr=RATE))
        trainer.step(x, y)
    steps = {name: functools.partial(trainer.step, x, y) for name, trainer in trainers.items()}
    times = common.in_turns(common.evenly(steps, clock), turns, seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    masked = trainers["masked"].finish()
    promise = ideal(case, density, masked.macs / masked.steps)
    if profile:
        print(breakdown.report(base, x, steps, median, promise), flush=True)
    low, middle, high = common.over(times["published"], times["compact"])
    return row | {
        **{f"{name}_ms": round(1e3 * value, 3) for name, value in median.items()},
        "speedup": round(middle, 2),
        "speedup_q1": round(low, 2),
        "speedup_q3": round(high, 2),
        "over_masked": round(common.over(times["masked"], times["compact"])[1], 2),
        "ideal": round(promise, 2),
        "realised": round(middle / promise, 3),
        "turns": len(times["compact"]),
        "rebuilds": trainers["compact"].finish().rebuilds,
        "wrong": "",
    }


def table(rows: Sequence[Row]) -> str:
    """Speed-up over training as published, by model and density."""

    def cell(row: Row) -> str:
        promise = f" [{float(row['ideal']):.3g}]" if float(row["density"]) < 1 else ""
        return f"{float(row['speedup']):.3g}x{promise}"

    return common.by_density(
        rows, {"model, batch": lambda r: f"{LABELS.get(r['model'], r['model'])}, {r['batch']}"}, cell
    )


@common.in_style
def plot(rows: Sequence[Row]) -> Figure:
    """Speed-up over density, a panel per model, with the ideal dashed; training as published is 1."""
    rows = common.right(rows)
    models = common.values(rows, "model")
    figure = Figure(figsize=(2.4 * max(len(models), 1) + 0.6, 3.0))
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models):
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: float(row["density"]))
        x = [float(row["density"]) for row in mine]
        line = {name: [float(row[name]) for row in mine] for name in ("speedup", "speedup_q1", "speedup_q3", "ideal")}
        panel.axhline(1, color="#666666", linewidth=1, linestyle=":", label="as published")
        panel.plot(x, line["ideal"], "--", color=COLOURS[1], label="ideal by operations")
        panel.plot(x, line["speedup"], "o-", color=COLOURS[0], markersize=4, label="compact, measured")
        panel.fill_between(x, line["speedup_q1"], line["speedup_q3"], color=COLOURS[0], alpha=0.2, linewidth=0)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.invert_xaxis()
        panel.set_xticks(x, [f"{value:g}" for value in x])
        panel.set_xticks([], minor=True)
        panel.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        panel.set_yticks([], minor=True)
        panel.set_title(LABELS.get(model, model))
        panel.set_xlabel("density")
    panels[0].set_ylabel("speed-up of a training step")
    panels[0].legend(fontsize=8, loc="upper left")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.training_step", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--turns", type=int, default=40, help="measurements per rival")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of measurement per cell, about")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--profile", action="store_true", help="say what keeps each cell from the ideal")
    args = parser.parse_args(argv)
    common.check_densities(parser, args.densities)
    if args.quick:
        args.models, args.densities, args.turns = ["lenet5"], [0.5], 3
    rows = common.start(args, KEY)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    for model in args.models:
        for density in args.densities:
            row = measure(CASES[model], density, args.turns, args.budget, clock, args.profile)
            common.tell(
                rows, row | {"clock": args.clock}, "{model:9} b{batch} density {density:<4}",
                "published {published_ms:9.3f} ms  compact {compact_ms:8.3f} ms  x{speedup:<5} "
                "[{speedup_q1}, {speedup_q3}]  ideal x{ideal:<5} realised {realised:.0%}",
            )  # fmt: skip
    common.picture(rows, plot)
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

"""Twenty models, two estimators, four densities: a training step with engine "auto", masked, and plainly dense.

    python -m benchmarks.zoo [--models unet ...] [--estimators window identity] [--densities 1 .5 .25 .1]

Interleaved in one process on one thread, in CPU time, which neighbours on the machine disturb less than wall time; a
speed-up is the median of the ratios within a turn. Plainly dense is the same model without thresholds: no masks, no
penalty. ``ideal`` is the ratio of the multiply-accumulates, masked over compact, with those pruned rows that have a
gradient and must be computed; ``realised`` is the compact engine's speed-up over it. The compact engine is timed where
"auto" does not take it, too; ``python -m benchmarks.prices`` fits the prices by which "auto" chooses to the figures.

The gate, told at the end: "auto" is nowhere below .97 of masked, and the median realised share at density .5 is at
least 70 %. Before a cell is timed, masked and compact trainer take the same steps in float64 and float32, and agree.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases, common
from benchmarks.common import Row
from benchmarks.training_step import RATE
from benchmarks.zoo_models import ZOO, Specimen
from spafl_kernels import to_dense
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.engines import make_trainer
from spafl_kernels.training import Loss, MaskedTrainer, Trainer

KEY = ("model", "estimator", "density", "batch")
DENSITIES = (1.0, 0.5, 0.25, 0.1)
ESTIMATORS = ("window", "identity")
NOT_SLOWER = 0.97  # of masked, in every cell
REALISED = 0.7  # of the ideal, median at density .5

# By name, looked up at each use, so that a test can put a wrong one here.
RIVALS: dict[str, Callable[[nn.Module, Loss], Trainer]] = {
    "masked": MaskedTrainer,
    "compact": lambda model, loss: CompactTrainer(model, loss, strict=True),
    "plain": lambda model, loss: CompactTrainer(model, loss, strict=True, compiled=False),
    "auto": lambda model, loss: make_trainer(model, loss=loss),
}


class Bench:
    """One model under one estimator: its trainers are made once and used at every density."""

    def __init__(self, one: Specimen) -> None:
        self.one, self.checked = one, one.small()
        self._trainers: dict[tuple[object, ...], tuple[Trainer, dict[str, Tensor]]] = {}

    def trainer(self, rival: str, density: float, *form: Any) -> Trainer:
        """The trainer of a rival on the model as it was built, pruned to ``density``.

        ``form``: dtype and memory layout; float32 and contiguous by default.
        """
        key = (rival, *form)
        if key not in self._trainers:
            model = self.one.pruned(1.0)
            for option in form:
                model = model.to(option) if isinstance(option, torch.dtype) else model.to(memory_format=option)
            trainer = RIVALS[rival](model, self.one.loss)
            self._trainers[key] = trainer, copy.deepcopy(model.state_dict())
        trainer, state = self._trainers[key]
        trainer.model.load_state_dict(state)
        self.one.prune_(trainer.model, density)
        return trainer

    def run(self, density: float, steps: int = 2) -> cases.Run:
        """Some steps on few samples, for :func:`benchmarks.cases.same_training`."""

        def run(
            trainer: str,
            dtype: torch.dtype,
            layout: torch.memory_format = torch.contiguous_format,
            order: int | None = None,
        ) -> cases.Outcome:
            one = self.trainer(trainer, density, dtype, layout)
            one.begin(self.one.options)
            losses = []
            for x, y in self.checked.batches(steps, dtype):
                form = layout if x.dim() == 4 else torch.contiguous_format
                losses.append(one.step(*cases.arranged(x, y, form, order)))
            return cases.outcome(losses, one.model, one.finish())

        return run


def ideal(bench: Bench, density: float, masked_macs: float) -> float:
    """The ratio of multiply-accumulates: the filters that are needed, without the zero rows that round them up."""
    trainer = CompactTrainer(bench.one.pruned(density), bench.one.loss, strict=True, multiple=1, verify="never")
    trainer.begin(bench.one.options)
    trainer.step(*next(bench.one.batches(1)))
    return masked_macs / trainer.finish().macs


def measure(
    bench: Bench,
    density: float,
    turns: int,
    seconds: float,
    clock: Callable[[], float] = time.process_time,
    plain: bool = False,
) -> dict[str, object]:
    """One cell of the table."""
    one = bench.one
    row: dict[str, object] = {
        "model": one.name, "estimator": one.estimator, "density": density, "batch": one.batch,
    }  # fmt: skip
    if wrong := cases.same_training(bench.run(density), "compact"):
        return row | {"wrong": wrong}
    x, y = next(one.batches(1))
    options = dataclasses.replace(one.options, lr=RATE)
    trainers = {name: bench.trainer(name, density) for name in ("masked", "auto", "compact", *["plain"] * plain)}
    trainers["dense"] = MaskedTrainer(to_dense(trainers["masked"].model), one.loss)
    steps: dict[str, Callable[[], object]] = {}
    for name, trainer in trainers.items():
        trainer.begin(dataclasses.replace(options, penalty=0.0) if name == "dense" else options)
        trainer.step(x, y)
        steps[name] = lambda trainer=trainer: trainer.step(x, y)  # type: ignore[misc]
    engine = trainers["auto"].engine
    if engine == "compact":
        del steps["compact"]
    times = common.in_turns(common.evenly(steps, clock), turns, seconds)
    times.setdefault("compact", times["auto"])
    results = {name: trainer.finish() for name, trainer in trainers.items()}
    promise = ideal(bench, density, results["masked"].macs / results["masked"].steps)
    low, middle, high = common.over(times["masked"], times["auto"])
    compact = common.over(times["masked"], times["compact"])[1]
    return row | {
        "engine": engine,
        **{
            f"{name}_ms": round(1e3 * statistics.median(times[name]), 3) if name in times else ""
            for name in ("dense", "masked", "compact", "plain")
        },
        "speedup": round(middle, 3),
        "speedup_q1": round(low, 3),
        "speedup_q3": round(high, 3),
        "compact_over_masked": round(compact, 3),
        "dense_over_masked": round(common.over(times["masked"], times["dense"])[1], 3),
        "ideal": round(promise, 3),
        "realised": round(compact / promise, 3),
        "turns": len(times["masked"]),
        "clock": "cpu" if clock is time.process_time else "wall",
        "load": round(os.getloadavg()[0], 1),
        "wrong": "",
    }


def gate(rows: Sequence[Row]) -> list[str]:
    """What the figures miss, one line each; empty if nothing. The ideal is asked of the models' own batches."""
    rows = common.right(rows)
    missed = [
        f"{row['model']}, batch {row['batch']}, {row['estimator']}, density {row['density']}: "
        f"{row['speedup']} of masked's speed"
        for row in rows
        if float(row["speedup"]) < NOT_SLOWER
    ]
    half = [float(row["realised"]) for row in rows if float(row["density"]) == 0.5 and _usual(row)]
    if half and (share := statistics.median(half)) < REALISED:
        missed.append(f"the median realised share of the ideal at density .5 is {share:.0%}, not {REALISED:.0%}")
    return missed


def _usual(row: Row) -> bool:
    return int(row["batch"]) == ZOO[row["model"]].batch


def table(rows: Sequence[Row]) -> str:
    """Speed-up over masked by model, estimator and density; what is slower stands out."""

    def cell(row: Row) -> str:
        speedup = float(row["speedup"])
        text = f"{speedup:.3g}x" if speedup >= NOT_SLOWER else f"**{speedup:.2f}x**"
        if row["engine"] == "masked":
            text += f" (masked; compact {float(row['compact_over_masked']):.3g}x)"
        promise = f" of {float(row['ideal']):.3g}x" if float(row["density"]) < 1 else ""
        return f"{text}{promise}; dense {float(row['dense_over_masked']):.3g}x"

    head = {"model, batch": lambda r: f"{r['model']}, {r['batch']}", "estimator": lambda r: r["estimator"]}
    return common.by_density(rows, head, cell)


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.zoo", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(ZOO), default=list(ZOO))
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--batch", type=int, help="samples in a step (default: of the model, 16 or 64)")
    parser.add_argument("--plain", action="store_true", help="time the compact engine without the extension, too")
    parser.add_argument("--turns", type=int, default=15, help="measurements per rival")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of measurement per cell, about")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu", help="cpu: neighbours disturb it less")
    args = parser.parse_args(argv)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    common.check_densities(parser, args.densities)
    if args.quick:
        args.models, args.estimators, args.densities, args.turns = ["signal_net"], ["window"], [0.25], 2
    rows = common.start(args, KEY)
    for model in args.models:
        for estimator in args.estimators:
            one = dataclasses.replace(ZOO[model], estimator=estimator, batch=args.batch or ZOO[model].batch)
            bench = Bench(one.small() if args.quick else one)
            for density in args.densities:
                common.tell(
                    rows, measure(bench, density, args.turns, args.budget, clock, args.plain),
                    "{model:16} b{batch:<2} {estimator:8} density {density:<4}",
                    "masked {masked_ms:8.2f} ms  compact {compact_ms:8.2f} ms  dense {dense_ms:8.2f} ms  "
                    "auto is {engine} x{speedup} [{speedup_q1}, {speedup_q3}]  ideal x{ideal} realised {realised:.0%}  "
                    "load {load}",
                )  # fmt: skip
    missed = [] if args.quick else gate(rows.rows)
    print("\n".join(f"gate: {line}" for line in missed or ["passed"]))
    return int(bool(rows.failed() or missed))


if __name__ == "__main__":
    common.alone(main)

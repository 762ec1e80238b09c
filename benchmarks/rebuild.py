"""What a mask that changes costs: steps without a flip, with one every 20 steps, and with one or more at every step.

    python -m benchmarks.rebuild [--models lenet5 ...] [--densities .5 .25] [--out FILE.csv]

Filters flip when they are meant to: a threshold is started with a momentum that carries it across its filter's score
between two steps, up or down, while a tiny learning rate holds everything else still. Prunings and revivals alternate,
so that the density stays. All weights have momentum, as in training, so that pruned rows keep moving. Patterns:

never      no mask changes
every 20   one filter, once in 20 steps
every      one filter at every step, of another layer each time
layers     one filter of every layer (but the last) at every step

A sample is a training of 10 or 20 steps after a first one, which builds the plan and is not timed. Counts move between
two neighbours, so shapes have been seen before: a new shape of a convolution costs about 1 to 3 ms more, once
(docs/compact.md). Before a cell is timed, masked and compact trainer run every pattern in float64 and float32; they
must agree in losses, weights, momentum and densities, and rebuild as often as masks flip.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.cases import CASES, RIVALS, Case, Outcome, arranged, outcome, same_training
from benchmarks.common import Row
from spafl_kernels import threshold_layers
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.training import Trainer, TrainResult

KEY = ("model", "density")
RATE = 1e-6  # nothing but the thresholds that are meant to moves noticeably
STRIDE = 0.1  # of its score: how far a flipping threshold would move in the first step without momentum's decay


@dataclasses.dataclass(frozen=True)
class Pattern:
    """``steps`` timed steps; in each of ``at`` (1 is the first) ``layers`` layers flip one filter each (0: all)."""

    steps: int
    at: tuple[int, ...]
    layers: int = 1


PATTERNS = {
    "never": Pattern(20, ()),
    "every_20": Pattern(20, (10,)),
    "every": Pattern(10, tuple(range(1, 11))),
    "layers": Pattern(10, tuple(range(1, 11)), layers=0),
}


@dataclasses.dataclass
class Schedule:
    """A model whose filters flip on time: its momentum buffers, and the flips at each step as ``(layer, filter)``."""

    model: nn.Module
    momentum: dict[str, Tensor]
    flips: list[list[tuple[str, int]]]


def schedule(case: Case, density: float, pattern: Pattern) -> Schedule:
    """Start thresholds and momentum so that one filter after the other crosses its score."""
    model = case.pruned(density)
    generator = torch.Generator().manual_seed(2)
    momentum = {
        name: 1e-3 * torch.randn(p.shape, generator=generator)
        if not name.endswith("threshold")
        else torch.zeros_like(p)
        for name, p in model.named_parameters()
    }
    layers = list(threshold_layers(model))[:-1]  # of the last layer every filter is needed
    active = {name: layer.mask().nonzero().flatten().tolist() for name, layer in layers}
    pruned = {name: (~layer.mask()).nonzero().flatten().tolist() for name, layer in layers}
    flips: list[list[tuple[str, int]]] = [[] for _ in range(pattern.steps + 1)]
    turn = dict.fromkeys(active, 0)
    mu, at = case.options.momentum, 0
    for step in pattern.at:
        for _ in range(pattern.layers or len(layers)):
            name, layer = layers[at % len(layers)]
            at += 1
            prune = turn[name] % 2 == 0
            turn[name] += 1
            i = (active if prune else pruned)[name].pop()
            # After k updates it has moved by `pace * travelled(k)`; the score lies between updates step - 1 and step.
            travelled = [mu * (1 - mu**k) / (1 - mu) for k in (step - 1, step)]
            with torch.no_grad():
                score = layer.scores()[i]
                pace = STRIDE * score if prune else -STRIDE * score
                layer.threshold[i] = score - pace * sum(travelled) / 2
                momentum[f"{name}.threshold"][i] = -pace / RATE
            flips[step].append((name, i))
    return Schedule(model, momentum, flips)


class Training:
    """A trainer that runs a schedule from its start, again and again."""

    def __init__(
        self,
        plan: Schedule,
        case: Case,
        rival: str,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.contiguous_format,
        order: int | None = None,
    ) -> None:
        self.model = copy.deepcopy(plan.model).to(dtype).to(memory_format=layout)
        self.trainer: Trainer = RIVALS[rival](self.model)
        if isinstance(self.trainer, CompactTrainer):
            self.trainer.patience = 0  # a rebuild for every flip; it would rather wait until some are worth it
        # Without the penalty and the guard no threshold moves but those that are meant to.
        self.options = dataclasses.replace(case.options, lr=RATE, penalty=0.0, collapse_floor=None)
        self.start = copy.deepcopy(self.model.state_dict())
        self.momentum = {name: v.to(dtype) for name, v in plan.momentum.items()}
        self.batch = arranged(*next(case.batches(1, dtype)), layout, order)
        self.steps = len(plan.flips) - 1

    def run(self) -> tuple[list[Tensor], TrainResult]:
        """One training; losses and result."""
        self._begin()
        losses = [self.trainer.step(*self.batch) for _ in range(self.steps + 1)]
        return losses, self.trainer.finish()

    def _begin(self) -> None:
        self.model.load_state_dict(self.start)
        self.trainer.begin(self.options, {name: v.clone() for name, v in self.momentum.items()})

    def sample(self) -> float:
        """Seconds per step of one training, without its first step."""
        self._begin()
        self.trainer.step(*self.batch)
        begin = time.perf_counter()
        for _ in range(self.steps):
            self.trainer.step(*self.batch)
        seconds = (time.perf_counter() - begin) / self.steps
        self.trainer.finish()
        return seconds


def gate(case: Case, plan: Schedule) -> str:
    """Empty if the compact trainer trains as the masked one does and both flip when they should, else what differs."""
    wanted = {name: layer.mask() for name, layer in threshold_layers(plan.model)}
    for flips in plan.flips:
        for name, i in flips:
            wanted[name][i] ^= True
    events = sum(bool(flips) for flips in plan.flips)
    wrong = []

    def run(
        trainer: str,
        dtype: torch.dtype,
        layout: torch.memory_format = torch.contiguous_format,
        order: int | None = None,
    ) -> Outcome:
        training = Training(plan, case, trainer, dtype, layout, order)
        losses, result = training.run()
        if trainer == "compact" and result.rebuilds != events:
            wrong.append(f"{trainer}: {result.rebuilds} rebuilds instead of {events} in {dtype}")
        for name, layer in threshold_layers(training.model):
            if not torch.equal(layer.mask(), wanted[name]):
                wrong.append(f"{trainer}: other filters of {name} flipped than should in {dtype}")
        return outcome(losses, training.model, result)

    return same_training(run, "compact") or "; ".join(wrong)


def measure(case: Case, density: float, turns: int, seconds: float) -> dict[str, object]:
    """One row: milliseconds per step by pattern, and what a rebuild adds, in milliseconds and in steps."""
    row: dict[str, object] = {"model": case.model, "batch": case.batch, "density": density}
    plans = {name: schedule(case, density, pattern) for name, pattern in PATTERNS.items()}
    for name, plan in plans.items():
        if wrong := gate(case, plan):
            return row | {"wrong": f"{name}: {wrong}"}
    samples = {name: Training(plan, case, "compact").sample for name, plan in plans.items()}
    masked = Training(plans["never"], case, "masked").sample
    for sample in (*samples.values(), masked):
        sample()
    times = common.in_turns(samples | {"masked": masked}, turns, seconds)
    median = {name: statistics.median(values) for name, values in times.items()}

    def added(name: str) -> tuple[float, float, float]:
        return common.quartiles([a - b for a, b in zip(times[name], times["never"], strict=True)])

    low, middle, high = added("every")
    return row | {
        **{f"{name}_ms": round(1e3 * value, 3) for name, value in median.items()},
        "rebuild_ms": round(1e3 * middle, 3),
        "rebuild_ms_q1": round(1e3 * low, 3),
        "rebuild_ms_q3": round(1e3 * high, 3),
        "rebuild_steps": round(middle / median["never"], 2),
        "rebuild_layers_ms": round(1e3 * added("layers")[1], 3),
        "every_20_percent": round(100 * (common.over(times["every_20"], times["never"])[1] - 1), 1),
        "turns": len(times["never"]),
        "wrong": "",
    }


def table(rows: Sequence[Row]) -> str:
    """Step time by how often masks flip."""

    def cells(row: Row) -> list[str]:
        head = [row["model"], row["batch"], row["density"]]
        if row["wrong"]:
            return [*head, "wrong", *[""] * 5]
        return [
            *head,
            row["never_ms"],
            row["every_20_ms"],
            row["every_ms"],
            row["layers_ms"],
            f"{row['rebuild_ms']} ms = {row['rebuild_steps']} steps",
            row["masked_ms"],
        ]

    patterns = ("ms per step: no flip", "one in 20 steps", "one a step", "one a layer a step")
    header = ["model", "batch", "density", *patterns, "a rebuild adds", "masked, no flip, ms"]
    return common.markdown(header, map(cells, rows))


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.rebuild", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=["lenet5", "conv4", "resnet18"])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--turns", type=int, default=20, help="trainings per pattern")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of measurement per cell, about")
    args = parser.parse_args(argv)
    if bad := [d for d in args.densities if not 0.25 <= d <= 0.75]:
        parser.error(f"--densities must be in [0.25, 0.75], so that there are filters to prune and revive; got {bad}")
    if args.quick:
        args.models, args.densities, args.turns = ["lenet5"], [0.5], 2
    rows = common.start(args, KEY)
    for name in args.models:
        for density in args.densities:
            case = CASES[name].small() if args.quick else CASES[name]
            row = measure(case, density, args.turns, args.budget)
            common.tell(
                rows, row, "{model:9} b{batch} density {density:<4}",
                "no flip {never_ms} ms  one in 20 {every_20_ms} ms ({every_20_percent:+} %)  one a step {every_ms} ms  "
                "one a layer a step {layers_ms} ms  a rebuild adds {rebuild_ms} ms = {rebuild_steps} steps",
            )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

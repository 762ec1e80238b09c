"""Fair rivals of a compact step: plain PyTorch written well, and a dense network that is as small from the start.

    python -m benchmarks.rivals [--models lenet5 ...] [--densities 1 .5 .25] [--threads 1 2] [--out FILE.csv]
    SPAFL_CPU_ISA=avx2 python -m benchmarks.rivals      # our kernels without AVX-512: rows of their own

The dense rival is the model without thresholds: no masks, no penalty, ``torch.optim.SGD(foreach=True)``, the memory
format that is faster for it. The small one is the same for a network every hidden layer of which has the share
``density`` of its channels, as if the widths had been known before; a model that cannot be narrowed (attention heads)
has none. Beside them the masked trainer, training as published, and the compact engine with the extension and without.
One process, in turns; a cell is the median of the ratios within a turn. Before a cell is timed masked and compact
trainer take the same steps and agree, and the dense rival's first loss is theirs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import cases, common
from benchmarks.cases import CASES, RIVALS, Case
from benchmarks.common import Row
from benchmarks.training_step import LABELS, RATE
from spafl.algorithms import narrow
from spafl_kernels import to_dense
from spafl_kernels.compact import CompactTrainer

KEY = ("model", "density", "threads", "isa")
RATIOS = ("published", "masked", "dense", "small", "plain")


def plain_loop(case: Case, model: nn.Module, layout: torch.memory_format) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of plain PyTorch, and its loss."""
    model = model.to(memory_format=layout).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), RATE, case.options.momentum, foreach=True)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.contiguous(memory_format=layout)), y)
        loss.backward()
        if case.options.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.options.max_grad_norm, foreach=True)
        optimizer.step()
        return loss.detach()

    return step


def small(case: Case, density: float) -> nn.Module | None:
    """The dense network whose hidden layers have the share ``density`` of their channels; None where there is none."""
    model = to_dense(case.pruned(1.0))
    try:
        return narrow.resized(model, narrow.shapes_at(model, torch.zeros(2, *case.image), density))
    except ValueError:
        return None


def faster(case: Case, model: nn.Module, x: Tensor, y: Tensor, clock: Callable[[], float]) -> Callable[[], object]:
    """The plain loop in the memory format that is faster for this model."""
    formats = (torch.contiguous_format, torch.channels_last)
    steps = {str(f): functools.partial(plain_loop(case, copy.deepcopy(model), f), x, y) for f in formats}
    times = common.in_turns(common.evenly(steps, clock), 5)
    return steps[min(times, key=lambda name: statistics.median(times[name]))]


def measure(
    case: Case, density: float, threads: int, turns: int, seconds: float, clock: Callable[[], float]
) -> dict[str, object]:
    """One row of the table."""
    row: dict[str, object] = {"model": case.model, "batch": case.batch, "density": density, "threads": threads}
    if wrong := cases.gate(case, functools.partial(case.pruned, density), "compact", steps=2):
        return row | {"wrong": wrong}
    x, y = next(case.batches(1))
    base = case.pruned(density)
    trainers = {name: RIVALS[name](copy.deepcopy(base)) for name in ("published", "masked", "compact")}
    trainers["plain"] = CompactTrainer(copy.deepcopy(base), strict=True, compiled=False)
    losses = {}
    for name, trainer in trainers.items():
        trainer.begin(dataclasses.replace(case.options, lr=RATE))
        losses[name] = trainer.step(x, y)
    losses["dense"] = plain_loop(case, to_dense(base), torch.contiguous_format)(x, y)
    for name, loss in losses.items():
        if wrong := cases.differs(losses["masked"], loss, 1e-3):
            return row | {"wrong": f"{name}: loss {wrong}"}
    steps: dict[str, Callable[[], object]] = {n: functools.partial(t.step, x, y) for n, t in trainers.items()}
    steps["dense"] = faster(case, to_dense(base), x, y, clock)
    if (narrower := small(case, density)) is not None:
        steps["small"] = faster(case, narrower, x, y, clock)
    times = common.in_turns(common.evenly(steps, clock), turns, seconds)
    ratios = {name: common.over(times[name], times["compact"]) for name in RATIOS if name in times}
    return row | {
        "compact_ms": round(1e3 * statistics.median(times["compact"]), 3),
        **dict.fromkeys(RATIOS, ""),
        **{name: round(middle, 3) for name, (_, middle, _) in ratios.items()},
        **{f"{name}_q1": round(low, 3) for name, (low, _, _) in ratios.items()},
        **{f"{name}_q3": round(high, 3) for name, (_, _, high) in ratios.items()},
        "turns": len(times["compact"]),
        "clock": "cpu" if clock is time.process_time else "wall",
        "load": round(os.getloadavg()[0], 1),
        "wrong": "",
    }


def table(rows: Sequence[Row]) -> str:
    """How many times as fast as each rival a compact step is."""

    def cells(row: Row) -> list[str]:
        head = [f"{LABELS.get(row['model'], row['model'])}, {row['batch']}", *(row[key] for key in KEY[1:])]
        if row["wrong"]:
            return [*head, *["wrong"] * len(RATIOS)]
        return [*head, *(f"{float(row[n]):.3g}x" if row[n] else "none" for n in RATIOS)]

    names = ["as published", "masked", "dense PyTorch", "small dense network", "compact without the extension"]
    return common.markdown(["model, batch", "density", "threads", "kernels", *names], map(cells, rows))


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.rivals", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5, 0.25])
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[1, 2], help="numbers; with more than one, wall time is measured"
    )
    parser.add_argument("--turns", type=int, default=15, help="measurements per rival")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of measurement per cell, about")
    args = parser.parse_args(argv)
    common.check_densities(parser, args.densities)
    if min(args.threads) < 1:
        parser.error(f"--threads must be at least 1; got {args.threads}")
    if args.quick:
        args.models, args.densities, args.turns = ["lenet5"], [0.25], 2
    rows = common.start(args, KEY)
    for threads, model, density in itertools.product(args.threads, args.models, args.densities):
        torch.set_num_threads(threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        case = CASES[model].small() if args.quick else CASES[model]
        common.tell(
            rows, measure(case, density, threads, args.turns, args.budget, clock),
            "{model:9} b{batch} density {density:<4} {threads} threads",
            "compact {compact_ms:8.3f} ms: x{published} published, x{masked} masked, x{dense} dense, "
            "x{small} small, x{plain} without the extension",
        )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

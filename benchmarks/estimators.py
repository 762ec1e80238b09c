"""The price of exactness with the estimator ``identity``: a compact step beside one with ``window``.

    python -m benchmarks.estimators [--models conv4 resnet18] [--densities .5 .25] [--out FILE.csv]

Behind BatchNorm with ``beta > 0`` a pruned filter passes ReLU as a constant, and ``identity`` gives it a gradient: the
row is computed though it is pruned, and what reads it gives it a gradient. Here beta is random, half of it positive, as
it becomes in training; at its initial 0 only the last layer's rows are computed. ``window`` needs pruned rows only
beyond a distance of 1, which none has. Interleaved, one thread; ``macs`` is the ratio of the multiply-accumulates. A
cell is timed only if masked and compact trainer agree with either estimator.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks import common
from benchmarks.cases import CASES, RIVALS, Case, gate
from benchmarks.common import Row

KEY = ("model", "density")
SPREAD = 0.1  # of beta


def warmed(case: Case, density: float) -> nn.Module:
    """The pruned model with betas of both signs."""
    model = case.pruned(density)
    generator = torch.Generator().manual_seed(4)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(m.bias, 0.0, SPREAD, generator=generator)
    return model


def measure(case: Case, density: float, turns: int, seconds: float) -> dict[str, object]:
    """One row: milliseconds per step with either estimator."""
    row: dict[str, object] = {"model": case.model, "batch": case.batch, "density": density}
    cases = {name: dataclasses.replace(case, estimator=name) for name in ("window", "identity")}
    for name, one in cases.items():
        if wrong := gate(one, functools.partial(warmed, one, density), "compact"):
            return row | {"wrong": f"{name}, {wrong}"}
    x, y = next(case.batches(1))
    trainers = {name: RIVALS["compact"](warmed(one, density)) for name, one in cases.items()}
    trainers["masked"] = RIVALS["masked"](warmed(cases["identity"], density))
    for trainer in trainers.values():
        trainer.begin(case.options)
    steps = {name: functools.partial(trainer.step, x, y) for name, trainer in trainers.items()}
    times = common.in_turns(common.evenly(steps), turns, seconds)
    results = {name: trainer.finish() for name, trainer in trainers.items()}
    macs = {name: result.macs / result.steps for name, result in results.items()}
    low, middle, high = common.over(times["identity"], times["window"])
    return row | {
        **{f"{name}_ms": round(1e3 * statistics.median(values), 3) for name, values in times.items()},
        "price": round(middle, 2),
        "price_q1": round(low, 2),
        "price_q3": round(high, 2),
        "macs": round(macs["identity"] / macs["window"], 2),
        "over_masked": round(common.over(times["masked"], times["identity"])[1], 2),
        "turns": len(times["window"]),
        "wrong": "",
    }


def table(rows: Sequence[Row]) -> str:
    """Step times with either estimator."""

    def cells(row: Row) -> list[str]:
        head = [row["model"], row["batch"], row["density"]]
        if row["wrong"]:
            return [*head, "wrong", *[""] * 4]
        return [*head, row["window_ms"], row["identity_ms"], f"{row['price']}x", f"{row['macs']}x", row["masked_ms"]]

    header = [
        "model",
        "batch",
        "density",
        "window, ms",
        "identity, ms",
        "price",
        "price in MACs",
        "masked identity, ms",
    ]
    return common.markdown(header, map(cells, rows))


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.estimators", __doc__)
    models = ["conv4", "resnet18"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--turns", type=int, default=40, help="measurements per rival")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of measurement per cell, about")
    args = parser.parse_args(argv)
    common.check_densities(parser, args.densities)
    if args.quick:
        args.models, args.densities, args.turns = ["conv4"], [0.25], 2
    rows = common.start(args, KEY)
    for model in args.models:
        for density in args.densities:
            case = CASES[model].small() if args.quick else CASES[model]
            row = measure(case, density, args.turns, args.budget)
            common.tell(
                rows, row, "{model:9} b{batch} density {density:<4}",
                "window {window_ms:8.3f} ms  identity {identity_ms:8.3f} ms  x{price} [{price_q1}, {price_q3}]  "
                "MACs x{macs}  masked {masked_ms:8.3f} ms",
            )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

"""Inference after export: the small model against the dense and the masked one.

    python -m benchmarks.inference [--models lenet5 ...] [--batches 1 64] [--densities 1 .5 .25 .1] [--out FILE.csv]

``dense`` is the plain model of full size with the masks burned in (``spafl_kernels.to_dense``), which is what a model
costs without pruning; ``masked`` the model with its threshold layers in eval mode; ``exported`` the small model of
``spafl_kernels.compact.export``. One thread, in turn, ratios within a turn. BatchNorm has random statistics, weights
and biases of both signs, as after training. A cell is timed only if all three give the same outputs, in float64 and
float32.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks import common
from benchmarks.cases import CASES, GATES, Case, differs
from benchmarks.common import Row
from spafl_kernels import to_dense
from spafl_kernels.compact import export

KEY = ("model", "batch", "density")


def trained(case: Case, density: float) -> nn.Module:
    """The pruned model in eval mode; its norms are not at their initial values."""
    model = case.pruned(density)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for t, low in ((m.running_mean, -0.5), (m.running_var, 0.5), (m.weight, 0.5), (m.bias, -0.5)):
                    if t is not None:
                        t.copy_(low + torch.rand(t.shape, generator=generator))
    return model.eval()


def rivals(model: nn.Module, image: tuple[int, ...]) -> dict[str, nn.Module]:
    return {"dense": to_dense(model), "masked": model, "exported": export(model, image)}


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def gate(case: Case, model: nn.Module) -> str:
    """Empty if all rivals give the same outputs, else which does not."""
    for dtype, tolerance in GATES:
        x, _ = next(case.batches(1, dtype))
        outputs = {name: m(x) for name, m in rivals(model.to(dtype), case.image).items()}
        for name, found in outputs.items():
            if wrong := differs(outputs["masked"], found, tolerance):
                return f"{name}: output {wrong}"
    return ""


@torch.no_grad()
def measure(case: Case, batch: int, density: float, turns: int, seconds: float) -> dict[str, object]:
    """One row: milliseconds per batch, and the speed-ups of the exported model."""
    row: dict[str, object] = {"model": case.model, "batch": batch, "density": density}
    if wrong := gate(case, trained(case, density)):
        return row | {"wrong": wrong}
    x = torch.randn(batch, *case.image, generator=torch.Generator().manual_seed(1))
    models = rivals(trained(case, density), case.image)
    calls = {name: functools.partial(model, x) for name, model in models.items()}
    times = common.in_turns(common.evenly(calls), turns, seconds)
    low, middle, high = common.over(times["dense"], times["exported"])
    return row | {
        **{f"{name}_ms": round(1e3 * statistics.median(values), 4) for name, values in times.items()},
        "speedup": round(middle, 2),
        "speedup_q1": round(low, 2),
        "speedup_q3": round(high, 2),
        "over_masked": round(common.over(times["masked"], times["exported"])[1], 2),
        "parameters": round(
            sum(p.numel() for p in models["exported"].parameters())
            / sum(p.numel() for p in models["dense"].parameters()),
            4,
        ),
        "turns": len(times["dense"]),
        "wrong": "",
    }


def table(rows: Sequence[Row]) -> str:
    """Speed-up over the dense model, by model, batch and density."""

    def cell(row: Row) -> str:
        return f"{float(row['speedup']):.3g}x"

    return common.by_density(rows, {"model": lambda r: r["model"], "batch": lambda r: r["batch"]}, cell)


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.inference", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--turns", type=int, default=30, help="measurements per rival")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of measurement per cell, about")
    args = parser.parse_args(argv)
    common.check_densities(parser, args.densities)
    if min(args.batches) < 1:
        parser.error(f"--batches must be positive; got {args.batches}")
    if args.quick:
        args.models, args.batches, args.densities, args.turns = ["lenet5"], [1], [0.5], 3
    rows = common.start(args, KEY)
    for model in args.models:
        for batch in args.batches:
            for density in args.densities:
                row = measure(CASES[model], batch, density, args.turns, args.budget)
                common.tell(
                    rows, row, "{model:9} b{batch:<3} density {density:<4}",
                    "dense {dense_ms:9.4f} ms  masked {masked_ms:9.4f} ms  exported {exported_ms:9.4f} ms  x{speedup} "
                    "[{speedup_q1}, {speedup_q3}]",
                )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

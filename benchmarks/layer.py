"""A threshold layer alone on a CPU: forward and backward on its active filters, beside the masked dense operator.

    python -m benchmarks.layer [--cases 3x3-64 linear-512] [--densities .5 .25] [--out FILE.csv]

The layer gets and gives activations of full width, so it can gain ``1 / density`` at most. It does so where the
gradient of pruned filters is not needed (``window``) or is 0 (``zero``: ``identity`` in front of a ReLU without norm).
Where it is needed (``needed``: ``identity`` elsewhere) the gradient of the weight is dense and
``3 / (1 + 2 density)`` is the most: 1.5 and 2.0 at .5 and .25. CPU time of one thread, in turns. ``chosen`` is what the
layer does by itself (:func:`spafl_kernels.cpu.skip.pays`); the speed-up is that of skipping, chosen or not. A cell is
timed only if outputs and all gradients agree, in float64 and in float32.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.cases import GATES, differs
from benchmarks.common import Row
from spafl_kernels import ThresholdConv2d, ThresholdLinear, backend, explain

KEY = ("case", "layout", "gradient", "density")
GRADIENTS = ("window", "zero", "needed")


class Case(NamedTuple):
    """A layer with as many inputs as outputs; ``size`` is that of the map, ``kernel`` 0 a linear layer."""

    channels: int
    kernel: int
    size: int
    batch: int

    def layer(self, gradient: str, density: float, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        estimator: Any = "window" if gradient == "window" else "identity"
        c = self.channels
        layer: Any = ThresholdLinear(c, c, estimator=estimator)
        if self.kernel:
            layer = ThresholdConv2d(c, c, self.kernel, padding=self.kernel // 2, bias=False, estimator=estimator)
        with torch.no_grad():
            scores = layer.scores()
            factor = torch.full_like(scores, 0.5)
            factor[torch.randperm(c)[round(density * c) :]] = 1.5
            layer.threshold.copy_(scores * factor)
        return layer.to(dtype)

    def tensors(self, layer: Any, gradient: str, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """An input, and a gradient of the output."""
        shape = (self.batch, self.channels, *(2 * (self.size,) if self.kernel else ()))
        generator = torch.Generator().manual_seed(1)
        x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        if gradient == "zero":
            grad[:, ~layer.mask()] = 0
        if layout == "channels last":
            x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
            layer.to(memory_format=torch.channels_last)
        return x.requires_grad_(), grad


CASES = {
    "3x3-64": Case(64, 3, 32, 16),
    "3x3-128": Case(128, 3, 16, 16),
    "3x3-256": Case(256, 3, 8, 16),
    "3x3-64-small": Case(64, 3, 8, 4),
    "3x3-16": Case(16, 3, 32, 16),
    "1x1-256": Case(256, 1, 16, 16),
    "5x5-64": Case(64, 5, 16, 16),
    "linear-512": Case(512, 0, 1, 64),
    "linear-512-tokens": Case(512, 0, 1, 1024),
    "linear-128": Case(128, 0, 1, 64),
}


def step(layer: nn.Module, x: Tensor, grad: Tensor, request: Any) -> list[Tensor]:
    """Output and gradients."""
    parameters = [x, *layer.parameters()]
    with backend.requesting(request):
        y = layer(x)
    return [y, *torch.autograd.grad(y, parameters, grad, allow_unused=True)]


def wrong(case: Case, gradient: str, layout: str, density: float) -> str:
    """Empty if skipping gives what the masked operator gives, else what differs."""
    for dtype, tolerance in GATES:
        layer = case.layer(gradient, density, dtype)
        x, grad = case.tensors(layer, gradient, layout, dtype)
        right, ours = (step(layer, x, grad, request) for request in ("reference", "narrow"))
        names = ("output", "input", *(name for name, _ in layer.named_parameters()))
        for name, a, b in zip(names, right, ours, strict=True):
            scale = max(1.0, float(a.detach().abs().max()))
            if found := differs(a.detach() / scale, b.detach() / scale, tolerance):
                return f"{name} {found}"
    return ""


def measure(name: str, gradient: str, layout: str, density: float, turns: int, seconds: float) -> dict[str, object]:
    """One row: milliseconds of a forward and backward pass."""
    case = CASES[name]
    row: dict[str, object] = {
        "case": name, "channels": case.channels, "kernel": case.kernel, "map": case.size, "batch": case.batch,
        "layout": layout, "gradient": gradient, "density": density,
    }  # fmt: skip
    if found := wrong(case, gradient, layout, density):
        return row | {"wrong": found}
    layer = case.layer(gradient, density, torch.float32)
    x, grad = case.tensors(layer, gradient, layout, torch.float32)
    requests = {"masked": "reference", "skip": "narrow"}
    calls = {key: functools.partial(step, layer, x, grad, request) for key, request in requests.items()}
    times = common.in_turns(common.evenly(calls, time.process_time), turns, seconds)
    low, middle, high = common.over(times["masked"], times["skip"])
    rows = min(1.0, -(-round(density * case.channels) // 8) * 8 / case.channels)
    ideal = 3 / (1 + 2 * rows) if gradient == "needed" else 1 / rows
    return row | {
        **{f"{key}_ms": round(1e3 * statistics.median(values), 3) for key, values in times.items()},
        "speed_up": round(middle, 2),
        "speed_up_q1": round(low, 2),
        "speed_up_q3": round(high, 2),
        "ideal": round(ideal, 2),
        "chosen": "skip" if explain(layer, x).backend == "narrow" else "dense",
        "turns": len(times["skip"]),
        "wrong": "",
    }


def table(rows: Sequence[Row]) -> str:
    """Speed-up and ideal by density; in brackets where the layer does not skip by itself."""
    densities = common.values(rows, "density")
    lines = []
    for key in dict.fromkeys((r["case"], r["layout"], r["gradient"]) for r in rows):
        mine = {r["density"]: r for r in rows if (r["case"], r["layout"], r["gradient"]) == key}
        cells = []
        for density in densities:
            row = mine.get(density)
            if row is None or row["wrong"]:
                cells.append("" if row is None else "wrong")
                continue
            text = f"{row['speed_up']}x of {row['ideal']}x"
            cells.append(text if row["chosen"] == "skip" else f"({text})")
        lines.append([*key, *cells])
    return common.markdown(["layer", "layout", "gradient", *(f"density {d}" for d in densities)], lines)


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.layer", __doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--gradients", nargs="+", choices=GRADIENTS, default=list(GRADIENTS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.9, 0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--turns", type=int, default=31, help="measurements per rival")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of measurement per cell, about")
    args = parser.parse_args(argv)
    common.check_densities(parser, args.densities)
    if args.quick:
        args.cases, args.gradients, args.densities, args.turns = ["linear-128"], ["needed"], [0.5], 2
    rows = common.start(args, KEY)
    for name in args.cases:
        for layout in ("contiguous", "channels last") if CASES[name].kernel > 1 else ("contiguous",):
            for gradient in args.gradients:
                for density in args.densities:
                    row = measure(name, gradient, layout, density, args.turns, args.budget)
                    common.tell(
                        rows, row, "{case:18} {layout:13} {gradient:7} density {density:<4}",
                        "masked {masked_ms:8.3f} ms  skip {skip_ms:8.3f} ms  x{speed_up} "
                        "[{speed_up_q1}, {speed_up_q3}] of {ideal}  {chosen}",
                    )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

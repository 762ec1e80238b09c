"""One training step: masked as published, our masked trainer and the compact trainer, by model and density.

``python -m benchmarks.training_step [--models lenet5 ...] [--densities 1 .5 .25 .1] [--out FILE.csv]``

A step is forward, backward, penalty, clip, update and mask check, in exact semantics. The rivals run in one process,
one thread, in turn; a cell shows medians of the ratio within a turn and the quartiles around them. Before a cell is
timed its trainers take the same steps from the same state, in float64 and float32, and must agree; a cell that does
not is reported as wrong, without a speed. ``ideal`` is the ratio of multiply-accumulates.

``--clock cpu`` measures process CPU time, which neighbours on the machine disturb less than wall time.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spafl.models import build_model
from spafl_kernels import ThresholdConv2d, reference, threshold_layers
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.training import MaskedTrainer, SGDOptions, Trainer

# Model: (input shape, batch, settings of the published runs, estimator of the published code).
SETTINGS: dict[str, tuple[tuple[int, int, int], int, SGDOptions, str]] = {
    "lenet5": ((1, 28, 28), 64, SGDOptions(0.001, 0.9, penalty=0.002, collapse_floor=0.01), "identity"),
    "conv4": ((3, 32, 32), 16, SGDOptions(0.01, 0.9, max_grad_norm=3, penalty=1.5e-4, collapse_floor=0.01), "window"),
    "resnet18": ((3, 32, 32), 16, SGDOptions(0.01, 0.9, max_grad_norm=15, penalty=7e-4, collapse_floor=0.01), "window"),
    "vit": ((3, 32, 32), 16, SGDOptions(0.01, 0.9, max_grad_norm=3, penalty=1e-4, collapse_floor=0.01), "window"),
}


def _materialised_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """A masked layer as the published code writes it: the mask is repeated to the size of the weight."""
    weight, rows = layer.weight, layer.weight.shape[0]
    score = weight.abs().reshape(rows, -1).sum(1) / weight[0].numel()
    mask = reference._Step.apply(score - layer.threshold, layer.estimator)
    layer.ratio = mask.sum() / mask.numel()
    masked = weight * mask.repeat(weight[0].numel(), 1).t().reshape(weight.shape)
    if isinstance(layer, ThresholdConv2d):
        return F.conv2d(x, masked, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, masked, layer.bias)


class PublishedTrainer(Trainer):
    """The published training loop: materialised masks, a loop over layers for the penalty, ``torch.optim.SGD``."""

    engine, reason = "published", "rival"

    def begin(self, options: SGDOptions, momentum=None, densities=None) -> None:
        self._options = options
        for _, layer in threshold_layers(self.model):
            layer.ratio = torch.ones(())
            layer.forward = _materialised_forward.__get__(layer)
        self._optimizer = torch.optim.SGD(self.model.parameters(), options.lr, options.momentum)
        self.model.train()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        for _, layer in threshold_layers(self.model):
            if layer.ratio <= (self._options.collapse_floor or -1):
                layer.threshold.data.zero_()
        loss = self.loss(self.model(x), y)
        penalty = torch.zeros(())
        for _, layer in threshold_layers(self.model):
            penalty = penalty + torch.exp(-layer.threshold).sum()
        self._optimizer.zero_grad()
        (loss + self._options.penalty * penalty).backward()
        if self._options.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._options.max_grad_norm)
        self._optimizer.step()
        return loss.detach()


def pruned_model(name: str, density: float, seed: int = 0) -> nn.Module:
    """A model whose layers have this density, with margins wide enough that no mask changes while it is timed."""
    (channels, *_), _, _, estimator = SETTINGS[name]
    model = build_model(name, 10, channels, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            layer.estimator = estimator
            score = layer.scores()
            order = torch.randperm(len(score), generator=generator)
            factor = torch.full_like(score, 0.3)
            factor[order[round(density * len(score)) :]] = 2.0
            layer.threshold.copy_(score * factor)
    return model


def gate(name: str, density: float, make: Callable[[nn.Module], Trainer]) -> str:
    """Empty if ``make``'s trainer equals the masked one over three steps, else what differs."""
    shape, batch, options, _ = SETTINGS[name]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        models = [pruned_model(name, density).to(dtype) for _ in range(2)]
        generator = torch.Generator().manual_seed(1)
        masked, other = MaskedTrainer(models[0]), make(models[1])
        for trainer in (masked, other):
            trainer.begin(options)
        for _ in range(3):
            x = torch.randn(batch, *shape, generator=generator, dtype=dtype)
            y = torch.randint(0, 10, (batch,), generator=generator)
            a, b = masked.step(x, y), other.step(x, y)
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance):
                return f"loss {b.item()} instead of {a.item()} in {dtype}"
        masked.finish()
        if other.engine != "published":
            other.finish()
        for (key, p), q in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
            if not torch.allclose(p, q, rtol=tolerance, atol=tolerance):
                return f"{key} differs by {(p - q).abs().max().item():.1e} in {dtype}"
    return ""


def measure(name: str, density: float, turns: int, budget: float, clock: Callable[[], float]) -> dict[str, object]:
    """One cell of the table."""
    shape, batch, options, _ = SETTINGS[name]
    rivals: dict[str, Callable[[nn.Module], Trainer]] = {
        "published": PublishedTrainer,
        "masked": MaskedTrainer,
        "compact": lambda model: CompactTrainer(model, strict=True),
    }
    for label in ("published", "compact"):
        if wrong := gate(name, density, rivals[label]):
            return {"model": name, "batch": batch, "density": density, "wrong": f"{label}: {wrong}"}
    base = pruned_model(name, density)
    trainers = {}
    x = torch.randn(batch, *shape)
    y = torch.randint(0, 10, (batch,))
    for label, make in rivals.items():
        trainers[label] = make(copy.deepcopy(base))
        trainers[label].begin(options)
        for _ in range(3):
            trainers[label].step(x, y)
    times: dict[str, list[float]] = {label: [] for label in rivals}
    end = time.monotonic() + budget
    for turn in range(turns):
        for label, trainer in trainers.items():
            # Short steps are repeated, so that every rival gets a similar share of the turn.
            repeat = 1 if not turn else max(1, round(times["published"][0] / max(times[label][0], 1e-9) / 2))
            start = clock()
            for _ in range(repeat):
                trainer.step(x, y)
            times[label].append((clock() - start) / repeat)
        if time.monotonic() > end and turn >= 4:
            break
    macs = {label: trainers[label].finish() for label in ("masked", "compact")}
    # The filters that are needed, without the zero rows that round them up.
    exact = CompactTrainer(pruned_model(name, density), strict=True, multiple=1)
    exact.begin(options)
    exact.step(x, y)
    ideal = macs["masked"].macs / macs["masked"].steps / exact.finish().macs
    ratios = [a / b for a, b in zip(times["published"], times["compact"])][1:]
    own = [a / b for a, b in zip(times["masked"], times["compact"])][1:]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "model": name,
        "batch": batch,
        "density": density,
        "published_ms": round(1e3 * statistics.median(times["published"][1:]), 3),
        "masked_ms": round(1e3 * statistics.median(times["masked"][1:]), 3),
        "compact_ms": round(1e3 * statistics.median(times["compact"][1:]), 3),
        "speedup": round(middle, 2),
        "speedup_q1": round(low, 2),
        "speedup_q3": round(high, 2),
        "over_masked": round(statistics.median(own), 2),
        "ideal": round(ideal, 2),
        "realised": round(middle / ideal, 3),
        "turns": len(ratios),
        "rebuilds": macs["compact"].rebuilds,
        "wrong": "",
    }


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    """All rows so far: a run that is stopped keeps what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SETTINGS), default=["lenet5", "conv4", "resnet18"])
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--turns", type=int, default=40, help="measurements per rival")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds per cell, about")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--out", type=Path, help="CSV file")
    args = parser.parse_args(argv)
    if bad := [d for d in args.densities if not 0 < d <= 1]:
        parser.error(f"--densities must be in (0, 1]; got {bad}")
    torch.set_num_threads(1)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    rows = []
    for name in args.models:
        for density in args.densities:
            row = measure(name, density, args.turns, args.budget, clock)
            rows.append(row | {"clock": args.clock, "torch": torch.__version__})
            if args.out:
                _write(args.out, rows)
            if row["wrong"]:
                print(f"{name} density {density}: WRONG, not timed: {row['wrong']}", flush=True)
            else:
                print(
                    f"{name:9} b{row['batch']} density {density:<4} published {row['published_ms']:9.3f} ms  "
                    f"compact {row['compact_ms']:8.3f} ms  x{row['speedup']:<5} "
                    f"[{row['speedup_q1']}, {row['speedup_q3']}]  "
                    f"ideal x{row['ideal']:<5} realised {row['realised']:.0%}",
                    flush=True,
                )
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

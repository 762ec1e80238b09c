"""Peak memory of training: compact, masked and as published, each in a fresh process.

    python -m benchmarks.memory [--models lenet5 ...] [--densities 1 .5 .25] [--repeats 3] [--out FILE.csv]

A figure is the largest resident memory while a few steps are trained (``ru_maxrss``) beyond what was resident after
import, construction of the model and two steps of a tiny one (which load the libraries' code): momentum, gradients,
activations, compact copies, and what operators allocate. The high-water mark is set back to the present before
training (Linux). Medians over processes; all must end with the same loss and the same sum of thresholds, or nothing is
reported.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks import common
from benchmarks.cases import CASES, GATES, RIVALS
from benchmarks.common import Row
from spafl_kernels import ThresholdConv2d, ThresholdLinear, threshold_layers
from spafl_kernels.training import SGDOptions

KEY = ("model", "density")
STEPS = 4
NAMES = ("published", "masked", "compact")


def _touch(rival: str) -> None:
    """Two steps of a tiny model, so that the pages of the libraries' code are resident already."""
    model = nn.Sequential(
        ThresholdConv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), ThresholdLinear(36, 2)
    )
    trainer = RIVALS[rival](model)
    trainer.begin(SGDOptions(0.01, 0.9, max_grad_norm=1.0, penalty=0.01, collapse_floor=0.01))
    for _ in range(2):
        trainer.step(torch.ones(2, 1, 8, 8), torch.tensor([0, 1]))
    trainer.finish()


def train(model: str, density: float, rival: str, batch: int) -> dict[str, float]:
    """What a child process does: its peak in bytes, and what it computed."""
    torch.set_num_threads(1)
    case = CASES[model]
    data = [(x[:batch], y[:batch]) for x, y in case.batches(STEPS)]
    trainer = RIVALS[rival](case.pruned(density))
    _touch(rival)
    Path("/proc/self/clear_refs").write_text("5")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    trainer.begin(case.options)
    for x, y in data:
        loss = trainer.step(x, y)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trainer.finish()
    thresholds = sum(layer.threshold.double().sum().item() for _, layer in threshold_layers(trainer.model))
    return {"peak": peak - before, "loss": loss.item(), "thresholds": thresholds}


def run_child(model: str, density: float, rival: str, batch: int) -> dict[str, float]:
    """:func:`train` in a process of its own."""
    call = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps([model, density, rival, batch])]
    done = subprocess.run(call, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"benchmarks.memory: {rival} on {model} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, density: float, batch: int, repeats: int) -> dict[str, object]:
    """One row: megabytes by rival, and ours over theirs."""
    row: dict[str, object] = {"model": model, "batch": batch, "density": density}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for _ in range(repeats):
        for name in NAMES:
            found[name].append(run_child(model, density, name, batch))
    tolerance = GATES[-1][1]
    expected = found["masked"][0]
    for name in NAMES:
        for key in ("loss", "thresholds"):
            for one in found[name]:
                if abs(one[key] - expected[key]) > tolerance * max(1.0, abs(expected[key])):
                    return row | {"wrong": f"{name}: {key} {one[key]} instead of {expected[key]}"}
    peak = {name: statistics.median(one["peak"] for one in found[name]) for name in NAMES}
    spread = max(max(one["peak"] for one in found[n]) - min(one["peak"] for one in found[n]) for n in NAMES)
    return row | {
        **{f"{name}_mb": round(value / 1e6, 1) for name, value in peak.items()},
        "spread_mb": round(spread / 1e6, 1),
        "of_masked": round(peak["compact"] / peak["masked"], 3),
        "of_published": round(peak["compact"] / peak["published"], 3),
        "wrong": "",
    }


def table(rows: Sequence[Row]) -> str:
    """Megabytes beyond the model, by model and density."""

    def cells(row: Row) -> list[str]:
        head = [row["model"], row["batch"], row["density"]]
        if row["wrong"]:
            return [*head, "wrong", "", "", ""]
        share = f"{float(row['of_masked']):.0%}"
        return [*head, *(row[f"{name}_mb"] for name in NAMES), share]

    header = ["model", "batch", "density", "as published, MB", "masked, MB", "compact, MB", "of masked"]
    return common.markdown(header, map(cells, rows))


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.memory", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5, 0.25])
    parser.add_argument("--repeats", type=int, default=3, help="processes per rival")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(train(*args.child)))
        return 0
    common.check_densities(parser, args.densities)
    if args.quick:
        args.models, args.densities, args.repeats = ["lenet5"], [0.5], 1
    rows = common.start(args, KEY)
    for model in args.models:
        for density in args.densities:
            row = measure(model, density, CASES[model].batch, args.repeats)
            common.tell(
                rows, row, "{model:9} b{batch} density {density:<4}",
                "published {published_mb} MB  masked {masked_mb} MB  compact {compact_mb} MB ({of_masked:.0%} of "
                "masked)  spread {spread_mb} MB",
                "reported",
            )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

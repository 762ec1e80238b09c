"""Whole federated rounds as density falls: compact engine, masked engine, and training as published.

    python -m benchmarks.federated [--settings fmnist cifar10] [--densities 1 .75 .5 .25 .1] [--rounds 2]
                                   [--samples 6000] [--out FILE.csv] [--plot FILE.png]

The published settings (LeNet-5, batch 64, identity estimator; Conv4, batch 16, window, clip 3; 100 clients, 10 a round,
5 local epochs, Dirichlet .2 and .1) on synthetic data of that shape, with fewer samples than the real sets so that a
round is short: what a round costs per client weighs more here than in a full run. Thresholds are raised between rounds
so that the density falls to the wanted one; training moves masks from there, and the density shown was measured.

Rivals run the same rounds in turn, round by round: ``compact`` and ``masked`` with two workers of one thread,
``published`` in one process with two threads, masks materialised as in the published code. On a busy machine the two
threads wait for one another, so run it on an idle one. A round is reported only if all rivals end it with the same
thresholds (to float32 rounding).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_step import _materialised_forward
from spafl.config import resolve_config
from spafl.simulation.loop import Simulation
from spafl.simulation.pool import Pool
from spafl.simulation.runfolder import RunFolder
from spafl_kernels import threshold_layers
from spafl_kernels.training import MaskedTrainer

COLUMNS = ("setting", "target", "density", "round", "published_s", "masked_s", "compact_s", "vs_published", "vs_masked")
SETTINGS: dict[str, dict[str, Any]] = {
    "fmnist": {
        "data": {"image": 28, "channels": 1},
        "partition": {"alpha": 0.2},
        "model": {"name": "lenet5"},
        "algorithm": {"name": "spafl", "variant": "fmnist"},
    },
    "cifar10": {
        "data": {"image": 32, "channels": 3},
        "partition": {"alpha": 0.1, "min_train": 16},
        "model": {"name": "conv4"},
        "algorithm": {"name": "spafl", "variant": "cifar10"},
    },
}
# Rival: (engine, workers, threads).
RIVALS = {"published": ("masked", 1, 2), "masked": ("masked", 2, 1), "compact": ("compact", 2, 1)}
TOLERANCE = 1e-3
LINES = (("compact", "#0072B2", "-"), ("masked", "#D55E00", "--"), ("published", "#666666", ":"))


class Rival:
    """One simulation that is advanced a round at a time."""

    def __init__(self, name: str, setting: str, samples: int, folder: Path) -> None:
        engine, workers, self.threads = RIVALS[name]
        tables = SETTINGS[setting]
        config = resolve_config(
            {
                **tables,
                "rounds": 10**6,
                "data": {"name": "synthetic", "classes": 10, "train": samples, "test": 500, **tables["data"]},
                "partition": {"scheme": "dirichlet", "clients": 100, **tables["partition"]},
                "evaluation": {"every": 10**6},
                "simulation": {"workers": workers, "engine": engine, "device": "cpu", "checkpoint_every": 10**6},
            }
        )
        self.folder = RunFolder(folder / name, resume=False)
        self.simulation = Simulation(config, self.folder, quiet=True)
        self.pool = Pool(self.simulation._worker_setup(), workers)
        if name == "published":
            assert self.pool._own is not None
            resident = self.pool._own.resident
            for _, layer in threshold_layers(resident.model):
                layer.forward = _materialised_forward.__get__(layer)  # type: ignore[attr-defined]
            resident.trainer = MaskedTrainer(resident.model, reason="as published")
        self.round = 0

    def raise_thresholds(self, density: float) -> None:
        """Set the global thresholds to the scores' quantiles of the initial model."""
        for name, layer in threshold_layers(self.simulation.problem.model):
            # The last layer stays as it is: without its neurons there is no class to predict.
            last = name in ("fc4", "dense3")
            scores = layer.scores()
            level = 0.0 if last or density >= 1 else torch.quantile(scores, 1 - density).item()
            self.simulation.server[f"{name}.threshold"] = torch.full_like(scores, level)

    def run_round(self) -> tuple[float, float]:
        """``(seconds, mean density of the clients that trained)``."""
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        line = self.simulation._round(self.pool, self.round)
        seconds = time.perf_counter() - start
        torch.set_num_threads(1)
        self.round += 1
        return seconds, line["figures"]["density"]

    def close(self) -> None:
        self.pool.close()
        self.folder.close()


def measure(setting: str, densities: list[float], rounds: int, samples: int) -> list[dict[str, Any]]:
    """Rows of :data:`COLUMNS`, one per round."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rivals = {name: Rival(name, setting, samples, Path(folder)) for name in RIVALS}
        try:
            for rival in rivals.values():
                rival.run_round()  # warm-up: processes start, kernels are chosen
            for target in densities:
                for rival in rivals.values():
                    rival.raise_thresholds(target)
                for number in range(rounds):
                    seconds, found = {}, {}
                    for name, rival in rivals.items():
                        seconds[name], found[name] = rival.run_round()
                    wrong = gate({name: rival.simulation.server for name, rival in rivals.items()})
                    row: dict[str, Any] = {"setting": setting, "target": target, "round": number}
                    if wrong:
                        print(f"{setting} at {target}: no speed reported, {wrong}", file=sys.stderr)
                        continue
                    row |= {f"{name}_s": round(value, 3) for name, value in seconds.items()}
                    row["density"] = round(found["compact"], 3)
                    row["vs_published"] = round(seconds["published"] / seconds["compact"], 2)
                    row["vs_masked"] = round(seconds["masked"] / seconds["compact"], 2)
                    rows.append(row)
                    print("  ".join(f"{column} {row[column]}" for column in COLUMNS), flush=True)
        finally:
            for rival in rivals.values():
                rival.close()
    return rows


def gate(servers: dict[str, dict[str, torch.Tensor]]) -> str:
    """Empty if all rivals hold the same global thresholds to float32 rounding, else what differs."""
    reference = servers["masked"]
    for name, server in servers.items():
        for key, expected in reference.items():
            if key.endswith(".threshold") and not torch.allclose(server[key], expected, rtol=TOLERANCE, atol=1e-5):
                return f"{name} differs from masked in {key} by {(server[key] - expected).abs().max():.1e}"
    return ""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Rounds per minute against measured density."""
    from matplotlib.figure import Figure

    settings = sorted({row["setting"] for row in rows})
    figure = Figure(figsize=(4.5 * len(settings), 3.6), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings):
        for name, colour, style in LINES:
            mine = [row for row in rows if row["setting"] == setting]
            targets = sorted({row["target"] for row in mine})
            x = [statistics.median(r["density"] for r in mine if r["target"] == t) for t in targets]
            y = [60 / statistics.median(r[f"{name}_s"] for r in mine if r["target"] == t) for t in targets]
            axes.plot(x, y, style, color=colour, marker="o", label=name)
        axes.set_title(setting)
        axes.set_xlabel("density (mean over layers and clients)")
        axes.set_ylabel("rounds per minute")
        axes.set_yscale("log")
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federated", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--rounds", type=int, default=2, help="rounds per density")
    parser.add_argument("--samples", type=int, default=6000, help="training samples of all 100 clients together")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    args = parser.parse_args()
    rows = [row for setting in args.settings for row in measure(setting, args.densities, args.rounds, args.samples)]
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if args.plot and rows:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Your own model, data, partition, algorithm and callback, in one script.

    python examples/own_parts.py [folder]

The data are handwritten digits of unequal quality: every client's images are dimmed by its own factor. The algorithm is
FedAvg of everything but the last layer, weighted equally; each part is named by the class or function itself. In a
configuration file they would be import paths: ``model.name = "own_parts:Net"``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from sklearn.datasets import load_digits
from torch import Tensor, nn

import spafl
from spafl.algorithms import Upload
from spafl.algorithms.fedper import FedPer, FedPerOptions
from spafl.callbacks import Callback, Round
from spafl.wire import Message

USERS = 8


class Net(nn.Module):
    """Gets what it has parameters for: the number of classes, of channels, and its options."""

    def __init__(self, classes: int, in_channels: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        return self.head(self.conv2(x).relu().flatten(1))


def digits(seed: int = 0) -> tuple[np.ndarray, ...]:
    """Images (n, 8, 8) as floats and labels, for training and testing; sample i is user i % USERS's."""
    stored = load_digits()
    x, y = stored.images.astype(np.float32) / 16, stored.target
    dimmed = np.random.default_rng(seed).uniform(0.3, 1.0, USERS).astype(np.float32)
    x *= dimmed[np.arange(len(x)) % USERS, None, None]
    return x[:1400, None], y[:1400], x[1400:, None], y[1400:]


def by_user(labels: Sequence[np.ndarray], clients: int) -> list[np.ndarray]:
    """Which client every training and every test sample belongs to."""
    starts = (0, len(labels[0]))
    return [(start + np.arange(len(y))) % USERS % clients for start, y in zip(starts, labels)]


class EqualOptions(FedPerOptions):
    share: float = Field(default=1.0, gt=0, le=1)
    """How far the server moves towards the mean."""


class Equal(FedPer):
    """Clients count equally, however much data they have, and keep their last layer."""

    Options = EqualOptions
    options: EqualOptions

    def merge(
        self, server: dict[str, Tensor], round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[dict[str, Tensor], Message]:
        alike = [Upload(upload.client, upload.message, 1) for upload in uploads]
        merged, announcement = super().merge(server, round, alike, clients)
        share = self.options.share
        return {name: server[name].lerp(tensor, share) for name, tensor in merged.items()}, announcement


class Worst(Callback):
    """Prints who is worst off."""

    def on_round(self, round: Round) -> None:
        if rows := round.clients():
            worst = min(rows, key=lambda row: row["accuracy"])
            print(f"round {round.number}: client {worst['client']} has {worst['accuracy']:.3f}")


CONFIG: dict[str, Any] = {
    "name": "own",
    "rounds": 10,
    "data": {"name": digits, "options": {"seed": 3}},
    "partition": {"scheme": by_user, "clients": USERS},
    "model": {"name": Net, "options": {"width": 12}},
    "algorithm": {"name": Equal, "options": {"share": 0.8}},
    "training": {"lr": 0.05, "batch_size": 16, "epochs": 1},
    "sampling": {"clients_per_round": 4},
    "evaluation": {"every": 5},
    "simulation": {"workers": 1},
}


def main(folder: Path) -> spafl.RunResult:
    run = spafl.run(CONFIG, folder / "own", callbacks=[Worst()])
    print(run)
    return run


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="spafl-own-")))

"""What thresholds tell the server of its clients' labels: how well a label distribution is guessed from uploads.

    python -m benchmarks.leakage [--seeds 1 2 3 4 5] [--rounds 30] [--out FILE.csv]

Digits over 60 clients with uneven label mixes (Dirichlet .3), all of them in every round. The attacker is the server:
it sees each upload's difference from what it had sent, averaged over the rounds so far, and knows the labels of half of
the clients (its own, say). Ridge regression from the one to the other, its strength chosen by leave-one-out among the
known half, then guesses the other half. ``distance`` is the total variation distance of guess and truth, from 0 to 1,
``top`` how often the most frequent label is right. Beside them chance: ``blind`` and ``blind_top`` are of the known
clients' mean distribution, which needs no uploads; ``shuffled`` and ``shuffled_top`` are of the same attack on uploads
that were dealt to the wrong clients, mean of 20 deals. One simple attack is a lower bound of what uploads tell.
Nothing is timed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Row
from spafl.algorithms.spafl import SpaFL
from spafl.config import resolve_config
from spafl.simulation import run

KEY = ("algorithm", "seed", "rounds")
CLIENTS = 60
DEALS = 20
STRENGTHS = 10.0 ** np.arange(-3, 4)

_seen: list[np.ndarray] = []  # (clients, thresholds) of each round


class Watched(SpaFL):
    """SpaFL whose server keeps what it sees."""

    def merge(self, server: Any, round: int, uploads: Any, clients: int) -> Any:
        names = [name for name in server if name.endswith(".threshold")]
        _seen.append(np.stack([np.concatenate([(u.message[n] - server[n]).numpy() for n in names]) for u in uploads]))
        return super().merge(server, round, uploads, clients)


def watch(seed: int, rounds: int, clients: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences ``(rounds, clients, thresholds)`` that the server saw; true label shares ``(clients, classes)``."""
    _seen.clear()
    config = resolve_config(
        {
            "name": "leakage", "seed": seed, "rounds": rounds, "data": {"name": "digits"}, "model": {"name": "lenet5"},
            "partition": {"clients": clients, "alpha": 0.3, "min_train": 8, "min_test": 1},
            "algorithm": {"name": "benchmarks.leakage:Watched", "variant": "paper", "penalty": 0.003},
            "training": {"lr": 0.02, "lr_decay": 0.95, "batch_size": 16, "epochs": 3},
            "sampling": {"clients_per_round": clients},
            "evaluation": {"every": rounds, "train_data": "never"},
            "simulation": {"workers": 1, "device": "cpu", "checkpoint_every": rounds},
        }
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run(config, Path(folder) / "run", quiet=True)
        counts = np.array(json.loads((Path(folder) / "run" / "partition.json").read_text())["train"], dtype=float)
    # Under its import path the module is another one than __main__, with a list of its own.
    from benchmarks import leakage

    seen = np.stack(leakage._seen)
    leakage._seen.clear()
    return seen, counts / counts.sum(axis=1, keepdims=True)


def guess(features: np.ndarray, shares: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Guessed label shares of the clients that are not ``known``, from features ``(clients, f)``."""
    centre, spread = features[known].mean(0), features[known].std(0) + 1e-12
    x, mean = (features - centre) / spread, shares[known].mean(0)
    y = shares[known] - mean
    gram = x[known] @ x[known].T / x.shape[1]
    errors = []
    for strength in STRENGTHS:
        hat = gram @ np.linalg.inv(gram + strength * np.eye(len(gram)))
        errors.append((((y - hat @ y) / (1 - np.diag(hat))[:, None]) ** 2).mean())  # leave-one-out, in closed form
    inverse = np.linalg.inv(gram + STRENGTHS[int(np.argmin(errors))] * np.eye(len(gram)))
    found = np.clip(mean + x[~known] @ x[known].T / x.shape[1] @ inverse @ y, 0, None)
    return found / found.sum(axis=1, keepdims=True)


def score(guessed: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Mean total variation distance, and share of clients whose most frequent label is right."""
    return float(np.abs(guessed - truth).sum(1).mean() / 2), float((guessed.argmax(1) == truth.argmax(1)).mean())


def measure(seen: np.ndarray, shares: np.ndarray, rounds: int, seed: int) -> dict[str, object]:
    """One row: the attack after so many rounds."""
    draws = np.random.default_rng(seed)
    known = np.zeros(len(shares), dtype=bool)
    known[draws.permutation(len(shares))[: len(shares) // 2]] = True
    features, truth = seen[:rounds].mean(axis=0), shares[~known]
    dealt = [score(guess(draws.permutation(features), shares, known), truth) for _ in range(DEALS)]
    found = {
        "": score(guess(features, shares, known), truth),
        "blind": score(np.broadcast_to(shares[known].mean(0), truth.shape), truth),
        "shuffled": tuple(np.mean(dealt, axis=0)),
    }
    row: dict[str, object] = {"algorithm": "spafl", "seed": seed, "rounds": rounds}
    for name, (distance, top) in found.items():
        row |= {name or "distance": round(float(distance), 3), f"{name}_top" if name else "top": round(float(top), 3)}
    return row | {"wrong": ""}


def table(rows: Sequence[Row]) -> str:
    """Mean over seeds by number of rounds."""
    lines = []
    for rounds in dict.fromkeys(row["rounds"] for row in rows):
        group = [row for row in rows if row["rounds"] == rounds]

        def mean(column: str, group: Sequence[Row] = group) -> str:
            values = [float(row[column]) for row in group]
            return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.2f}"

        columns = ("distance", "blind", "shuffled", "top", "blind_top", "shuffled_top")
        lines.append([rounds, *map(mean, columns)])
    header = [
        "rounds seen", "distance", "knowing the mean", "shuffled", "top label", "knowing the mean", "shuffled",
    ]  # fmt: skip
    return common.markdown(header, lines)


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.leakage", __doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args(argv)
    clients = CLIENTS
    if args.quick:
        args.seeds, args.rounds, clients = [1], 1, 10
    rows = common.start(args, KEY)
    for seed in args.seeds:
        seen, shares = watch(seed, args.rounds, clients)
        for rounds in [r for r in (1, 5, 15, 30) if r <= args.rounds]:
            common.tell(
                rows, measure(seen, shares, rounds, seed), "seed {seed} after {rounds:2} rounds",
                "distance {distance} (without uploads {blind})  top label {top} ({blind_top})", "measured",
            )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

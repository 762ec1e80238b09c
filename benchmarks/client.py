"""What a client's process needs: peak resident memory and one-core seconds of a Conv4 client, dense beside it.

    python -m benchmarks.client [--turns 3] [--samples 500] [--out FILE.csv]

CIFAR-10's shape, 500 samples, one local epoch in batches of 16, on one core. Every figure is of a process of its own
(:mod:`benchmarks.client_process`), as Flower starts one for every message; cases take turns, figures are medians.
Seconds are of the processor, not of the clock: ``start`` until the client is there (imports, data, model), ``round0``
the first round of a process, in which the compact engine looks at the model, ``round1`` a further one. ``torch_mb`` is
the peak once PyTorch is imported. ``spafl D`` begins with the share D of its filters.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Row
from spafl.config import resolve_config

KEY = ("case",)


def _spafl(density: float) -> dict[str, Any]:
    return {"name": "spafl", "penalty": 0.0, "initial_density": density, "importance": "none"}


CASES: dict[str, dict[str, Any]] = {
    "dense (FedAvg)": {"algorithm": {"name": "fedavg"}},
    "spafl 1, masked": {"algorithm": _spafl(1.0), "simulation": {"engine": "masked"}},
    "spafl 0.5": {"algorithm": _spafl(0.5)},
    "spafl 0.25": {"algorithm": _spafl(0.25)},
}
# Digits that are kept.
COLUMNS = {
    "torch_mb": 0, "peak_mb": 0, "start_seconds": 2, "round0_seconds": 2, "round1_seconds": 2, "density": 3,
    "up_bytes": 0,
}  # fmt: skip


def settings(case: str, samples: int) -> dict[str, Any]:
    """The configuration of a case, as plain tables."""
    tables: dict[str, Any] = {
        "name": "client", "seed": 1, "rounds": 2,
        "data": {"name": "synthetic", "image": 32, "channels": 3, "classes": 10, "train": samples, "test": 100},
        "partition": {"scheme": "iid", "clients": 1},
        "model": {"name": "conv4"},
        "training": {"lr": 0.001, "batch_size": 16, "epochs": 1},
        "sampling": {"clients_per_round": 1},
    }  # fmt: skip
    changed = {**tables, **CASES[case]}
    changed["simulation"] = {"device": "cpu", "engine": "auto", **changed.get("simulation", {})}
    return resolve_config(changed).model_dump(mode="json", exclude_none=True)


def measure(case: str, samples: int) -> dict[str, Any]:
    """One process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.client_process", json.dumps(settings(case, samples)), folder]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: Sequence[Row]) -> str:
    """One line a case."""
    lines = [
        [
            row["case"], row["density"], row["peak_mb"], row["torch_mb"], row["start_seconds"], row["round0_seconds"],
            row["round1_seconds"], f"{int(row['up_bytes']):,}",
        ]
        for row in common.right(rows)
    ]  # fmt: skip
    header = [
        "client", "density", "peak MB", "of it PyTorch", "start, s", "first round, s", "next round, s", "upload, B",
    ]  # fmt: skip
    return common.markdown(header, lines)


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.client", __doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--samples", type=int, default=500)
    args = parser.parse_args(argv)
    if args.turns < 1 or args.samples < 1:
        parser.error(f"--turns and --samples must be at least 1; got {args.turns} and {args.samples}")
    cases = list(CASES)
    if args.quick:
        args.turns, args.samples, cases = 1, 16, cases[-1:]
    rows = common.start(args, KEY)
    seen: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(args.turns):
        for case in cases:
            seen[case].append(measure(case, args.samples))
    for case, found in seen.items():
        medians = {c: round(statistics.median(f[c] for f in found), digits or None) for c, digits in COLUMNS.items()}
        imported = sorted({name for f in found for name in f["imported"]})
        row = {"case": case, "samples": args.samples, "turns": args.turns, **medians}
        row["wrong"] = f"the process imported {', '.join(imported)}" if imported else ""
        common.tell(
            rows, row, "{case:16}", "peak {peak_mb} MB  {round0_seconds} s, then {round1_seconds} s", "reported"
        )
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

"""What a second worker process gives: seconds of federated rounds with one worker and with two.

    python -m benchmarks.workers [--densities 1 .5] [--rounds 4] [--out FILE.csv]

The compact engine on synthetic data in the setting of the published Fashion-MNIST runs (see ``benchmarks.federated``),
10 clients a round, one thread per process. The rounds run in turn, begun by one and the other, and end with identical
thresholds (every bit), or nothing is reported. The bound is the number of idle cores; a round's longest client and the
merging between rounds keep it from that.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.common import Row
from benchmarks.federated import Rival, Style

KEY = ("setting", "target")
SETTING = "fmnist"
COUNTS = (1, 2)


def same(rivals: dict[int, Rival]) -> str:
    """Empty if both hold identical thresholds, else which differs."""
    one, two = (rivals[count].thresholds for count in COUNTS)
    for name, value in one.items():
        if not torch.equal(value, two[name]):
            return f"{name} differs by {(value - two[name]).abs().max():.1e} between one and two workers"
    return ""


def measure(rivals: dict[int, Rival], target: float, rounds: int) -> dict[str, object]:
    """One row: seconds per round by number of workers."""
    row: dict[str, object] = {"setting": SETTING, "target": target, "cores": len(os.sched_getaffinity(0))}
    for rival in rivals.values():
        rival.raise_thresholds(target)
    seconds: dict[int, list[float]] = {count: [] for count in COUNTS}
    densities = []
    for number in range(rounds):
        for count in COUNTS if number % 2 else COUNTS[::-1]:
            done = rivals[count].run_round()
            seconds[count].append(done.seconds)
        densities.append(done.density)
        if wrong := same(rivals):
            return row | {"wrong": wrong}
    low, middle, high = common.over(seconds[1], seconds[2])
    return row | {
        "density": round(statistics.median(densities), 3),
        "one_s": round(statistics.median(seconds[1]), 3),
        "two_s": round(statistics.median(seconds[2]), 3),
        "speedup": round(middle, 2),
        "speedup_q1": round(low, 2),
        "speedup_q3": round(high, 2),
        "rounds": rounds,
        "wrong": "",
    }


def table(rows: Sequence[Row]) -> str:
    """Seconds per round with one and with two workers."""

    def cells(row: Row) -> list[str]:
        if row["wrong"]:
            return [row["setting"], row["target"], "wrong", "", ""]
        return [row["setting"], f"{float(row['density']):.2f}", row["one_s"], row["two_s"], f"{row['speedup']}x"]

    return common.markdown(["setting", "density", "one worker, s", "two workers, s", "speed-up"], map(cells, rows))


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.workers", __doc__)
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5])
    parser.add_argument("--rounds", type=int, default=4, help="rounds per density")
    parser.add_argument("--samples", type=int, default=60_000, help="training samples of all 100 clients together")
    args = parser.parse_args(argv)
    common.check_densities(parser, args.densities)
    if args.quick:
        args.densities, args.rounds, args.samples = [0.5], 1, 1500
    rows = common.start(args, KEY)
    rivals: dict[int, Rival] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for count in COUNTS:
                rivals[count] = Rival(SETTING, Style("compact", count, 1), Path(folder) / str(count), args.samples)
                rivals[count].run_round()  # warm-up: processes start, kernels are chosen
            for target in args.densities:
                common.tell(
                    rows, measure(rivals, target, args.rounds), "{setting} at {target:<4g}",
                    "density {density:<5}  one worker {one_s} s  two {two_s} s  "
                    "x{speedup} [{speedup_q1}, {speedup_q3}]",
                    "reported",
                )  # fmt: skip
        finally:
            for rival in rivals.values():
                rival.close()
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

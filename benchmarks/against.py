"""A training step before and after a change: this checkout beside another commit, in turns, with an interval.

    python -m benchmarks.against COMMIT [--models lenet5 ...] [--densities 1 .5 .25] [--out FILE.csv]

Each version has a process of its own, which waits while the other one computes; within a turn both are timed. Where a
process has its memory makes a percent or two that no number of turns takes away, so there are several pairs of
processes. A cell is the geometric mean over pairs of the pair's mean ratio, time before over time now, with its 95 %
interval by Student's t of the pairs' logarithms. The command fails if an interval begins below .97. The other commit is
unpacked into a temporary folder; its extension is this one's where the sources are the same, and built otherwise.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.cases import CASES
from benchmarks.commit import ROOT, commit
from benchmarks.common import Row
from benchmarks.training_step import LABELS
from spafl.table import half_width

KEY = ("model", "density", "before")
Times = tuple[float, float]  # before, now
LEAST = 0.97
BUILT = ("_C.abi3.so", "_build.json")
# Runs in either version, so it asks only for what both have.
CHILD = """
import dataclasses, json, sys, time
import torch
torch.set_num_threads(1)
from benchmarks.cases import CASES, RIVALS
known = {}
for line in sys.stdin:
    model, density, steps = json.loads(line)
    case = CASES[model]
    if (model, density) not in known:
        known.clear()
        trainer = RIVALS["compact"](case.pruned(density))
        trainer.begin(dataclasses.replace(case.options, lr=1e-6))
        known[model, density] = trainer, next(case.batches(1))
        for _ in range(3):
            trainer.step(*known[model, density][1])
    trainer, batch = known[model, density]
    begin = time.process_time()
    for _ in range(steps):
        trainer.step(*batch)
    print(json.dumps((time.process_time() - begin) / steps), flush=True)
"""


class Version:
    """A process that times steps of the sources in ``root``."""

    def __init__(self, root: Path) -> None:
        paths = os.pathsep.join((str(root), str(root / "python")))
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            cwd=root,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, model: str, density: float, steps: int) -> float:
        """Processor time of a step, the mean of ``steps``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([model, density, steps]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that timed {model} has ended with status {self._process.wait()}")
        return float(json.loads(answer))

    def close(self) -> None:
        self._process.communicate()


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


@contextlib.contextmanager
def unpacked(revision: str) -> Iterator[Path]:
    """A folder with the sources of a commit, and its extension if this checkout has one."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with tarfile.open(fileobj=io.BytesIO(git("archive", revision))) as archive:
            archive.extractall(root, filter="data")
        if all((ROOT / "spafl_kernels" / name).exists() for name in BUILT):
            if git("diff", "--name-only", revision, "--", "csrc", "setup.py"):
                subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=root, check=True)
            else:
                for name in BUILT:
                    shutil.copy(ROOT / "spafl_kernels" / name, root / "spafl_kernels")
        yield root


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Lower end, geometric mean and upper end of the 95 % interval."""
    logs = [math.log(ratio) for ratio in ratios]
    middle, half = statistics.fmean(logs), half_width(logs)
    return math.exp(middle - half), math.exp(middle), math.exp(middle + half)


def pair(before: Version, now: Version, model: str, density: float, turns: int, seconds: float) -> list[Times]:
    """Seconds of a step before and now, by turn; a turn takes about ``seconds`` of both versions together."""
    first = [version.seconds(model, density, 1) for version in (before, now)]
    steps = max(1, round(seconds / sum(first)))
    times = []
    for turn in range(turns):
        order = (before, now) if turn % 2 else (now, before)
        found = {id(version): version.seconds(model, density, steps) for version in order}
        times.append((found[id(before)], found[id(now)]))
    return times


def cell(model: str, density: float, pairs: Sequence[Sequence[Times]]) -> dict[str, object]:
    """One row, of the times of all pairs of processes."""
    low, middle, high = interval([statistics.geometric_mean([a / b for a, b in times]) for times in pairs])
    every = [time for times in pairs for time in times]
    return {
        "model": model,
        "density": density,
        "before_ms": round(1e3 * statistics.median(a for a, _ in every), 3),
        "now_ms": round(1e3 * statistics.median(b for _, b in every), 3),
        "speedup": round(middle, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "pairs": len(pairs),
        "turns": len(every),
        "load": round(os.getloadavg()[0], 1),
        "wrong": "",
    }


def missed(rows: Sequence[Row]) -> list[str]:
    """The cells that are not known to be as fast as before, a line each."""
    return [
        f"{row['model']} at density {row['density']}: at least {float(row['low']):.3f} times as fast as {row['before']}"
        for row in rows
        if float(row["low"]) < LEAST
    ]


def table(rows: Sequence[Row]) -> str:
    """Speed-up over the other commit with its interval, by model and density."""

    def cell(row: Row) -> str:
        return "{:.2f}x ({:.2f} to {:.2f})".format(*(float(row[name]) for name in ("speedup", "low", "high")))

    return common.by_density(rows, {"model": lambda r: LABELS.get(r["model"], r["model"])}, cell)


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.against", __doc__)
    parser.add_argument("revision", metavar="COMMIT", help="what git knows it by")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--pairs", type=int, default=6, help="pairs of processes, one after the other")
    parser.add_argument("--turns", type=int, default=5, help="measurements of a cell by a pair")
    parser.add_argument("--seconds", type=float, default=0.5, help="of one measurement, both versions, about")
    args = parser.parse_args(argv)
    common.check_densities(parser, args.densities)
    if args.quick:
        args.models, args.densities, args.pairs, args.turns, args.seconds = ["lenet5"], [0.5], 2, 2, 0.01
    if args.pairs < 2 or args.turns < 1:
        parser.error("--pairs must be at least 2, an interval needs them, and --turns at least 1")
    try:
        name = git("rev-parse", "--short", "--verify", f"{args.revision}^{{commit}}").decode().strip()
    except subprocess.CalledProcessError:
        parser.error(f"git knows no commit {args.revision!r} here")
    rows = common.start(args, KEY)
    print(f"{commit()} beside {name}", flush=True)
    cells = list(itertools.product(args.models, args.densities))
    times: dict[tuple[str, float], list[list[Times]]] = {one: [] for one in cells}
    with unpacked(name) as root:
        for number in range(args.pairs):
            before, now = Version(root), Version(ROOT)
            try:
                for one in cells:
                    times[one].append(pair(before, now, *one, args.turns, args.seconds))
            finally:
                before.close(), now.close()
            print(f"pair {number + 1} of {args.pairs}", flush=True)
            if number:  # an interval needs two; what stops later has those of the pairs until then
                for one in cells:
                    row = cell(*one, times[one]) | {"before": name}
                    common.tell(rows, row, "{model} {density}:", "{speedup:.3f}x as fast ({low:.3f} to {high:.3f})")
    lines = [] if args.quick else missed(rows.measured[-len(cells) :])
    print("\n".join(lines))
    return int(bool(lines))


if __name__ == "__main__":
    common.alone(main)

"""Many clients: memory of all processes, start-up, partition, and what a round costs beside one of 100 clients.

    python -m benchmarks.scale [--cases fmnist-10000 synthetic-100000] [--rounds 20] [--out FILE.csv]

LeNet-5, SpaFL, 10 clients a round, rows in a file, two worker processes; Fashion-MNIST is looked for where
``data.root`` looks (``--data-root``). Two parts for each case:

The run, in a process of its own, checkpoints and sampled evaluations included. Memory is what its processes hold
together at the worst moment, sampled ten times a second from ``/proc/PID/smaps_rollup``: proportional shares (a page
that two processes map counts half for each) of anonymous and of shared memory (``Pss_Anon + Pss_Shmem``). Pages of
mapped files are cache, which the kernel takes back when it needs it; ``rss_mb``, the plain sum that counts shared pages
once for each process, holds them. Start-up is all from the start of the process to the end of the first round, less an
ordinary round (median) and the reading of the data. The partition is part of it, while the workers import on the same
cores (``partition_s``); ``partition_alone_s`` is the same with nothing beside it. ``startup_cpu_s`` and
``partition_cpu_s`` are processor seconds of all processes together, which other work on the machine disturbs less. Only
clients that trained may take space on the disk.

The rounds (not for synthetic data), beside those of a run with 100 clients that are the first 100 of the many, with the
same samples: both train clients 0 to 9 in their first round, 10 to 19 in the next, in turn, in this process. They must
end with the same thresholds, every bit, or nothing is reported. ``round_ratio`` is seconds over seconds, ``cpu_ratio``
the same of processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import common
from benchmarks.common import Row
from benchmarks.scale_run import CASES, SAMPLED, configured, family
from spafl.config import RunConfig
from spafl.simulation import loop, problem
from spafl.simulation.pool import Pool
from spafl.simulation.runfolder import RunFolder

KEY = ("case", "rounds")
FEW = 100

# -- memory of processes


def held_memory(pid: int) -> dict[str, int]:
    """Bytes that a process and its children hold together, by the names of ``smaps_rollup``."""
    total = dict.fromkeys(("Rss", "Pss_Anon", "Pss_Shmem", "Pss_File"), 0)
    for member in family(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()[1:]:
                name, _, value = line.partition(":")
                if name in total:
                    total[name] += 1024 * int(value.split()[0])
    return total


class Peak:
    """Watches a process from a thread: the largest :func:`held_memory`, by ``Pss_Anon + Pss_Shmem`` and by ``Rss``."""

    def __init__(self, pid: int, pause: float = 0.1) -> None:
        self.pid, self.pause = pid, pause
        self.bytes = self.rss = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(self.pause):
            now = held_memory(self.pid)
            self.bytes = max(self.bytes, now["Pss_Anon"] + now["Pss_Shmem"])
            self.rss = max(self.rss, now["Rss"])

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()


# -- the run


def typical(totals: Sequence[float]) -> float:
    """Median of what each round added."""
    return statistics.median(later - before for before, later in itertools.pairwise(totals))


def run_measured(case: str, rounds: int, data_root: str | None) -> dict[str, Any]:
    """The columns of the run."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        run = Path(folder) / "run"
        call = json.dumps([case, rounds, data_root, str(run)])
        command = [sys.executable, "-m", "benchmarks.scale_run", call]
        process = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, text=True)
        peak = Peak(process.pid)
        try:
            out, _ = process.communicate()
        finally:
            process.kill()
            peak.stop()
        if process.returncode:
            raise SystemExit(f"benchmarks.scale: {case} ended with status {process.returncode}")
        told = json.loads(out.splitlines()[-1])
        lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        touched = len({k for line in lines for k in line["sampled"]})
        newest = max((run / "checkpoints").iterdir())
        saved = len(list((newest / "clients").iterdir()))
        disk = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    seconds, ends, used = told["seconds"], told["ends"], told["used"]
    trained = [line["cost"]["seconds"]["train"] for line in lines]
    ordinary = typical(trained)
    wrong = []
    if saved != touched:
        wrong.append(f"{saved} clients in the checkpoint, {touched} trained")
    # A round writes to rows of its own.
    if seconds["rows_on_disk"] > (touched + SAMPLED) * seconds["row_bytes"]:
        wrong.append(f"rows of {touched} clients take {seconds['rows_on_disk']} bytes")
    return {
        "touched": touched,
        "data_s": round(seconds["data"], 2),
        "partition_s": round(seconds["partition"], 2),
        "partition_cpu_s": round(seconds["partition_cpu"], 2),
        "startup_s": round(ends[0] - seconds["data"] - ordinary, 2),
        "startup_cpu_s": round(used[0] - seconds["data_cpu"] - typical(used), 2),
        "round_s": round(ordinary, 3),
        "peak_mb": round(peak.bytes / 1e6),
        "rss_mb": round(peak.rss / 1e6),
        "rows_mb": round(seconds["rows_on_disk"] / 1e6),
        "checkpoint_mb": round(disk / 1e6),
        "wrong": "; ".join(wrong),
    }


# -- the rounds


class Rival:
    """A run in this process whose rounds are timed one by one."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.folder = RunFolder(folder, resume=False)
        self.simulation = loop.Simulation(config, self.folder, quiet=True)
        self.pool = Pool(self.simulation.worker_setup(), 1)
        self.round = 0

    def run_round(self) -> tuple[float, float]:
        """Seconds and processor seconds of the next round."""
        wall, busy = time.perf_counter(), time.process_time()
        done = self.simulation.run_round(self.pool, self.round)
        self.folder.append_metrics(self.simulation.ledger.book(done))
        self.round += 1
        return time.perf_counter() - wall, time.process_time() - busy

    def close(self) -> None:
        """End it; its rows are gone."""
        self.pool.close()
        assert self.simulation.store is not None
        self.simulation.store.close()
        self.folder.close()


def _in_order(_: RunConfig, round: int) -> list[int]:
    return [(SAMPLED * round + i) % FEW for i in range(SAMPLED)]


def compare(case: str, rounds: int, data_root: str | None) -> dict[str, Any]:
    """The columns of the rounds."""
    changes = {"simulation": {"workers": 1, "checkpoint_every": rounds + 2}, "evaluation": {"every": rounds + 2}}
    many = configured(case, rounds + 1, data_root, **changes)
    with (
        tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder,
        mock.patch.object(loop, "sample_clients", _in_order),
    ):
        first = Rival(many, Path(folder) / "many")
        parts = first.simulation.problem.parts
        listed = {part: [index.tolist() for index in getattr(parts, part)[:FEW]] for part in ("train", "test")}
        file = Path(folder) / "few.json"
        file.write_text(json.dumps(listed))
        cut = {"scheme": "file", "file": str(file), "clients": FEW, "alpha": None}
        few = configured(case, rounds + 1, data_root, **changes, partition=cut)
        second = Rival(few, Path(folder) / "few")
        rivals = {"many": first, "few": second}
        wall: dict[str, list[float]] = {name: [] for name in rivals}
        busy: dict[str, list[float]] = {name: [] for name in rivals}
        for round in range(rounds):
            for name in sorted(rivals, reverse=bool(round % 2)):
                seconds, used = rivals[name].run_round()
                if round:  # kernels are chosen in the first one
                    wall[name].append(seconds)
                    busy[name].append(used)
        ends = {name: rival.simulation.server for name, rival in rivals.items()}
        for rival in rivals.values():
            rival.close()
    differ = [name for name, value in ends["few"].items() if not torch.equal(value, ends["many"][name])]
    low, middle, high = common.over(wall["many"], wall["few"])
    return {
        "round_ratio": round_(middle), "round_ratio_q1": round_(low), "round_ratio_q3": round_(high),
        "cpu_ratio": round_(common.over(busy["many"], busy["few"])[1]),
        "wrong": f"{differ[0]} differs from that of {FEW} clients" if differ else "",
    }  # fmt: skip


def round_(value: float) -> float:
    """Three digits after the point."""
    return round(value, 3)


def measure(case: str, rounds: int, data_root: str | None) -> dict[str, object]:
    """One row."""
    config = configured(case, rounds, data_root)
    row: dict[str, Any] = {
        "case": case, "clients": config.partition.clients, "rounds": rounds, **run_measured(case, rounds, data_root)
    }  # fmt: skip
    dataset = problem.load_data(config)
    start = time.perf_counter()
    problem.cut_data(config, dataset)
    row["partition_alone_s"] = round(time.perf_counter() - start, 2)
    beside: dict[str, Any] = dict.fromkeys(("round_ratio", "round_ratio_q1", "round_ratio_q3", "cpu_ratio"), "")
    beside["wrong"] = ""
    if case != "synthetic-100000":
        beside = compare(case, rounds, data_root)
    wrong = "; ".join(text for text in (row.pop("wrong"), beside.pop("wrong")) if text)
    return row | beside | {"wrong": wrong}


def table(rows: Sequence[Row]) -> str:
    """A line for each case."""
    lines = [
        [
            row["case"], *(f"{int(row[c]):,}" for c in ("clients", "rounds", "touched")),
            *(row[c] for c in ("partition_alone_s", "partition_s", "startup_s", "startup_cpu_s")),
            row["round_s"], row["round_ratio"],
            *(f"{int(row[c]):,}" for c in ("peak_mb", "rows_mb")),
        ]
        for row in common.right(rows)
    ]  # fmt: skip
    header = ["case", "clients", "rounds", "clients that trained", "partition alone, s", "in a start-up", "start-up, s",
              "of CPU", "round, s",
              "over 100 clients'", "memory, MB", "rows on disk, MB"]  # fmt: skip
    return common.markdown(header, lines)


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.scale", __doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["fmnist-10000", "synthetic-100000"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--data-root", help="folder with the files of Fashion-MNIST")
    args = parser.parse_args(argv)
    if args.quick:
        args.cases, args.rounds = ["smoke"], 2
    rows = common.start(args, KEY)
    for case in args.cases:
        common.tell(
            rows, measure(case, args.rounds, args.data_root), "{case:18}",
            "start-up {startup_s} s ({startup_cpu_s} of CPU)  partition {partition_alone_s} s, {partition_s} in it  "
            "round {round_s} s, {round_ratio}x of 100 clients'  memory {peak_mb} MB  rows {rows_mb} MB",
        )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

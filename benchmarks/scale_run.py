"""The run that ``benchmarks.scale`` measures, in a process of its own that imports nothing but what a run needs.

python -m benchmarks.scale_run '["fmnist-10000", 20, null, "FOLDER"]'
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from spafl.config import RunConfig, deep_merge, resolve_config
from spafl.simulation import loop, problem
from spafl.simulation.pool import Pool

SAMPLED = 10
CASES: dict[str, dict[str, Any]] = {
    "fmnist-10000": {"data": {"name": "fashion-mnist"}, "partition": {"clients": 10_000}},
    "synthetic-100000": {
        "data": {"name": "synthetic", "train": 400_000, "test": 100_000},
        "partition": {"clients": 100_000},
    },
    "smoke": {"data": {"name": "synthetic", "train": 1000, "test": 300}, "partition": {"clients": 200}},
}
COMMON: dict[str, Any] = {
    "name": "scale",
    "partition": {"scheme": "dirichlet", "alpha": 0.2},
    "model": {"name": "lenet5"},
    "algorithm": {"name": "spafl", "variant": "fmnist"},
    "sampling": {"clients_per_round": SAMPLED},
    "evaluation": {"every": 10, "clients": 100},
    "simulation": {"device": "cpu", "store": "file", "workers": 2, "checkpoint_every": 10, "keep_checkpoints": 1},
}


def configured(case: str, rounds: int, data_root: str | None = None, **changes: Any) -> RunConfig:
    """The run of a case."""
    raw = deep_merge(deep_merge(COMMON, CASES[case]), {"rounds": rounds})
    if data_root and raw["data"]["name"] != "synthetic":
        raw["data"] = {**raw["data"], "root": data_root}
    return resolve_config(deep_merge(raw, changes))


def family(pid: int) -> list[int]:
    """A process and all that it started, directly or not, and that are there now."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def processor_seconds(pid: int) -> float:
    """Processor time that a process and its children have used."""
    ticks = 0
    for member in family(pid):
        with contextlib.suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def measured(case: str, rounds: int, data_root: str | None, folder: str) -> dict[str, Any]:
    """A run, in this process; when it got where, seconds since the process began, and how long the steps took."""
    boot = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    seconds: dict[str, float] = {}
    ends: list[float] = []
    used: list[float] = []

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            start, busy = time.perf_counter(), time.process_time()
            try:
                return function(*args)
            finally:
                seconds[name] = time.perf_counter() - start
                seconds[f"{name}_cpu"] = time.process_time() - busy

        return call

    finish = loop.Simulation._finish

    def finished(self: loop.Simulation, *args: Any) -> None:
        finish(self, *args)
        ends.append(time.clock_gettime(time.CLOCK_BOOTTIME) - boot)
        used.append(processor_seconds(os.getpid()))

    config = configured(case, rounds, data_root)
    with (
        mock.patch.object(problem, "load_data", timed("data", problem.load_data)),
        mock.patch.object(problem, "cut_data", timed("partition", problem.cut_data)),
        mock.patch.object(loop.Simulation, "_finish", finished),
        mock.patch.object(loop.Simulation, "_evaluate_last", _look_at_rows(seconds)),
    ):
        loop.run(config, Path(folder), quiet=True)
    return {"seconds": seconds, "ends": ends, "used": used}


def _look_at_rows(found: dict[str, float]) -> Any:
    """A stand-in for the last step of a run (which has nothing to do here): the rows are gone with the run."""

    def look(self: loop.Simulation, _: Pool) -> None:
        assert self.store is not None and self.store.file.path is not None
        found["row_bytes"] = self.store.row_bytes
        found["rows_on_disk"] = self.store.file.path.stat().st_blocks * 512

    return look


if __name__ == "__main__":
    print(json.dumps(measured(*json.loads(sys.argv[1]))))

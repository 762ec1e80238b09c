"""What the digests of a checkpoint cost of a save.

    python -m benchmarks.checkpoint [--saves 5] [--out FILE.csv]

Rows of LeNet-5 with momentum (3.4 MB a client), on the disk under ``TMPDIR`` (``/var/tmp``). ``all``: every client has
trained since the checkpoint before; ``few``: ten of 300, the others are links. ``share`` is the time inside
:func:`spafl.simulation.files.digest` over that of the save, wall-clock, median over saves; ``cpu_share`` the same of
this process's processor time, in which nobody waits for the disk. Every checkpoint is verified.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import common
from benchmarks.common import Row
from spafl.config import resolve_config
from spafl.cost import Cost
from spafl.simulation import checkpoint
from spafl.simulation.announcements import AnnouncementLog
from spafl.simulation.problem import build_method
from spafl.simulation.rows import ClientRows

KEY = ("case",)
# Clients, and those among them that have trained since the checkpoint before.
CASES = {"all": (100, 100), "few": (300, 10)}


class Clock:
    """Adds up the time inside a function, on the wall and of the processor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.wall, self.busy = function, 0.0, 0.0

    def __call__(self, *args: Any) -> Any:
        wall, busy = time.perf_counter(), time.process_time()
        try:
            return self.function(*args)
        finally:
            self.wall, self.busy = self.wall + time.perf_counter() - wall, self.busy + time.process_time() - busy


def measure(case: str, saves: int, clients: int, dirty: int) -> dict[str, Any]:
    """One row."""
    tables = {"data": {"name": "digits"}, "model": {"name": "lenet5"}, "algorithm": {"name": "spafl"}}
    method = build_method(resolve_config(tables), 10, (1, 28, 28), "uint8")
    server = method.algorithm.server_state(method.model)
    seconds, shares, cpu_shares = [], [], []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        rows = ClientRows(Path(folder) / "rows", method.client_state, clients, "file", dirty)
        saved = checkpoint.Checkpoints(Path(folder) / "checkpoints", "benchmark", keep=1)
        for number in range(saves + 1):
            trained = set(range(clients)) if not number else {(number * dirty + k) % clients for k in range(dirty)}
            for k in trained:
                rows.load(k)
                rows.save(k)
            digest = Clock(checkpoint.digest)
            whole = Clock(saved.save)
            now = checkpoint.State(number, Cost(), AnnouncementLog(number, [number] * clients))
            with mock.patch.object(checkpoint, "digest", digest):
                whole(now, server, rows, trained)
            if number:  # the first writes everybody
                seconds.append(whole.wall)
                shares.append(digest.wall / whole.wall)
                cpu_shares.append(digest.busy / whole.busy)
        found, refused = saved.load()
        wrong = "" if found is not None and found.state.round == saves and not refused else "; ".join(refused)
        rows.close()
    return {
        "case": case, "clients": clients, "dirty": dirty, "saves": saves, "wrong": wrong,
        "seconds": round(statistics.median(seconds), 3), "share": round(statistics.median(shares), 4),
        "cpu_share": round(statistics.median(cpu_shares), 4),
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """A line for each case."""
    lines = [
        [
            row["case"], f"{int(row['clients']):,}", row["dirty"], row["seconds"],
            *(f"{100 * float(row[column]):.1f} %" for column in ("share", "cpu_share")),
        ]
        for row in common.right(rows)
    ]  # fmt: skip
    header = ["case", "clients", "written anew", "save, s", "of it digests", "of its CPU time"]
    return common.markdown(header, lines)


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.checkpoint", __doc__)
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args(argv)
    cases = CASES
    if args.quick:
        args.saves, cases = 2, {"all": (3, 3), "few": (5, 2)}
    rows = common.start(args, KEY)
    for case, (clients, dirty) in cases.items():
        common.tell(
            rows, measure(case, args.saves, clients, dirty), "{case:5}",
            "a save {seconds} s, digests {share} of it, {cpu_share} of its CPU time",
        )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)

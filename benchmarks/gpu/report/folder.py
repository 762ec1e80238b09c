"""The files of a report. Whatever ends a run, what was written before stays.

``report.jsonl``  one JSON object per line: ``stage``, ``kind`` and what was seen; everything, benchmark rows included
``gpu.csv``       the benchmark rows once more, as ``python -m benchmarks.gpu`` writes them
``summary.txt``   the table at the end
``log.txt``       what the stages printed
``kernels.jsonl`` kernels that had to be compiled, for the next pack (``benchmarks.gpu.ahead.pack --log``)
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ..results import Recorder, Row

# The most important first: a folder that may hold fewer files leaves out the last ones.
FILES = ("report.jsonl", "gpu.csv", "summary.txt", "log.txt", "kernels.jsonl")


class Folder:
    """Where a report goes.

    Args:
        path: made if it is not there.
        files: how many files it may hold, 1 to 5.
        megabytes: how large each may become; then nothing more is added, and a line says so.
    """

    def __init__(self, path: pathlib.Path, files: int = len(FILES), megabytes: float = 15.0) -> None:
        if not 1 <= files <= len(FILES):
            raise ValueError(f"files must be 1 to {len(FILES)}; got {files}")
        if not megabytes > 0:
            raise ValueError(f"megabytes must be more than 0; got {megabytes}")
        self.path, self.files, self.most = path, files, int(megabytes * 2**20)
        path.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether the folder may hold this file."""
        return name in FILES[: self.files]

    def _append(self, name: str, text: str) -> None:
        if not self.has(name):
            return
        file = self.path / name
        size = file.stat().st_size if file.exists() else 0
        if size >= self.most:
            return
        if size + len(text.encode()) > self.most:
            text = '{"kind": "full"}\n' if name.endswith(".jsonl") else "(the rest is left out: the file is full)\n"
            text = text.ljust(self.most - size)
        with open(file, "a") as f:
            f.write(text)

    def add(self, stage: str, kind: str, **facts: Any) -> None:
        """One line of ``report.jsonl``."""
        self._append("report.jsonl", json.dumps({"stage": stage, "kind": kind, **_plain(facts)}) + "\n")

    def log(self, text: str) -> None:
        """More of what was printed."""
        self._append("log.txt", text)

    def compiled(self, lines: str) -> None:
        """More kernels that had to be compiled."""
        if lines:
            self._append("kernels.jsonl", lines)

    def summarise(self, text: str) -> None:
        """Write the summary anew."""
        if self.has("summary.txt"):
            (self.path / "summary.txt").write_text(text[: self.most])

    def rows(self) -> list[dict[str, Any]]:
        """All lines of ``report.jsonl`` so far; a line that was cut off by a crash is left out."""
        file, found = self.path / "report.jsonl", []
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


class Rows:
    """Takes the rows of a benchmark for a stage; has the interface of :class:`benchmarks.gpu.results.Recorder`."""

    def __init__(self, folder: Folder, stage: str, facts: Mapping[str, str]) -> None:
        self._folder, self._stage = folder, stage
        self._csv = Recorder(folder.path / "gpu.csv", facts) if folder.has("gpu.csv") else None

    def add(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        for row in rows:
            self._folder.add(self._stage, "row", **{("what" if k == "kind" else k): v for k, v in row.items()})
        if self._csv is not None:
            self._csv.add(rows)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it; numbers that are not finite become words."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)

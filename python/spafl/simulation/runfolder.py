"""The folder of a run: what is in it, who may write to it, and how its files are written.

===================  ==========================================================================
``config.toml``      the resolved configuration
``partition.json``   how many samples of each class every client has
``metrics.jsonl``    one line per finished round
``summary.json``     written when the run is complete
``checkpoints/``     what ``--resume`` starts from
``report/``          pictures and ``report.html``
``.scratch/``        working files of a running simulation
===================  ==========================================================================
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from ..errors import UserError


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class RunFolder:
    """An opened run folder, locked against other processes until :meth:`close`.

    Args:
        path: the folder.
        resume: continue what is there; otherwise the folder must be new or empty.

    Raises:
        UserError: the folder holds a run already, holds none to resume, or is in use by another process.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        if path.exists() and not path.is_dir():
            raise UserError(f"run folder {path} is a file")
        has_run = (path / "config.toml").exists()
        if resume and not has_run:
            raise UserError(f"run folder {path} holds no run to resume")
        if not resume and has_run:
            raise UserError(f"run folder {path} already holds a run; continue it with --resume or choose another --out")
        if not resume and path.exists() and any(p.name != ".lock" for p in path.iterdir()):
            raise UserError(f"run folder {path} is not empty; choose another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"run folder {path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"run folder {path} is in use by another process") from None
        self.scratch = path / ".scratch"
        self.checkpoints = path / "checkpoints"

    def fresh_scratch(self) -> Path:
        """An empty scratch folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        return self.scratch

    def keep_metrics_until(self, round: int) -> None:
        """Drop the metrics of rounds after ``round``: they will be run again."""
        path = self.path / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                try:
                    if json.loads(line)["round"] <= round:
                        kept.append(line)
                except (ValueError, KeyError):
                    break  # a line cut off by the kill
        write_atomic(path, "".join(kept))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one round to the metrics and make sure it is on disk."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Remove the scratch files, and the folder if it is empty, and let other processes in."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock = None
            if not any(self.path.iterdir()):  # nothing came of it
                self.path.rmdir()

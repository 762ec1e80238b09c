"""The folder of a run: what is in it, who may write to it, and how its files are written.

===================  ==========================================================================
``config.toml``      the resolved configuration
``partition.json``   how many samples of each class every client has
``metrics.jsonl``    one line per finished round
``evaluations/``     what every tested client got, a file per evaluated round
``summary.json``     written when the run is complete; removed while it is being continued
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
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..client_results import results_path
from ..errors import UserError, WriteError
from .files import write_atomic, write_together, writing

# What a process that was killed before it wrote config.toml may have left behind.
_LEFT_BEHIND = {".lock", ".scratch", ".config.toml.tmp", ".partition.json.tmp", ".metrics.jsonl.tmp", "config.toml.tmp",
                "flower.json", ".flower.json.tmp"}  # fmt: skip


class RunFolder:
    """An opened run folder, locked against other processes until :meth:`close`.

    Args:
        path: the folder.
        resume: continue what is there; otherwise the folder must be new or empty.

    Raises:
        UserError: the folder holds a run already, holds none to resume, is in use by another process, or cannot be
            looked into.
        WriteError: it cannot be written to.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.scratch = path / ".scratch"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self._lock: IO[str] | None = None
        try:
            if path.exists() and not path.is_dir():
                raise UserError(f"run folder {path} is a file")
            self._check(resume)
            self._lock = self._locked()
            self._check(resume)  # what was looked at before the lock was held may have changed since
        except OSError as error:
            raise UserError(f"run folder {path} cannot be used: {error.strerror or error}") from None
        except UserError:
            self.close()
            raise
        except ValueError as error:  # a NUL in the path
            raise UserError(f"run folder {str(path)!r} cannot be used: {error}") from None

    def _check(self, resume: bool) -> None:
        path = self.path
        has_run = (path / "config.toml").exists()
        if resume and not has_run:
            raise UserError(f"run folder {path} holds no run to resume")
        if not resume and has_run:
            raise UserError(f"run folder {path} already holds a run; continue it with --resume or choose another --out")
        if not resume and path.exists() and any(p.name not in _LEFT_BEHIND for p in path.iterdir()):
            raise UserError(f"run folder {path} is not empty; choose another --out")

    def _locked(self) -> IO[str]:
        """The lock file, held. Whoever lets go removes the file first, so what was locked may have no name any more."""
        name = self.path / ".lock"
        while True:
            try:
                with writing(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                file = name.open("w")
            except FileNotFoundError:  # the folder was removed at this moment
                continue
            except OSError as error:
                raise WriteError(f"{name} could not be written: {error.strerror or error}") from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), name.stat()):
                    return file
            except FileNotFoundError:
                pass
            except OSError:
                file.close()
                raise UserError(f"run folder {self.path} is in use by another process") from None
            file.close()

    def fresh_scratch(self) -> Path:
        """An empty scratch folder."""
        with writing(self.scratch):
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
        return self.scratch

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of the rounds 0, 1, 2... up to the first that is missing, damaged or cut off."""
        lines: list[dict[str, Any]] = []
        try:
            content = self.metrics.read_bytes()
        except OSError:
            return lines
        for text in content.splitlines():
            try:
                line = json.loads(text)
                if line["round"] != len(lines) or "cost" not in line or "evaluation" not in line:
                    break
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            lines.append(line)
        return lines

    def begin(self, config: str, partition: str, metrics: Sequence[dict[str, Any]]) -> None:
        """Write what a run starts or continues with; from now on the folder holds an unfinished run.

        Where a disk is full, the folder stays as it is.
        """
        files = {
            self.path / "config.toml": config,  # first: what has one can be resumed
            self.path / "partition.json": partition,
            self.metrics: _as_text(metrics),
        }
        write_together(files, remove=[self.summary])
        self._keep_results_of(metrics)

    def write_results(self, round: int, records: Iterable[dict[str, Any]]) -> None:
        """Write what each client got in the evaluation of a round; see :mod:`spafl.client_results`."""
        path = results_path(self.path, round)
        with writing(path.parent):
            path.parent.mkdir(exist_ok=True)
        write_atomic(path, _as_text(records))

    def _keep_results_of(self, metrics: Sequence[dict[str, Any]]) -> None:
        """Bring the results of clients in line with metrics that became fewer, or were evaluated less."""
        evaluated = {line["round"]: line["evaluation"] for line in metrics if line["evaluation"] is not None}
        kept = {results_path(self.path, round): value for round, value in evaluated.items()}
        folder = results_path(self.path, 0).parent
        for path in folder.iterdir() if folder.is_dir() else ():
            if path not in kept:
                with writing(path):  # one half written before a kill may be gone, written again under that name
                    path.unlink(missing_ok=True)
            elif kept[path]["train_accuracy"] is None:
                self._forget_train_accuracies(path)

    @staticmethod
    def _forget_train_accuracies(path: Path) -> None:
        try:
            records = [json.loads(text) for text in path.read_bytes().splitlines()]
            if all(record["train_accuracy"] is None for record in records):
                return
            text = _as_text({**record, "train_accuracy": None} for record in records)
        except (OSError, ValueError, KeyError, TypeError):  # damaged: nothing is computed from it
            return
        write_atomic(path, text)

    def rewrite_metrics(self, lines: Sequence[dict[str, Any]]) -> None:
        """Replace all metrics."""
        write_atomic(self.metrics, _as_text(lines))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one round to the metrics and make sure it is on disk."""
        with writing(self.metrics), self.metrics.open("ab") as file:
            before = file.tell()
            try:
                file.write(_as_text([line]).encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(self.metrics, before)
                raise

    def close(self) -> None:
        """Remove the scratch files, and the folder if it is empty, and let other processes in."""
        if self._lock is None:
            return
        shutil.rmtree(self.scratch, ignore_errors=True)
        # The name goes while the lock is held: nobody can lock a file that is about to lose it and believe it.
        with suppress(OSError):
            (self.path / ".lock").unlink(missing_ok=True)
            self.path.rmdir()  # only if nothing came of it
        self._lock.close()
        self._lock = None


def _as_text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)

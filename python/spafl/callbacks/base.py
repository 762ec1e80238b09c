"""What a callback is: it watches a run and never changes it.

A callback is told what was finished and is already on disk. It gets copies, is called in the main process, between two
rounds, and a run is the same to the last bit with it or without. An exception that it raises does not end the run: it
is told in one line on standard error, and that callback is not called again. A callback that wants the run to stop
raises :class:`KeyboardInterrupt`: finished rounds are saved, and ``--resume`` continues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records import client_rows, round_row


@dataclass(frozen=True)
class Watched:
    """The run that a callback is told of.

    Attributes:
        name: of the run.
        folder: its run folder.
        rounds: how many it is to have.
        config: its resolved configuration, nested tables.
        done: the rounds that were finished before (a resumed run), as recorded; empty for a new one.
    """

    name: str
    folder: Path
    rounds: int
    config: Mapping[str, Any]
    done: Sequence[Round]


@dataclass(frozen=True)
class Round:
    """A finished round.

    Attributes:
        number: from 1.
        metrics: its line of ``metrics.jsonl``, see ``docs/metrics.md``; a copy.
        folder: the run folder.
    """

    number: int
    metrics: dict[str, Any]
    folder: Path

    def row(self) -> dict[str, Any]:
        """The round as one flat dict, as :meth:`spafl.api.RunResult.frame` shows it."""
        return round_row(self.metrics)

    def clients(self) -> list[dict[str, Any]]:
        """One dict for each client that was tested in this round: ``round``, ``client``, ``accuracy``, ``loss``,
        ``train_accuracy``, ``density``."""
        return client_rows(self.folder, self.metrics)


class Callback:
    """Base class of callbacks; every method may be left as it is. Parameters of ``__init__`` are its options."""

    def on_start(self, run: Watched) -> None:
        """The run begins, or continues."""

    def on_round(self, round: Round) -> None:
        """A round is finished, and its metrics are on disk."""

    def on_end(self, summary: dict[str, Any] | None) -> None:
        """The run is over: what is in ``summary.json``, or None where it was cut short.

        Called once, after errors of the run itself too.
        """

"""Rounds and clients as CSV files that grow with the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..csv_files import csv_text, write_csv
from .base import Callback, Round, Watched


class CSV(Callback):
    """``rounds.csv``, a row per round, and ``clients.csv``, a row per client and evaluated round.

    Args:
        folder: where they go; the run folder by default.
        clients: whether ``clients.csv`` is written.
    """

    def __init__(self, folder: str = "", clients: bool = True) -> None:
        self._folder, self._with_clients = folder, clients
        self._rounds: list[Round] = []
        self._columns: dict[str, list[str]] = {}

    def on_start(self, run: Watched) -> None:
        self._at = Path(self._folder).expanduser() if self._folder else run.folder
        self._rounds = list(run.done)
        self._write()

    def on_round(self, round: Round) -> None:
        self._rounds.append(round)
        self._append("rounds", [round.row()])
        if self._with_clients:
            self._append("clients", round.clients())

    def on_end(self, summary: dict[str, Any] | None) -> None:
        self._write()

    def _write(self) -> None:
        self._whole("rounds", (round.row() for round in self._rounds))
        if self._with_clients:
            self._whole("clients", (row for round in self._rounds for row in round.clients()))

    def _whole(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        found = list(rows)
        self._columns[name] = list(dict.fromkeys(key for row in found for key in row))
        if found:
            write_csv(self._at / f"{name}.csv", found)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if any(set(row) - set(self._columns[name]) for row in rows) or not self._columns[name]:
            self._write()  # a column that was not there before
        elif rows:
            empty = dict.fromkeys(self._columns[name])
            lines = csv_text([{**empty, **row} for row in rows]).splitlines(keepends=True)[1:]
            with (self._at / f"{name}.csv").open("a", encoding="utf-8") as file:
                file.writelines(lines)

"""TensorBoard, written by tensorboardX (the extra ``tensorboard``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from .base import Callback, Round, Watched

_GROUPS = {"accuracy": "accuracy", "density": "density", "figures": "figures", "loss": "loss", "train_loss": "loss"}


class TensorBoard(Callback):
    """Every figure of a round as a scalar by its number (from 1), and histograms of the clients' accuracies.

    Args:
        folder: of the event files; ``tensorboard`` in the run folder by default.
        clients: whether histograms over clients are written.
    """

    def __init__(self, folder: str = "", clients: bool = True) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "callback tensorboard needs tensorboardX (pip install 'spafl-kernels[tensorboard]')"
            ) from None
        self._make, self._folder, self._clients = SummaryWriter, folder, clients

    def on_start(self, run: Watched) -> None:
        folder = Path(self._folder).expanduser() if self._folder else run.folder / "tensorboard"
        # What a killed run wrote beyond its last checkpoint is computed again; viewers drop it from this step on.
        self._writer = self._make(str(folder), purge_step=len(run.done) + 1 if folder.is_dir() else None)

    def on_round(self, round: Round) -> None:
        for name, value in round.row().items():
            if name != "round" and value is not None:
                self._writer.add_scalar(tag(name), value, round.number)
        rows = round.clients() if self._clients else []
        for field in ("accuracy", "density"):
            values = [row[field] for row in rows if row[field] is not None]
            if values:
                self._writer.add_histogram(f"clients/{field}", values, round.number)
        self._writer.flush()

    def on_end(self, summary: dict[str, Any] | None) -> None:
        self._writer.close()


def tag(name: str) -> str:
    """A column of :func:`spafl.records.round_row` in its group: ``density.conv1`` is ``density/conv1``."""
    group = _GROUPS.get(name) or _GROUPS.get(name.partition(".")[0]) or _GROUPS.get(name.partition("_")[0]) or "cost"
    return f"{group}/{name.removeprefix(f'{group}.')}"

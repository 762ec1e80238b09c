"""Weights & Biases, where its package is installed and the user has set it up."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .base import Callback, Round, Watched
from .tensorboard import tag


class WandB(Callback):
    """The run's configuration and every figure of a round, by its number (from 1).

    Args:
        project: of Weights & Biases.
        entity: user or team; the account's own by default.
        mode: ``online``, ``offline`` (files alone, to be synchronised later) or ``disabled``; by default what
            ``WANDB_MODE`` says, else ``online``.
    """

    def __init__(self, project: str = "spafl", entity: str = "", mode: str = "") -> None:
        if mode not in ("", "online", "offline", "disabled"):
            raise UserError(f"callback wandb: mode must be online, offline or disabled; got {mode!r}")
        try:
            import wandb
        except ImportError:
            raise UserError("callback wandb needs wandb (pip install wandb)") from None
        self._wandb, self._project, self._entity, self._mode = wandb, project, entity or None, mode

    def on_start(self, run: Watched) -> None:
        self._run = self._wandb.init(
            project=self._project, entity=self._entity, mode=self._mode or None, name=run.name, dir=str(run.folder),
            config=dict(run.config), reinit="create_new",
        )  # fmt: skip
        for round in run.done:
            self.on_round(round)

    def on_round(self, round: Round) -> None:
        values = {tag(name): value for name, value in round.row().items() if name != "round" and value is not None}
        self._run.log(values, step=round.number)

    def on_end(self, summary: dict[str, Any] | None) -> None:
        self._run.finish(exit_code=0 if summary is not None else 1)

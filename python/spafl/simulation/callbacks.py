"""Calls the callbacks of a run, and keeps it from what goes wrong in them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import plugins
from ..callbacks import CALLBACKS, Callback, Round, Watched
from ..errors import UserError
from .progress import say


def build_callbacks(configured: Sequence[Any]) -> list[Callback]:
    """The callbacks that ``[[callbacks]]`` names.

    Args:
        configured: objects with ``name`` and ``options``.

    Raises:
        UserError: a name that is not there, no callback, options that do not fit, or a missing package.
    """
    return [_built(f"callbacks.{at}.name", entry.name, entry.options) for at, entry in enumerate(configured)]


def _built(where: str, name: str, options: Mapping[str, Any]) -> Callback:
    found = name if plugins.is_path(name) else CALLBACKS[name]
    make = plugins.find(where, found) if isinstance(found, str) else found
    if inspect.isclass(make) and not issubclass(make, Callback):
        raise UserError(f"{where}: {plugins.place(make)} must be a subclass of spafl.callbacks.Callback")
    made = plugins.call(where, make, {}, options)
    if not isinstance(made, Callback):
        raise UserError(
            f"{where}: {plugins.place(make)} must give a spafl.callbacks.Callback; it gave a {type(made).__name__}"
        )
    return made


class Callbacks:
    """The callbacks of a run, called one after the other.

    Args:
        callbacks: who is told.
        folder: of the run.
    """

    def __init__(self, callbacks: Sequence[Callback], folder: Path) -> None:
        self._listening = list(callbacks)
        self._folder = folder

    def start(self, name: str, rounds: int, config: Mapping[str, Any], lines: Sequence[dict[str, Any]]) -> None:
        """Tell them that the run begins, after the rounds of ``lines``."""
        for callback in list(self._listening):
            done = [self._round(line) for line in lines]
            run = Watched(name, self._folder, rounds, copy.deepcopy(dict(config)), done)
            self._call(callback, "on_start", run, "at the start")

    def round(self, line: dict[str, Any]) -> None:
        """Tell them of a finished round.

        Raises:
            KeyboardInterrupt: one of them wants the run to stop; all were told.
        """
        stop: KeyboardInterrupt | None = None
        for callback in list(self._listening):
            try:
                self._call(callback, "on_round", self._round(line), f"in round {line['round'] + 1}")
            except KeyboardInterrupt as wish:
                stop = wish
        if stop is not None:
            raise stop

    def end(self, summary: dict[str, Any] | None) -> None:
        """Tell them that the run is over, once."""
        told, self._listening = self._listening, []
        for callback in told:
            self._call(callback, "on_end", copy.deepcopy(summary), "at the end")

    def _round(self, line: dict[str, Any]) -> Round:
        return Round(line["round"] + 1, copy.deepcopy(line), self._folder)

    def _call(self, callback: Callback, hook: str, argument: Any, when: str) -> None:
        try:
            getattr(callback, hook)(argument)
        except (Exception, SystemExit) as error:
            if callback in self._listening:
                self._listening.remove(callback)
            what = f"callback {plugins.place(callback)} failed {when} and is not called again"
            say(f"{what}: {plugins.explain(error)}")

"""What an engine keeps of the last few kinds of batches, kinds it refused among them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from .watch import Watch

__all__ = ["MOST", "Recent", "Refused"]

MOST = 8

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(dict[K, V]):
    """A dictionary of at most :data:`MOST` entries: the one that came first makes room."""

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        while len(self) > MOST:
            del self[next(iter(self))]


class Refused(Recent[K, tuple[Watch, str]]):
    """By kind of batch, why it runs masked, and the model that this was found for."""

    def reason(self, key: K, pattern: int = 0) -> str | None:
        """Why batches of this kind run masked; None if that is not known of the model as it is.

        Args:
            key: the kind of batch.
            pattern: which of the watched modes the modules should have.
        """
        watch, reason = self.get(key, (None, ""))
        return reason if watch is not None and watch.changed(pattern) is None else None

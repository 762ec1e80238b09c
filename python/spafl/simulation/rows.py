"""Which row of the store holds which client: a round writes to rows of its own, so that it can be forgotten.

A turn reads one row and writes another. Until :meth:`ClientRows.commit` every client's row of the last finished round
is untouched, whatever happened to the process that had the turn and whenever: a turn that was cut short is simply taken
again, and a round that was cut short leaves the state before it. A row in use costs its memory or disk space once, so
the price is the rows of the clients of one round, and in memory the copying of a row per turn.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .store import ClientStore, StoreFile, StoreKind


@dataclass(frozen=True)
class Turn:
    """What a client's turn reads and writes."""

    source: int | None
    """The row that holds the client; None: it is as all clients begin."""
    target: int | None
    """The row that is to hold it afterwards, nobody else's until the round ends; None: it is only looked at."""

    @property
    def written(self) -> int:
        """The target of a turn that has one."""
        assert self.target is not None
        return self.target


class ClientRows:
    """The clients of a run by number, each in some row of a store; in the process that leads the run.

    Args:
        path, initial, clients, kind: see :meth:`.store.ClientStore.create`.
        busy: how many clients change in a round, usually; ``kind = "auto"`` counts on rows for them.
    """

    def __init__(self, path: Path, initial: dict[str, Tensor], clients: int, kind: StoreKind, busy: int = 0) -> None:
        self.clients = clients
        # At worst all clients train and all change again when evaluated; a row that is never used takes no space.
        self._store = ClientStore.create(path, initial, 3 * clients, kind, clients + busy)
        self._rows: list[int | None] = [None] * clients
        self._staged: dict[int, int] = {}  # by client: the row that holds it if the round is finished
        self._reserved: set[int] = set()  # handed out since the last commit
        self._free: list[int] = []  # a heap: the lowest is taken, so that the store stays short
        self._next = 0

    @property
    def file(self) -> StoreFile:
        """What worker processes open."""
        return self._store.file

    @property
    def row_bytes(self) -> int:
        """Length of a row."""
        return self._store.row_bytes

    @property
    def rows(self) -> int:
        """Number of rows of the store."""
        return self._store.rows

    @property
    def buffer(self) -> dict[str, Tensor]:
        """See :class:`.store.ClientStore`."""
        return self._store.buffer

    # -- in a round

    def turn(self, client: int, changes: bool = True) -> Turn:
        """The rows of a client's next turn; if it ``changes`` nothing there is none to write."""
        return Turn(self._staged.get(client, self._rows[client]), self._reserve() if changes else None)

    def stage(self, client: int, turn: Turn) -> None:
        """The turn was taken: its target holds the client, if the round is finished."""
        self._staged[client] = turn.written

    def commit(self) -> None:
        """The round is finished: what was staged holds from now on."""
        unused = self._reserved - set(self._staged.values())
        for client, row in self._staged.items():
            old = self._rows[client]
            if old is not None:
                unused.add(old)
            self._rows[client] = row
        self._forget(unused)

    def abandon(self) -> None:
        """Every client is again as it was at the last :meth:`commit`."""
        self._forget(self._reserved)

    def _reserve(self) -> int:
        if self._free:
            row = heapq.heappop(self._free)
        else:
            row, self._next = self._next, self._next + 1
        self._reserved.add(row)
        return row

    def _forget(self, unused: set[int]) -> None:
        for row in unused:
            heapq.heappush(self._free, row)
        self._staged, self._reserved = {}, set()

    # -- between rounds

    def touched(self, client: int) -> bool:
        """Whether this client was ever kept."""
        return self._rows[client] is not None

    def load(self, client: int) -> dict[str, Tensor]:
        """Copy a client into the buffer, as it was at the last :meth:`commit`, and return the views of it."""
        return self._store.load(self._rows[client])

    def save(self, client: int) -> None:
        """Make the buffer the client's tensors, at once; not in the middle of a round."""
        turn = self.turn(client)
        self._store.save(turn.written)
        self.stage(client, turn)
        self.commit()

    def close(self) -> None:
        """Close the store."""
        self._store.close()

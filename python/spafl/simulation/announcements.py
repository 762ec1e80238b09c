"""Which announcements each client has yet to hear: the server speaks to all, a client listens at its next turn.

A row of the client store is a client as its last training left it. Whoever works on it first applies what was announced
since, in order and one by one: added up, the same announcements would give other bits. An evaluation does so on its
copy, so the rows, and with them the checkpoints, hold nothing but training. Announcements are small (SpaFL's hold one
number per filter), so all that anybody still lacks are kept, however many they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Announcement:
    """An announcement, encoded, and the round that ended with it."""

    round: int
    frame: bytes


@dataclass
class AnnouncementLog:
    """Announcements that some client's row does not contain.

    Attributes:
        made: number of announcements so far.
        heard: how many of them each client's row contains.
        pending: the newest ones, oldest first; every row contains all before them.
    """

    made: int = 0
    heard: list[int] = field(default_factory=list)
    pending: list[Announcement] = field(default_factory=list)

    def announce(self, round: int, frame: bytes) -> None:
        """Add one that nobody has heard yet."""
        self.pending.append(Announcement(round, frame))
        self.made += 1

    def missed(self, client: int) -> tuple[Announcement, ...]:
        """What a client's row lacks, oldest first."""
        count = self.made - self.heard[client]
        return tuple(self.pending[len(self.pending) - count :]) if count else ()

    def mark_heard(self, client: int) -> None:
        """A client's row contains everything announced so far."""
        self.heard[client] = self.made

    def forget_heard(self) -> None:
        """Drop what every row contains."""
        lacking = self.made - min(self.heard, default=self.made)
        del self.pending[: len(self.pending) - lacking]

    def copy(self) -> AnnouncementLog:
        """One that goes its own way."""
        return replace(self, heard=self.heard.copy(), pending=self.pending.copy())

"""Which announcements each client has yet to hear: the server speaks to all, a client listens at its next turn."""

from __future__ import annotations

from dataclasses import dataclass, field

# Undelivered announcements are kept in memory: past this many, everybody is brought up to date.
MAX_PENDING = 16


@dataclass(frozen=True)
class Announcement:
    """An announcement, encoded, and the round that ended with it."""

    round: int
    frame: bytes


@dataclass
class AnnouncementLog:
    """Announcements that some clients have not received.

    Attributes:
        until: number of announcements made so far.
        received: how many of them each client has received.
        pending: the newest ones, oldest first; every client has received all before them.
    """

    until: int = 0
    received: list[int] = field(default_factory=list)
    pending: list[Announcement] = field(default_factory=list)

    def announce(self, round: int, frame: bytes) -> None:
        """Add one that nobody has received yet."""
        self.pending.append(Announcement(round, frame))
        self.until += 1

    def take(self, client: int) -> tuple[Announcement, ...]:
        """What the client has not received, oldest first; from now on it has."""
        missed = self.until - self.received[client]
        self.received[client] = self.until
        return tuple(self.pending[len(self.pending) - missed :]) if missed else ()

    @property
    def full(self) -> bool:
        """Whether so many are kept that everybody should be brought up to date."""
        return len(self.pending) >= MAX_PENDING

    def forget_received(self) -> None:
        """Drop what every client has received."""
        behind = self.until - min(self.received, default=self.until)
        del self.pending[: len(self.pending) - behind]

"""Rounds on devices: who is asked, how long everybody takes, who is late, and when the round ends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import rng
from ..outcomes import Outcome
from .devices import Device
from .trace import Trace

__all__ = ["Played", "System", "Usage", "Visit"]


@dataclass(frozen=True)
class Usage:
    """What a client's turn took: counted, not measured.

    Args:
        macs: multiply-accumulates executed.
        down, up: bytes received and sent, with names and checksums.
        memory: bytes held at the peak.
    """

    client: int
    macs: float
    down: int
    up: int
    memory: int


@dataclass(frozen=True)
class Visit:
    """A client's turn on its device.

    Args:
        seconds: from the start of the round until its upload is there, or until it broke off.
        joules: that it has used.
    """

    client: int
    outcome: Outcome
    seconds: float
    joules: float


@dataclass(frozen=True)
class Played:
    """A round.

    Args:
        seconds: how long it lasted.
        visits: of the clients that were asked, in that order.
        away: how many were not there to be asked.
    """

    seconds: float
    visits: tuple[Visit, ...]
    away: int

    @property
    def merged(self) -> set[int]:
        """Clients whose uploads came in time."""
        return {v.client for v in self.visits if v.outcome == "in time"}

    @property
    def kept(self) -> set[int]:
        """Clients that have finished their training, in time or not: they keep what they have learned."""
        return {v.client for v in self.visits if v.outcome in ("in time", "late")}

    @property
    def joules(self) -> float:
        """Energy of all clients."""
        return math.fsum(v.joules for v in self.visits)

    def record(self) -> dict[str, Any]:
        """The "system" table of a metrics line."""
        return {
            "seconds": self.seconds,
            "joules": self.joules,
            "away": self.away,
            "clients": [v.client for v in self.visits],
            "outcomes": [v.outcome for v in self.visits],
            "client_seconds": [v.seconds for v in self.visits],
            "client_joules": [v.joules for v in self.visits],
        }


class System:
    """The devices of a run's clients, and the rules of its rounds.

    Args:
        clients, seed: of the run.
        devices: figures by class.
        shares: of the clients that have each class, relative to each other; which client has which is drawn.
        of_clients: the class of every client instead.
        spread: standard deviation of the logarithm of a client's speed, computing and communicating, around that of its
            class.
        availability: chance that a client is there in a round, by itself.
        trace: when clients are there, in addition.
        failure: chance that a turn breaks off, at a moment drawn uniformly from it.
        deadline: seconds after which a round ends; infinity: when all have answered that can.
        over_selection: so many times the clients that are needed are asked; the round ends when as many as are needed
            have answered.
        idle: seconds until the server looks again when nobody is there.
    """

    def __init__(
        self,
        clients: int,
        seed: int,
        devices: Mapping[str, Device],
        shares: Mapping[str, float],
        of_clients: Sequence[str] | None = None,
        spread: float = 0.0,
        availability: float = 1.0,
        trace: Trace | None = None,
        failure: float = 0.0,
        deadline: float = math.inf,
        over_selection: float = 1.0,
        idle: float = 60.0,
    ) -> None:
        self.clients, self.seed = clients, seed
        self.classes = list(of_clients) if of_clients is not None else _drawn_classes(clients, seed, shares)
        speeds = np.exp(spread * rng.numpy_stream(seed, "device speed").standard_normal(clients))
        self.devices = [devices[name].faster(float(s)) for name, s in zip(self.classes, speeds, strict=True)]
        self.availability, self.trace, self.failure = availability, trace, failure
        self.deadline, self.over_selection, self.idle = deadline, over_selection, idle

    # -- one turn

    def seconds(self, usage: Usage) -> float:
        """Of a turn: receive, compute, send."""
        return sum(self._parts(usage))

    def joules(self, usage: Usage) -> float:
        """Of a turn."""
        device = self.devices[usage.client]
        powers = device.down_watts, device.watts, device.up_watts
        return sum(time * power for time, power in zip(self._parts(usage), powers, strict=True))

    def _parts(self, usage: Usage) -> tuple[float, float, float]:
        device = self.devices[usage.client]
        return 8 * usage.down / device.down, 2 * usage.macs / device.flops, 8 * usage.up / device.up

    def fits(self, usage: Usage) -> bool:
        """Whether the turn fits into the device's memory."""
        return usage.memory <= self.devices[usage.client].memory

    # -- one round

    def there(self, round: int, clock: float) -> list[int]:
        """Clients that are there when a round begins, ascending."""
        drawn = rng.numpy_stream(self.seed, "availability", round).random(self.clients) < self.availability
        return [
            k for k in np.flatnonzero(drawn).tolist() if self.trace is None or self.trace.until(k, clock) is not None
        ]

    def asked(self, round: int, clock: float, needed: int) -> tuple[list[int], int]:
        """The clients that are asked to train in a round, in the order drawn, and how many were not there."""
        there = self.there(round, clock)
        count = min(math.ceil(needed * self.over_selection - 1e-9), len(there))
        chosen: list[int] = []
        if count:
            chosen = rng.numpy_stream(self.seed, "sampling", round).choice(len(there), count, replace=False).tolist()
        return [there[i] for i in chosen], self.clients - len(there)

    def play(self, round: int, clock: float, needed: int, usages: Sequence[Usage], away: int = 0) -> Played:
        """What becomes of the turns of a round that begins at ``clock``.

        The server waits until ``needed`` uploads are there, until the deadline, or, without one, until nobody is left
        who could answer; with one it cannot tell who will not. A turn that is too large for its device is declined at
        once. A round in which nobody is there lasts ``idle`` seconds, or until somebody comes by the trace.
        """
        ends = {u.client: self._end(round, clock, u) for u in usages}
        finished = sorted(seconds for outcome, seconds in ends.values() if outcome == "in time")
        if len(finished) >= needed and finished[needed - 1] <= self.deadline:
            length = finished[needed - 1]
        elif math.isfinite(self.deadline) and usages:
            length = self.deadline
        elif usages:
            length = max(seconds for _, seconds in ends.values())
        else:
            length = self._wait(clock)
        visits = []
        for usage in usages:
            outcome, seconds = ends[usage.client]
            energy = self.joules(usage) if outcome == "in time" else self._joules_until(usage, seconds)
            late = outcome == "in time" and seconds > length
            visits.append(Visit(usage.client, "late" if late else outcome, seconds, energy))
        return Played(length, tuple(visits), away)

    def _end(self, round: int, clock: float, usage: Usage) -> tuple[Outcome, float]:
        """How and when a turn ends, whatever the server does."""
        if not self.fits(usage):
            return "too large", 0.0
        seconds = self.seconds(usage)
        draws = rng.numpy_stream(self.seed, "failure", round, usage.client).random(2)
        broken = seconds * float(draws[1]) if draws[0] < self.failure else math.inf
        until = math.inf if self.trace is None else (self.trace.until(usage.client, clock) or clock) - clock
        if min(broken, until) >= seconds:
            return "in time", seconds
        return ("failed", broken) if broken <= until else ("left", until)

    def _joules_until(self, usage: Usage, seconds: float) -> float:
        device, used = self.devices[usage.client], 0.0
        powers = device.down_watts, device.watts, device.up_watts
        for time, power in zip(self._parts(usage), powers, strict=True):
            used += min(time, seconds) * power
            seconds = max(0.0, seconds - time)
        return used

    def _wait(self, clock: float) -> float:
        if self.trace is None:
            return self.idle
        coming = min(self.trace.next(k, clock) for k in range(self.clients))
        return self.idle if not math.isfinite(coming) else max(self.idle, coming - clock)


def _drawn_classes(clients: int, seed: int, shares: Mapping[str, float]) -> list[str]:
    """A class for every client: as many of each as its share says, rounded by largest remainders, in drawn order."""
    total = math.fsum(shares.values())
    exact = {name: clients * share / total for name, share in shares.items()}
    counts = Counter({name: int(value) for name, value in exact.items()})
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])  # stable: the first named of equals
    for name in by_remainder[: clients - counts.total()]:
        counts[name] += 1
    names = [name for name in shares for _ in range(counts[name])]
    return [names[i] for i in rng.numpy_stream(seed, "device class").permutation(clients)]

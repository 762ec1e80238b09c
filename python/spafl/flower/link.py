"""How a server reaches clients, whatever carries the bytes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

from .roster import Roster

# Between two looks at who is there.
_PAUSE = 0.5
_ANSWER = 180.0  # seconds to say who one is: a process that imports PyTorch; who has not is asked again
_FAREWELL = 30.0  # seconds for clients to hear why a run was stopped


class Link(ABC):
    """The clients of a run, by their numbers.

    Args:
        roster: who they are; nodes that are not on it are asked.
    """

    def __init__(self, roster: Roster) -> None:
        self.roster = roster

    # -- what carries the bytes

    @abstractmethod
    def nodes(self) -> set[int]:
        """Numbers of the nodes that are connected."""

    @abstractmethod
    def send(self, kind: str, messages: Mapping[int, bytes], seconds: float) -> dict[int, bytes | str]:
        """Send each node its message; its reply, or in words why there is none after ``seconds``.

        Args:
            kind: ``"query"``, ``"train"`` or ``"evaluate"``.
            messages: by node.
        """

    @abstractmethod
    def say(self, text: str) -> None:
        """Tell whoever watches, in one line."""

    # -- clients

    def gather(self, wanted: Collection[int], seconds: float) -> set[int]:
        """Clients that are there, once all ``wanted`` ones are, or after ``seconds``."""
        end = time.monotonic() + seconds
        while True:
            self._meet(max(1.0, min(_ANSWER, seconds)))
            present = set(self.roster.seats)
            if present >= set(wanted) or time.monotonic() >= end:
                return present
            time.sleep(_PAUSE)

    def _meet(self, seconds: float) -> None:
        strangers = self.roster.strangers(self.nodes())
        if not strangers:
            return
        refused = {}
        question = self.roster.parcel({})
        for node, answer in sorted(self.send("query", dict.fromkeys(strangers, question), seconds).items()):
            if isinstance(answer, str):
                continue  # asked again the next time
            reason = self.roster.meet(node, answer)
            if reason is not None:
                self.say(f"node {node} takes no part: {reason}")
                refused[node] = self.roster.parcel({"refused": reason})
        if refused:  # they should know why, too
            self.send("query", refused, seconds)

    def stop(self, reason: str) -> None:
        """Tell all clients why there will be no further round."""
        farewell = self.roster.parcel({"stopped": reason})
        self.send("query", {seat.node: farewell for seat in self.roster.seats.values()}, _FAREWELL)

    def exchange(self, kind: str, parcels: Mapping[int, bytes], seconds: float) -> dict[int, bytes | str]:
        """Send each client its parcel; its reply, or in words why there is none after ``seconds``.

        A client that was lost on the way is asked once more as soon as it is back, if that is within the time and
        within ``flower.patience``: it may have trained already, and then it only answers.
        """
        end = time.monotonic() + seconds
        answers = self._ask(kind, parcels, seconds)
        why = {client: answer for client, answer in answers.items() if isinstance(answer, str)}
        lost = {client: parcels[client] for client in why}
        left = end - time.monotonic()
        if lost and left > 0:
            for client, reason in why.items():
                self.say(f"client {client}: {reason}; it is asked again once it is back")
                self.roster.seats.pop(client, None)  # it has to say anew where it is
            back = self.gather(lost, min(self.roster.config.flower.patience, left)) & lost.keys()
            left = end - time.monotonic()
            if back and left > 0:
                answers |= self._ask(kind, {client: lost[client] for client in sorted(back)}, left)
        return answers

    def _ask(self, kind: str, parcels: Mapping[int, bytes], seconds: float) -> dict[int, bytes | str]:
        seats = self.roster.seats
        client_of = {seats[client].node: client for client in parcels}
        replies = self.send(kind, {seats[client].node: parcel for client, parcel in parcels.items()}, seconds)
        return {client_of[node]: reply for node, reply in replies.items()}

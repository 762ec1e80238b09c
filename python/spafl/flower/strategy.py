"""The strategy that Flower's server runs: :class:`~spafl.flower.server.Coordinator` over Flower's grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from ..config import RunConfig
from ..simulation.runfolder import RunFolder
from .link import Link
from .message import unwrap, wrap
from .roster import Roster
from .server import Coordinator, TrainingRound, open_run, run_identity, telling_why

_POLL = 0.25  # seconds between looks for replies; Flower's own loop looks every three


class GridLink(Link):
    """Flower's nodes."""

    def __init__(self, roster: Roster, grid: Grid, say: Callable[[str], None]) -> None:
        super().__init__(roster)
        self.grid, self._say = grid, say

    def nodes(self) -> set[int]:
        return set(self.grid.get_node_ids())

    def message(self, kind: str, node: int, parcel: bytes, seconds: float) -> Message:
        """A message to a node that is void after ``seconds``."""
        return Message(wrap(parcel), dst_node_id=node, message_type=kind, ttl=seconds + 5.0)

    def send(self, kind: str, messages: Mapping[int, bytes], seconds: float) -> dict[int, bytes | str]:
        if not messages:
            return {}
        end = time.monotonic() + seconds
        ids = list(self.grid.push_messages([self.message(kind, n, raw, seconds) for n, raw in messages.items()]))
        pending = {id: node for id, node in zip(ids, messages, strict=True) if id}
        replies: dict[int, bytes | str] = dict.fromkeys(messages, f"no answer within {seconds:g} s")
        while pending and time.monotonic() < end:
            for reply in self.grid.pull_messages(list(pending)):
                node = pending.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    replies[node] = answer_of(reply)
            if pending:
                time.sleep(_POLL)
        return replies

    def say(self, text: str) -> None:
        self._say(text)


def answer_of(reply: Message) -> bytes | str:
    """A reply's bytes, or in words why it has none."""
    if reply.has_error():
        return f"Flower reports error {reply.error.code}: {' '.join(str(reply.error.reason).split())[:300]}"
    raw = unwrap(reply)
    return raw if isinstance(raw, bytes) else "the reply holds no SpaFL parcel"


class SpaFLStrategy(Strategy):
    """Any registered algorithm as a Flower strategy.

    Usually :meth:`start` is all that is called. The other methods are its parts in Flower's terms; what Flower would
    hand around as arrays stays in the coordinator, because clients are not all sent the same.

    Args:
        config: of the run.
        out: the run folder, new or to be resumed.
        say: takes lines for whoever watches.
    """

    def __init__(self, config: RunConfig, out: Path, say: Callable[[str], None] = print) -> None:
        self.config, self.out, self.say = config, out, say
        self.coordinator: Coordinator | None = None
        self._asked: TrainingRound | None = None
        self._line: dict[str, Any] = {}

    def summary(self) -> None:
        self.say(f"{self.config.algorithm['name']}, {self.config.rounds} rounds, run folder {self.out}")

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 0,
        timeout: float = 0.0,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run, or resume, to the end; the configuration says all that the other arguments would.

        Raises:
            UserError: too few clients came, or the run folder holds another run or damaged files.
            TooFewUploads: fewer good uploads than ``sampling.min_uploads`` came back in a round.
            WriteError: the disk is full, say.
        """
        self.summary()
        folder = RunFolder(self.out, resume=(self.out / "config.toml").exists())
        try:
            link = GridLink(Roster(self.config, run_identity(folder)), grid, self.say)
            with telling_why(link):
                self.coordinator = open_run(self.config, folder, link)
                self.coordinator.run()
        finally:
            folder.close()
        return Result()

    # -- Flower's terms

    def _parts(self) -> tuple[Coordinator, GridLink]:
        if self.coordinator is None:
            raise RuntimeError("start the strategy first: it has to know its clients")
        assert isinstance(self.coordinator.link, GridLink)
        return self.coordinator, self.coordinator.link

    def _messages(self, kind: str, parcels: Mapping[int, bytes]) -> list[Message]:
        coordinator, link = self._parts()
        seats, seconds = coordinator.roster.seats, self.config.flower.round_timeout
        return [link.message(kind, seats[client].node, parcel, seconds) for client, parcel in parcels.items()]

    def _answers(self, replies: Iterable[Message]) -> dict[int, bytes | str]:
        client_of = {seat.node: client for client, seat in self._parts()[0].roster.seats.items()}
        nodes = {reply.metadata.src_node_id: answer_of(reply) for reply in replies}
        return {client_of[node]: answer for node, answer in nodes.items() if node in client_of}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to the sampled clients that are there; the coordinator counts rounds itself."""
        self._asked = self._parts()[0].ask()
        return self._messages("train", self._asked.parcels)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge, save and book; there are no arrays to hand on."""
        assert self._asked is not None
        self._line = self._parts()[0].take(self._asked, self._answers(replies))
        loss = self._line["train_loss"]
        return None, None if loss is None else MetricRecord({"train_loss": loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to all clients that are there, in rounds that are to be evaluated."""
        coordinator = self._parts()[0]
        if not self._line or not self.config.evaluates(self._line["round"]):
            return []
        return self._messages("evaluate", coordinator.ask_evaluation(self._line))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Enter the clients' figures; mean accuracy, if all told theirs."""
        coordinator = self._parts()[0]
        if not self._line or not self.config.evaluates(self._line["round"]):
            return None
        coordinator.take_evaluation(self._line, self._answers(replies))
        told = self._line["evaluation"]
        return None if told is None else MetricRecord({"accuracy": told["accuracy"]["mean"]})

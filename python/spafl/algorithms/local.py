"""Local: every client trains its own dense model alone; nothing travels.

A client trains in the rounds in which it is sampled, so it gets as many local steps as under a federated method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from spafl_kernels import to_dense

from ..wire import Message
from .base import Algorithm, ServerState, Training, Upload
from .client import Client, Evaluation
from .dense import dense_paper_macs, local_sgd, snapshot


class Local(Algorithm):
    """Dense baseline without communication; momentum starts fresh in every round."""

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        return to_dense(model)

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return snapshot(model)

    def server_state(self, model: nn.Module) -> ServerState:
        return {}

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        return {}

    def train(self, client: Client, message: Message, round: int) -> Training:
        loss, cost = local_sgd(client, round)
        return Training({}, loss, replace(cost, paper_macs=dense_paper_macs(client, cost.steps)))

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        return server, {}

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        return client.evaluate_model(train_data)[0]

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        return 0

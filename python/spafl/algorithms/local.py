"""Local: every client trains its own dense model alone; nothing travels.

A client trains in the rounds in which it is sampled, so it gets as many local steps as under a federated method.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spafl_kernels import to_dense

from ..cost import Cost
from ..wire import Message
from .base import Algorithm, ServerState, Training, Upload
from .client import Client, Evaluation
from .fedavg import dense_paper_macs


class Local(Algorithm):
    """Dense baseline without communication; momentum starts fresh in every round."""

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        return to_dense(model)

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def server_state(self, model: nn.Module) -> ServerState:
        return {}

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        return {}

    def train(self, client: Client, message: Message, round: int) -> Training:
        client.trainer.begin(client.sgd_options(round))
        loss, steps = client.run_sgd(round)
        result = client.trainer.finish()
        return Training({}, loss, Cost(steps=steps, paper_macs=dense_paper_macs(client), executed_macs=result.macs))

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        return server, {}

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        return client.evaluate_model(train_data)[0]

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        return 0

"""FedAvg (McMahan et al., AISTATS 2017): one global dense model, averaged with the clients' sample counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from spafl_kernels import to_dense
from spafl_kernels.training import Extra

from ..wire import Message, payload_bytes
from .aggregate import AggregationOptions
from .base import Algorithm, ServerState, Training, Upload
from .client import Client, Evaluation
from .dense import dense_paper_macs, load_state, local_sgd, merged_models, snapshot


class FedAvg(Algorithm):
    """Dense baseline. BatchNorm statistics are averaged like weights; momentum starts fresh in every round."""

    Options = AggregationOptions
    options: AggregationOptions

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        return to_dense(model)

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return {}

    def server_state(self, model: nn.Module) -> ServerState:
        return snapshot(model)

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        return server

    def extra(self, message: Message) -> Extra | None:
        """What the local gradients have besides the loss."""
        return None

    def train(self, client: Client, message: Message, round: int) -> Training:
        load_state(client.model, message)
        loss, cost = local_sgd(client, round, self.extra(message))
        return Training(snapshot(client.model), loss, replace(cost, paper_macs=dense_paper_macs(client, cost.steps)))

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        return merged_models(server, uploads, self.options), {}

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        return server

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        load_state(client.model, message)
        return client.evaluate_model(train_data)[0]

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        return 2 * sampled * 8 * payload_bytes(server)

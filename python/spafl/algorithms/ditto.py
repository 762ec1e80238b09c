"""Ditto (Li et al., ICML 2021): FedAvg's global model, and beside it a personal one held near it.

A sampled client trains both from what it received: the global model as under FedAvg, its own on
``loss + lam / 2 * |v - w_global|^2``, on the same batches. It is tested with its own. That is twice the work of FedAvg.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor, nn

from ..wire import Message
from .aggregate import AggregationOptions
from .base import ServerState, Training
from .client import Client, Evaluation
from .dense import dense_paper_macs, load_state, local_sgd, proximal, snapshot
from .fedavg import FedAvg


class DittoOptions(AggregationOptions):
    """Settings of Ditto."""

    lam: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Pull of the personal models towards the global one (the paper tries .05 to 2); at 0 they are Local's."""


class Ditto(FedAvg):
    """A personal model has its own BatchNorm statistics; both trainings start with fresh momentum."""

    Options = DittoOptions
    options: DittoOptions

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return snapshot(model)

    def train(self, client: Client, message: Message, round: int) -> Training:
        own = {name: tensor.clone() for name, tensor in client.model.state_dict().items()}
        load_state(client.model, message)
        _, first = local_sgd(client, round)
        upload = snapshot(client.model)
        load_state(client.model, own)
        anchor = {name: message[name].to(own[name].device) for name, _ in client.model.named_parameters()}
        loss, second = local_sgd(client, round, proximal(anchor, self.options.lam))
        cost = first + second
        return Training(upload, loss, replace(cost, paper_macs=dense_paper_macs(client, cost.steps)))

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        return {}

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        return client.evaluate_model(train_data)[0]

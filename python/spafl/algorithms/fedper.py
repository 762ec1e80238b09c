"""FedPer (Arivazhagan et al., arXiv 1912.00818): shared base layers, personal last ones.

The last ``personal`` layers and what is registered behind them stay at the client; the rest is averaged as in FedAvg.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor, nn

from ..wire import Message
from .aggregate import AggregationOptions
from .base import ServerState, Training
from .client import Client, Evaluation
from .dense import dense_paper_macs, load_tensors, local_sgd, snapshot
from .fedavg import FedAvg


class FedPerOptions(AggregationOptions):
    """Settings of FedPer."""

    personal: int = Field(default=1, ge=1)
    """How many of the last convolutions and linear layers are personal; 1 is the classifier alone."""


def personal_names(model: nn.Module, layers: int) -> list[str]:
    """Names of the state dict from the ``layers``-th last convolution or linear layer on, as registered.

    Raises:
        ValueError: there are no more layers than that, so that nothing would be shared.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    if layers >= len(found):
        raise ValueError(f"personal = {layers} leaves nothing to share: the model has {len(found)} layers")
    names = list(model.state_dict())
    start = next(i for i, name in enumerate(names) if name.startswith(f"{found[-layers]}."))
    return names[start:]


class FedPer(FedAvg):
    """Personal layers keep their values between a client's rounds; momentum starts fresh in every round."""

    Options = FedPerOptions
    options: FedPerOptions

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        model = super().prepare_model(model, sample)
        personal_names(model, self.options.personal)
        return model

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return snapshot(model, personal_names(model, self.options.personal))

    def server_state(self, model: nn.Module) -> ServerState:
        personal = set(personal_names(model, self.options.personal))
        return snapshot(model, [name for name in model.state_dict() if name not in personal])

    def train(self, client: Client, message: Message, round: int) -> Training:
        load_tensors(client.model, message)
        loss, cost = local_sgd(client, round)
        return Training(
            snapshot(client.model, message), loss, replace(cost, paper_macs=dense_paper_macs(client, cost.steps))
        )

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        load_tensors(client.model, message)
        return client.evaluate_model(train_data)[0]

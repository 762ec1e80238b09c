"""SCAFFOLD (Karimireddy et al., ICML 2020): control variates take the clients' drift out of the local steps.

A client steps along ``g - c_k + c`` and then sets ``c_k+ = c_k - c + (x - y) / (lr K)`` (option II of the paper). The
server moves by the mean of the clients' changes, and ``c`` by ``|S| / N`` times the mean change of their variates.

With momentum ``(x - y) / (lr K)`` is not the mean gradient: a constant gradient ``g`` moves ``K`` steps of SGD by
``lr g sum_k (1 - beta^k) / (1 - beta)``, which is divided by instead (``lr K`` without momentum). The paper has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from spafl_kernels.training import Extra

from ..wire import Message
from .base import BaseOptions, ServerState, Training, Upload
from .client import Client, steps_of_momentum
from .dense import averaged, dense_paper_macs, load_state, local_sgd, snapshot
from .fedavg import FedAvg

PREFIX = "control:"


class ScaffoldOptions(BaseOptions):
    """Settings of SCAFFOLD."""

    server_lr: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Step of the server along the clients' mean change."""


def split(message: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's tensors, and the control variates by the name of their parameter."""
    model = {name: t for name, t in message.items() if not name.startswith(PREFIX)}
    return model, {n.removeprefix(PREFIX): t for n, t in message.items() if n.startswith(PREFIX)}


def correction(own: Mapping[str, Tensor], common: Mapping[str, Tensor]) -> Extra:
    """``g - c_k + c``."""

    def extra(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, p in parameters.items():
            change = common[name] - own[name]
            p.grad = change if p.grad is None else p.grad.add_(change)

    return extra


class Scaffold(FedAvg):
    """Twice FedAvg's traffic both ways; clients keep their variate. Means are unweighted, as in the paper."""

    Options = ScaffoldOptions  # type: ignore[assignment]
    options: ScaffoldOptions  # type: ignore[assignment]

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        if self.local is not None and self.local.optimizer != "sgd":
            raise ValueError(
                "control variates are mean gradients, read off how far SGD has moved; they need "
                f"training.optimizer = sgd, got {self.local.optimizer}"
            )
        return super().prepare_model(model, sample)

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return {PREFIX + name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def server_state(self, model: nn.Module) -> ServerState:
        return snapshot(model) | {PREFIX + name: torch.zeros_like(p).cpu() for name, p in model.named_parameters()}

    @torch.no_grad()
    def train(self, client: Client, message: Message, round: int) -> Training:
        received, common = split(message)
        load_state(client.model, received)
        start = {name: p.clone() for name, p in client.model.named_parameters()}
        common = {name: t.to(start[name].device) for name, t in common.items()}
        own = {name: client.memory[PREFIX + name] for name in start}
        with torch.enable_grad():
            loss, cost = local_sgd(client, round, correction(own, common))
        upload = snapshot(client.model)
        local = client.local
        moved = local.lr_at(round) * steps_of_momentum(cost.steps, local.momentum, local.nesterov)
        for name, p in client.model.named_parameters():
            change = (start[name] - p) / moved - common[name] if moved else torch.zeros_like(p)
            own[name].add_(change)
            upload[PREFIX + name] = change.cpu()
        return Training(upload, loss, replace(cost, paper_macs=dense_paper_macs(client, cost.steps)))

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        merged: ServerState = {}
        equal = [1.0] * len(uploads)
        for name, old in server.items():
            values = [upload.message[name] for upload in uploads]
            if name.startswith(PREFIX):
                mean = averaged(torch.zeros_like(old), values, equal)
                merged[name] = old + mean * (len(uploads) / clients)
            else:
                mean = averaged(old, values, equal)
                step = self.options.server_lr
                merged[name] = mean if step == 1 or not old.is_floating_point() else old + step * (mean - old)
        return merged, {}

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        return split(server)[0]

"""HeteroFL (Diao et al., ICLR 2021): clients of different strength train the first channels of one global model.

Client ``k`` has the rate ``rates[k mod len(rates)]``: the first ``ceil(rate * channels)`` outputs of each hidden layer,
as a model that really is that small. In training the output of a hidden layer is divided by the rate, and the logits of
classes that a client does not have are 0 in its loss. The server averages every entry over the clients that have it,
each counting alike.

A client is tested with the sub-model of its own rate. BatchNorm's running statistics are kept and averaged for each
rate by itself (the paper does without them and gathers statistics from all clients' data before a test).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from spafl_kernels import to_dense

from ..wire import Message, payload_bytes
from . import narrow
from .base import Algorithm, BaseOptions, ServerState, Training, Upload
from .client import Client, Evaluation
from .dense import dense_paper_macs, load_state, local_sgd, snapshot

SHAPES = "shapes:"


class HeteroFLOptions(BaseOptions):
    """Settings of HeteroFL."""

    rates: tuple[float, ...] = Field(default=(1.0, 0.5, 0.25, 0.125, 0.0625), min_length=1)
    """Shares of the channels; client k has the (k mod number of rates)-th."""
    scaler: bool | Literal["auto"] = "auto"
    """Whether outputs of hidden layers are divided by the rate in training; ``auto``: where the model has BatchNorms.
    Without, a rate of 1/16 makes the logits of LeNet-5 4,096 times as large, and training diverges."""
    masked_loss: bool = True
    """Whether classes without training samples at the client are left out of its loss."""

    @field_validator("rates")
    @classmethod
    def _in_range(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < rate <= 1 for rate in rates) or 1.0 not in rates:
            raise ValueError("rates must be in (0, 1], one of them 1")
        return rates


def _scaled(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output / module.rate if module.training and module.rate != 1 else output  # type: ignore[operator]


def _set_rate(model: nn.Module, rate: float) -> None:
    for module in model.modules():
        if hasattr(module, "rate"):
            module.rate = rate  # type: ignore[assignment]


def _masked_cross_entropy(present: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.masked_fill(~present, 0.0), y)


class HeteroFL(Algorithm):
    """Sub-models run physically small: multiply-accumulates and seconds are theirs."""

    Options = HeteroFLOptions
    options: HeteroFLOptions

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        model = to_dense(model)
        *hidden, _ = narrow.layers_called(model, sample)
        model.narrow_shapes = [narrow.shapes_at(model, sample, rate) for rate in self.options.rates]  # type: ignore[assignment]
        normalised = any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in model.modules())
        scaler = normalised if self.options.scaler == "auto" else self.options.scaler
        for name in hidden if scaler else ():
            layer = model.get_submodule(name)
            layer.rate = 1.0  # type: ignore[assignment]
            layer.register_forward_hook(_scaled)
        return model

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return {}

    def server_state(self, model: nn.Module) -> ServerState:
        """Parameters by name, buffers of each rate under ``RATE:name``, and the table of shapes."""
        shapes: list[narrow.Shapes] = model.narrow_shapes  # type: ignore[assignment]
        state: ServerState = snapshot(model, [name for name, _ in model.named_parameters()])
        for at, width in enumerate(shapes):
            for name, buffer in snapshot(model, [name for name, _ in model.named_buffers()]).items():
                state[f"{at}:{name}"] = buffer[narrow.box(width[name])].clone()
        return state | {SHAPES: narrow.as_table(list(model.state_dict()), shapes)}

    def _width(self, client: int) -> int:
        return client % len(self.options.rates)

    # -- server

    @staticmethod
    def _tensors(server: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
        """A sub-model's tensors, by their names in a model."""
        own = {n.partition(":")[2]: t for n, t in server.items() if n.startswith(f"{width}:")}
        parameters = {name: t for name, t in server.items() if ":" not in name}
        shapes = narrow.from_table(server[SHAPES], [*parameters, *own], width)
        return {name: t[narrow.box(shapes[name])].contiguous() for name, t in parameters.items()} | own

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        return self._tensors(server, self._width(client))

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        merged = dict(server)
        parameters = {name: t for name, t in server.items() if ":" not in name}
        merged |= narrow.merged_tensors(parameters, uploads, [1.0] * len(uploads))
        for at in range(len(self.options.rates)):
            of_width = [u for u in uploads if self._width(u.client) == at]
            buffers = {n.partition(":")[2]: t for n, t in server.items() if n.startswith(f"{at}:")}
            found = narrow.merged_tensors(buffers, of_width, [1.0] * len(of_width))
            merged |= {f"{at}:{name}": t for name, t in found.items()}
        return merged, {}

    # -- client

    def _turn(self, client: Client, message: Message) -> Client:
        """The client on a model as small as the message."""
        at = self._width(client.id)

        def build(model: nn.Module) -> nn.Module:
            small = narrow.resized(model, {name: t.shape for name, t in message.items()})
            _set_rate(small, self.options.rates[at])
            return small

        turn = client.on(("rate", at), build)
        load_state(turn.model, message)
        turn.trainer.loss = F.cross_entropy
        return turn

    def train(self, client: Client, message: Message, round: int) -> Training:
        turn = self._turn(client, message)
        if self.options.masked_loss:
            classes = next(reversed([m for m in turn.model.modules() if isinstance(m, nn.Linear)])).out_features
            present = torch.bincount(client.train.y, minlength=classes) > 0
            device = next(turn.model.parameters()).device
            turn.trainer.loss = partial(_masked_cross_entropy, present.to(device))
        loss, cost = local_sgd(turn, round)
        share = narrow.shares(client.model, {name: t.shape for name, t in message.items()})
        cost = replace(cost, paper_macs=dense_paper_macs(client, cost.steps, share))
        return Training(snapshot(turn.model), loss, cost, {"rate": self.options.rates[self._width(client.id)]})

    # -- evaluation and cost

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        return server

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        turn = self._turn(client, self._tensors(message, self._width(client.id)))
        return turn.evaluate_model(train_data)[0]

    def client_model(
        self, model: nn.Module, server: ServerState, own: Mapping[str, Tensor], client: int
    ) -> nn.Module | None:
        tensors = self._tensors(server, self._width(client))
        small = narrow.resized(model, {name: t.shape for name, t in tensors.items()})
        load_state(small, tensors)
        return small

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        """Expected for clients whose rate is drawn: their sub-models both ways."""
        widths = range(len(self.options.rates))
        of_all = sum(payload_bytes(self._tensors(server, at)) for at in widths)
        return round(2 * sampled * 8 * of_all / len(widths))

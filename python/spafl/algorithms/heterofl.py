"""HeteroFL (Diao et al., ICLR 2021): clients of different strength train the first channels of one global model.

Client ``k`` has the rate ``rates[k mod len(rates)]``: the first ``ceil(rate * channels)`` outputs of each hidden layer,
as a model that really is that small. In training the output of a hidden layer is divided by the rate, and the logits of
classes that a client does not have are 0 in its loss. The server averages every entry over the clients that have it,
each counting alike; the classifier's rows over the clients that have the class too, for which they say which they have.

As in the paper, whose point is one global model for inference, all clients are tested with the whole global model, and
with 0 for the logits of classes that they did not train (none before a client's first turn).

Sources are the paper and its code (diaoenmao/HeteroFL-Computation-and-Communication-Efficient-Federated-Learning-for-
Heterogeneous-Clients at 405aa15). What is otherwise here, and why:

* rates are fixed to clients (the code's mode "fix"; its other mode draws them anew in every round);
* BatchNorm's running statistics are kept and averaged for each rate by itself; the code has none and gathers them from
  all clients' data before a test, which would be traffic that no table has;
* the scaler is on only where there are norms, see :class:`HeteroFLOptions`; the code clips gradients to a norm of 1,
  here the run says.
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

from ..wire import Message
from . import narrow
from .base import Algorithm, BaseOptions, ServerState, Training, Upload
from .client import Client, Evaluation
from .dense import dense_paper_macs, load_state, local_sgd, snapshot
from .objective import Objective

SHAPES, CLASSES = "shapes:", "classes:"


class HeteroFLOptions(BaseOptions):
    """Settings of HeteroFL."""

    rates: tuple[float, ...] = Field(default=(1.0, 0.5, 0.25, 0.125, 0.0625), min_length=1)
    """Shares of the channels; client k has the (k mod number of rates)-th."""
    scaler: bool | Literal["auto"] = "auto"
    """Whether outputs of hidden layers are divided by the rate in training; ``auto``: where the model has BatchNorms.
    Without, a rate of 1/16 makes the logits of LeNet-5 4,096 times as large, and training diverges."""
    masked_loss: bool = True
    """Whether classes without training samples at the client are left out of its loss, its part of the average and its
    tests."""
    tested: Literal["global", "rate"] = "global"
    """Whether clients are tested with the whole model, as in the paper, or with the part of their own rate."""

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
        *hidden, model.narrow_head = narrow.layers_called(model, sample)  # type: ignore[assignment]
        model.narrow_shapes = [narrow.shapes_at(model, sample, rate) for rate in self.options.rates]  # type: ignore[assignment]
        normalised = any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in model.modules())
        scaler = normalised if self.options.scaler == "auto" else self.options.scaler
        for name in hidden if scaler else ():
            layer = model.get_submodule(name)
            layer.rate = 1.0  # type: ignore[assignment]
            layer.register_forward_hook(_scaled)
        return model

    def _no_classes(self, model: nn.Module) -> dict[str, Tensor]:
        """Which classes a client has, by the name of the classifier; none are known."""
        if not self.options.masked_loss:
            return {}
        head: str = model.narrow_head  # type: ignore[assignment]
        return {CLASSES + head: torch.zeros(len(model.get_submodule(head).weight), dtype=torch.uint8)}  # type: ignore[arg-type]

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return self._no_classes(model)

    def server_state(self, model: nn.Module) -> ServerState:
        """Parameters by name, buffers of each rate under ``RATE:name``, shapes, and the form of what clients say of
        their classes."""
        shapes: list[narrow.Shapes] = model.narrow_shapes  # type: ignore[assignment]
        state: ServerState = snapshot(model, [name for name, _ in model.named_parameters()])
        for at, width in enumerate(shapes):
            for name, buffer in snapshot(model, [name for name, _ in model.named_buffers()]).items():
                state[f"{at}:{name}"] = buffer[narrow.box(width[name])].clone()
        return state | {SHAPES: narrow.as_table(list(model.state_dict()), shapes)} | self._no_classes(model)

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

    def expected_upload(self, server: ServerState, round: int, client: int) -> Message:
        said = {name: t for name, t in server.items() if name.startswith(CLASSES)}
        return {**self.broadcast(server, round, client), **said}

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        merged = dict(server)
        parameters = {name: t for name, t in server.items() if ":" not in name}
        rows = {}
        for name in server:
            if name.startswith(CLASSES):
                own = [upload.message[name] > 0 for upload in uploads]
                layer = name.removeprefix(CLASSES)
                rows = {n: own for n in parameters if n.rpartition(".")[0] == layer}
        merged |= narrow.merged_tensors(parameters, uploads, [1.0] * len(uploads), rows)
        for at in range(len(self.options.rates)):
            of_width = [u for u in uploads if self._width(u.client) == at]
            buffers = {n.partition(":")[2]: t for n, t in server.items() if n.startswith(f"{at}:")}
            found = narrow.merged_tensors(buffers, of_width, [1.0] * len(of_width))
            merged |= {f"{at}:{name}": t for name, t in found.items()}
        return merged, {}

    def objective_fault(self, objective: Objective) -> str | None:
        if self.options.masked_loss and not objective.of_classes:
            return "algorithm.masked_loss leaves out classes; with numbers as targets it must be false"
        return None

    # -- client

    def _turn(self, client: Client, message: Message, at: int) -> Client:
        """The client on a model as small as the message, which is of the ``at``-th rate."""

        def build(model: nn.Module) -> nn.Module:
            small = narrow.resized(model, {name: t.shape for name, t in message.items()})
            _set_rate(small, self.options.rates[at])
            return small

        turn = client.on(("rate", at), build)
        load_state(turn.model, message)
        turn.trainer.loss = client.objective.function
        return turn

    def train(self, client: Client, message: Message, round: int) -> Training:
        at = self._width(client.id)
        turn = self._turn(client, message, at)
        for classes in self._said(client.memory).values():
            present = torch.bincount(client.train.y, minlength=len(classes)) > 0
            classes.copy_(present)
            turn.trainer.loss = partial(_masked_cross_entropy, present.to(next(turn.model.parameters()).device))
        loss, cost = local_sgd(turn, round)
        share = narrow.shares(client.model, {name: t.shape for name, t in message.items()})
        cost = replace(cost, paper_macs=dense_paper_macs(client, cost.steps, share))
        said = {name: classes.cpu().clone() for name, classes in self._said(client.memory).items()}
        return Training(snapshot(turn.model) | said, loss, cost, {"rate": self.options.rates[at]})

    # -- evaluation and cost

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        return server

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        at = self._tested(client.id)
        turn = self._turn(client, self._tested_tensors(message, client.memory, at), at)
        return turn.evaluate_model(train_data)[0]

    @staticmethod
    def _said(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for name, t in memory.items() if name.startswith(CLASSES)}

    def _tested(self, client: int) -> int:
        return self._width(client) if self.options.tested == "rate" else self.options.rates.index(1.0)

    def _tested_tensors(self, server: Mapping[str, Tensor], own: Mapping[str, Tensor], at: int) -> dict[str, Tensor]:
        """A sub-model's tensors for a client's test; the logits of classes that it does not have come out as 0."""
        tensors = self._tensors(server, at)
        for name, classes in self._said(own).items():
            absent = (classes == 0).cpu()
            if absent.all():  # it has not had a turn yet
                continue
            for kind in ("weight", "bias"):
                if (row := f"{name.removeprefix(CLASSES)}.{kind}") in tensors:
                    tensors[row] = tensors[row].clone()
                    tensors[row][absent] = 0
        return tensors

    def client_model(
        self, model: nn.Module, server: ServerState, own: Mapping[str, Tensor], client: int
    ) -> nn.Module | None:
        tensors = self._tested_tensors(server, own, self._tested(client))
        small = narrow.resized(model, {name: t.shape for name, t in tensors.items()})
        load_state(small, tensors)
        return small

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        """Expected for clients whose rate is drawn: their sub-models both ways."""
        return narrow.both_ways(sampled, [self._tensors(server, at) for at in range(len(self.options.rates))])

"""FedP3 (Yi et al., ICLR 2024): a client gets some layers whole and the others pruned, and sends back the whole ones.

The server prunes its model by magnitude, layer by layer, to ``global_keep``. Client ``k`` has ``layers`` hidden layers
whole: the ``(k mod hidden layers)``-th and those that follow, around the end; they come dense and travel back. The
others come pruned, are trained with their mask for the client's sake, and stay there, as does the classifier, which
never travels. A layer's new value is the mean over the clients that sent it, each counting alike. A client is tested
with its own model, as its last local training left it.

Sources are the paper and its code (SonyResearch/FedP3 at 6dfa933). What is otherwise here, and why:

* the code trains all clients in every round; here a client keeps its model between its turns;
* the code shares layers out among four blocks of clients by number; ``k mod hidden layers`` does so for any number;
* the code uploads and averages classifiers too, and nobody reads the average: here it does not travel;
* the code does not keep the mask during local training (so that nothing is pruned after a step); the paper's local
  pruning "fixed" does;
* the code clips gradients to a norm of 10; here the run says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from ..wire import Message
from . import masks as m
from .base import Algorithm, BaseOptions, ServerState, Training, Upload
from .client import Client, Evaluation
from .dense import averaged, dense_paper_macs, local_sgd, masked, snapshot

OF_LAYER = "layer:"


class FedP3Options(BaseOptions):
    """Settings of FedP3."""

    layers: int = Field(default=2, ge=1)
    """Hidden layers that a client trains whole and sends back: 1 is the paper's LowerB, 2 its OPU2, 3 its OPU3; all if
    there are no more."""
    global_keep: float = Field(default=0.9, gt=0, le=1)
    """Share of the weights of every other hidden layer that the server sends, as in the published code."""


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """With which layer each tensor of the state dict goes.

    Norms and the like go with the layer before them, as registered; what comes before all layers with the first.
    """
    layers, at, numbers = list(m.weight_layers(model)), 0, {}
    for name in model.state_dict():
        module = name.rpartition(".")[0]
        at = layers.index(module) if module in layers else at
        numbers[name] = at
    return numbers


class FedP3(Algorithm):
    """Multiply-accumulates by formula are those of what a client has; what runs is dense, so they are not seconds."""

    Options = FedP3Options
    options: FedP3Options
    steady_uploads = False
    macs_are_seconds = False

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        model = m.prunable(model)
        if len(m.weight_layers(model)) < 2:
            raise ValueError("FedP3 hands out layers, and this model has only one")
        return model

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return snapshot(model)

    def server_state(self, model: nn.Module) -> ServerState:
        """All but the last layer, and the number of the layer that each tensor goes with."""
        numbers = layer_numbers(model)
        hidden = {name: number for name, number in numbers.items() if number < max(numbers.values())}
        return snapshot(model, hidden) | {OF_LAYER + name: torch.tensor(number) for name, number in hidden.items()}

    # -- who has what

    @staticmethod
    def _hidden(server: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for name, t in server.items() if not name.startswith(OF_LAYER)}

    def _whole(self, numbers: Mapping[str, int], client: int) -> set[int]:
        """Numbers of the hidden layers that a client has whole."""
        hidden = max(numbers.values()) + 1
        return {(client + at) % hidden for at in range(min(self.options.layers, hidden))}

    def _uploaded(self, server: Mapping[str, Tensor], client: int) -> list[str]:
        numbers = {name: int(server[OF_LAYER + name]) for name in self._hidden(server)}
        whole = self._whole(numbers, client)
        return [name for name, number in numbers.items() if number in whole]

    # -- messages

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        whole, message = set(self._uploaded(server, client)), {}
        for name, tensor in self._hidden(server).items():
            if name in whole or not (name.endswith("weight") and tensor.dim() >= 2):
                message[name] = tensor
                continue
            mask = m.largest(tensor.abs(), max(1, int(self.options.global_keep * tensor.numel())))
            message[m.VALUES + name] = tensor[mask]
            message[m.MASK + name] = m.pack(mask)
        return message

    def expected_upload(self, server: ServerState, round: int, client: int) -> Message:
        return {name: server[name] for name in self._uploaded(server, client)}

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        merged = dict(server)
        for name, old in self._hidden(server).items():
            values = [upload.message[name] for upload in uploads if name in upload.message]
            if values:
                merged[name] = averaged(old, values, [1.0] * len(values))
        return merged, {}

    # -- client

    def train(self, client: Client, message: Message, round: int) -> Training:
        own = client.model.state_dict()
        masks: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in m.layers_of(message, m.MASK):
                masks[name] = m.unpack(message[m.MASK + name], own[name].shape).to(own[name].device)
                own[name].copy_(m.scattered(message[m.VALUES + name], masks[name]))
            for name, tensor in m.rest_of(message).items():
                own[name].copy_(tensor)
        loss, cost = local_sgd(client, round, masked(masks))
        macs = dense_paper_macs(client, cost.steps, self._shares(client.model, masks))
        numbers = layer_numbers(client.model)
        hidden = {name: number for name, number in numbers.items() if number < max(numbers.values())}
        whole = self._whole(hidden, client.id)
        upload = snapshot(client.model, [name for name, number in hidden.items() if number in whole])
        return Training(upload, loss, replace(cost, paper_macs=macs))

    @staticmethod
    def _shares(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, float]:
        pruned = {layer: masks.get(m.weight_name(layer)) for layer in m.weight_layers(model)}
        return {layer: 1.0 if mask is None else mask.double().mean().item() for layer, mask in pruned.items()}

    # -- evaluation and cost

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        evaluation = client.evaluate_model(train_data)[0]
        weights = m.weight_layers(client.model)
        # A weight is 0 where it was pruned, and nowhere else but by chance.
        evaluation.densities = {layer: w.count_nonzero().item() / w.numel() for layer, w in weights.items()}
        return evaluation

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        """Expected for a client whose layers are drawn: its own layers both ways, of the others what is kept."""
        bits: dict[int, int] = {}
        down: dict[int, float] = {}
        for name, tensor in self._hidden(server).items():
            number, size = int(server[OF_LAYER + name]), 8 * tensor.numel() * tensor.element_size()
            pruned = name.endswith("weight") and tensor.dim() >= 2
            bits[number] = bits.get(number, 0) + size
            # A mask is one bit for a weight.
            kept = self.options.global_keep * size + tensor.numel() if pruned else size
            down[number] = down.get(number, 0.0) + kept
        chance = min(self.options.layers, len(bits)) / len(bits)
        return round(sampled * (2 * chance * sum(bits.values()) + (1 - chance) * sum(down.values())))

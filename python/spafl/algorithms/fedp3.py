"""FedP3 (Yi et al., ICLR 2024): a client gets some layers whole and the others pruned, and sends back the whole ones.

The server prunes its model by magnitude, layer by layer, to ``global_keep``. A client's own layers (``layers`` of the
hidden ones, drawn once, and the classifier) come dense and travel back; the pruned ones are trained with their mask for
the client's sake and forgotten. A layer's new value is the mean over the clients that sent it.

The published code lacks its main program: this is our reading of the paper, see docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import rng
from ..wire import Message
from . import masks as m
from .base import Algorithm, BaseOptions, ServerState, Training, Upload
from .client import Client, Evaluation
from .dense import averaged, dense_paper_macs, load_state, local_sgd, masked, snapshot

SEED, OF_LAYER = "seed:", "layer:"


class FedP3Options(BaseOptions):
    """Settings of FedP3."""

    layers: int = Field(default=2, ge=1)
    """Hidden layers that a client trains whole and sends back (the paper's OPU2); all if there are no more."""
    global_keep: float = Field(default=0.9, gt=0, le=1)
    """Share of the weights of every other layer that the server sends."""


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
        return {}

    def server_state(self, model: nn.Module) -> ServerState:
        """The model, the number of the layer that each tensor goes with, and the seed of the draws."""
        numbers = {OF_LAYER + name: torch.tensor(number) for name, number in layer_numbers(model).items()}
        return snapshot(model) | numbers | {SEED: torch.tensor(m.seed_of(model))}

    # -- who has what

    @staticmethod
    def _model(server: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for name, t in server.items() if name != SEED and not name.startswith(OF_LAYER)}

    def _whole(self, server: Mapping[str, Tensor], client: int) -> set[int]:
        """Numbers of the layers that a client has whole."""
        last = max(int(t) for name, t in server.items() if name.startswith(OF_LAYER))
        draw = rng.numpy_stream(int(server[SEED]), "layers of a client", 0, client)
        return {last, *draw.permutation(last)[: self.options.layers].tolist()}

    def _uploaded(self, server: Mapping[str, Tensor], client: int) -> list[str]:
        whole = self._whole(server, client)
        return [name for name in self._model(server) if int(server[OF_LAYER + name]) in whole]

    def _view(self, server: Mapping[str, Tensor], client: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of a client's model, dense, and the masks of those that are pruned, by name."""
        whole, tensors, masks = self._whole(server, client), {}, {}
        for name, tensor in self._model(server).items():
            tensors[name] = tensor
            if name.endswith("weight") and tensor.dim() >= 2 and int(server[OF_LAYER + name]) not in whole:
                count = max(1, round(self.options.global_keep * tensor.numel()))
                masks[name] = m.largest(tensor.abs(), count)
                tensors[name] = tensor * masks[name]
        return tensors, masks

    # -- messages

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        tensors, masks = self._view(server, client)
        message = {name: t for name, t in tensors.items() if name not in masks}
        for name, mask in masks.items():
            message[m.VALUES + name] = tensors[name][mask]
            message[m.MASK + name] = m.pack(mask)
        return message

    def expected_upload(self, server: ServerState, round: int, client: int) -> Message:
        return {name: server[name] for name in self._uploaded(server, client)}

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        merged = dict(server)
        for name, old in self._model(server).items():
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
        pruned = {numbers[name] for name in masks}
        whole = [name for name, number in numbers.items() if number not in pruned]
        return Training(snapshot(client.model, whole), loss, replace(cost, paper_macs=macs))

    @staticmethod
    def _shares(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, float]:
        pruned = {layer: masks.get(m.weight_name(layer)) for layer in m.weight_layers(model)}
        return {layer: 1.0 if mask is None else mask.double().mean().item() for layer, mask in pruned.items()}

    # -- evaluation and cost

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        return server

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        tensors, masks = self._view(message, client.id)
        load_state(client.model, tensors)
        evaluation = client.evaluate_model(train_data)[0]
        evaluation.densities = self._shares(client.model, masks)
        return evaluation

    def client_model(
        self, model: nn.Module, server: ServerState, own: Mapping[str, Tensor], client: int
    ) -> nn.Module | None:
        load_state(model, self._view(server, client)[0])
        return model

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        """Expected for a client whose hidden layers are drawn: its own layers both ways, of the others what is kept."""
        bits: dict[int, int] = {}
        down: dict[int, float] = {}
        for name, tensor in self._model(server).items():
            number, size = int(server[OF_LAYER + name]), 8 * tensor.numel() * tensor.element_size()
            pruned = name.endswith("weight") and tensor.dim() >= 2
            bits[number] = bits.get(number, 0) + size
            # A mask is one bit for a weight.
            kept = self.options.global_keep * size + tensor.numel() if pruned else size
            down[number] = down.get(number, 0.0) + kept
        last = max(bits)
        chance = min(self.options.layers, last) / last
        up = bits[last] + chance * sum(n for number, n in bits.items() if number != last)
        others = (1 - chance) * sum(n for number, n in down.items() if number != last)
        return round(sampled * (2 * up + others))

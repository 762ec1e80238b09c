"""FedSpa (Huang et al., arXiv 2201.11380): every client trains its own sparse part of one dense global model.

A client receives the weights of its own mask, trains them, and uploads them. Then it drops a share of its smallest
weights and grows as many by the size of the gradient of one batch; the new mask travels with the upload, so that the
server knows what to send next time. The server adds the mean of the clients' changes to its dense model; a weight that
a client does not have counts as unchanged there.

All clients start with one random mask. A client is tested with its mask on the global model.

No code of the authors' was found. Masks are searched as in the code of the related DisPFL (rong-dai/DisPFL at e2f47d4):
density .5 by ERK, one first mask for all, a share of ``adjust_share / 2 (1 + cos(pi round / rounds))`` from .5 on, and
the gradient of one batch. DisPFL clips gradients to a norm of 10; here the run says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..wire import Message, payload_bytes
from . import masks as m
from .base import Algorithm, BaseOptions, ServerState, Training, Upload
from .client import Client, Evaluation
from .dense import averaged, dense_paper_macs, local_sgd, masked, snapshot


class FedSpaOptions(BaseOptions):
    """Settings of FedSpa."""

    density: float = Field(default=0.5, gt=0, le=1)
    """Share of the weights of convolutions and linear layers that a client has."""
    budget: m.Budget = "erk"
    """How the layers share them."""
    search: Literal["dynamic", "static"] = "dynamic"
    """``dynamic``: masks are pruned and grown; ``static``: the random mask stays."""
    adjust_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the kept weights that a client replaces after its training at first; it falls to 0 as a cosine."""
    adjust_until: int = Field(default=500, ge=1)
    """Round from which masks stay; in DisPFL the last one of a run."""


def _of_client(client: int, layer: str) -> str:
    return f"{m.MASK}{client}:{layer}"


class FedSpa(Algorithm):
    """Multiply-accumulates by formula are those of the kept weights; what runs is dense, so they are not seconds."""

    Options = FedSpaOptions
    options: FedSpaOptions
    steady_uploads = False
    macs_are_seconds = False

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        return m.prunable(model)

    def _first_masks(self, model: nn.Module) -> dict[str, Tensor]:
        weights = m.weight_layers(model)
        kept = m.budgets(weights, self.options.density, self.options.budget)
        return m.random_masks(weights, kept, m.seed_of(model))

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return {m.MASK + name: m.pack(mask) for name, mask in self._first_masks(model).items()}

    def server_state(self, model: nn.Module) -> ServerState:
        return snapshot(model) | {m.MASK + name: m.pack(mask) for name, mask in self._first_masks(model).items()}

    # -- messages

    @staticmethod
    def _mask(server: ServerState, client: int, layer: str) -> Tensor:
        """The client's mask as the server knows it: its last, or the first of all."""
        bits = server.get(_of_client(client, layer), server[m.MASK + layer])
        return m.unpack(bits, server[m.weight_name(layer)].shape)

    @staticmethod
    def _layers(server: ServerState) -> list[str]:
        return [layer for layer in m.layers_of(server, m.MASK) if ":" not in layer]

    def _unpruned(self, server: ServerState) -> dict[str, Tensor]:
        dense = {m.weight_name(layer) for layer in self._layers(server)}
        return {name: t for name, t in m.rest_of(server).items() if name not in dense}

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        masks = {layer: self._mask(server, client, layer) for layer in self._layers(server)}
        weights = {layer: server[m.weight_name(layer)] for layer in masks}
        return m.sparse_values(weights, masks) | self._unpruned(server)

    def expected_upload(self, server: ServerState, round: int, client: int) -> Message:
        masks = {m.MASK + layer: server[m.MASK + layer] for layer in self._layers(server)}
        return {**self.broadcast(server, round, client), **(masks if self.options.search == "dynamic" else {})}

    def upload_fault(self, server: ServerState, message: Message) -> str | None:
        shapes = {m.SHAPE + n: torch.tensor(server[m.weight_name(n)].shape) for n in self._layers(server)}
        return m.mask_fault(message, shapes)

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        merged = dict(server)
        for layer in self._layers(server):
            name = m.weight_name(layer)
            old = server[name].double()
            change = torch.zeros_like(old)
            for upload in uploads:
                mask = self._mask(server, upload.client, layer)
                change[mask] += upload.message[m.VALUES + layer].double() - old[mask]
                if m.MASK + layer in upload.message:
                    merged[_of_client(upload.client, layer)] = upload.message[m.MASK + layer]
            merged[name] = (old + change / len(uploads)).to(server[name].dtype)
        equal = [1.0] * len(uploads)
        for name, tensor in self._unpruned(server).items():
            merged[name] = averaged(tensor, [u.message[name] for u in uploads], equal)
        return merged, {}

    # -- client

    @staticmethod
    def _own_masks(client: Client) -> dict[str, Tensor]:
        weights = m.weight_layers(client.model)
        return {name: m.unpack(client.memory[m.MASK + name], w.shape).to(w.device) for name, w in weights.items()}

    def train(self, client: Client, message: Message, round: int) -> Training:
        masks = self._own_masks(client)
        m.load_sparse(client.model, message, masks)
        extra = masked({m.weight_name(name): mask for name, mask in masks.items()})
        loss, cost = local_sgd(client, round, extra)
        share = {name: mask.double().mean().item() for name, mask in masks.items()}
        cost = replace(cost, paper_macs=dense_paper_macs(client, cost.steps, share))
        weights = m.weight_layers(client.model)
        upload = m.sparse_values(weights, masks) | snapshot(client.model, m.rest_of(message))
        if self.options.search == "static":
            return Training(upload, loss, cost)
        gradients, of_batch = m.dense_gradients(client, masks, round)
        replaced = m.cosine(self.options.adjust_share, round, self.options.adjust_until)
        for name, weight in weights.items():
            bits = m.pack(m.prune_and_grow(weight, masks[name], gradients[name], replaced)[1])
            client.memory[m.MASK + name].copy_(bits)
            upload[m.MASK + name] = bits
        return Training(upload, loss, cost + of_batch)

    # -- evaluation and cost

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        return m.rest_of(server)

    @torch.no_grad()
    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        masks = self._own_masks(client)
        self._load_global(client.model, message, masks)
        return m.densities_of(masks, client.evaluate_model(train_data)[0])

    @staticmethod
    def _load_global(model: nn.Module, message: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        own = model.state_dict()
        for name, tensor in message.items():
            own[name].copy_(tensor)
        for layer, mask in masks.items():
            own[m.weight_name(layer)].mul_(mask)

    def client_model(
        self, model: nn.Module, server: ServerState, own: Mapping[str, Tensor], client: int
    ) -> nn.Module | None:
        masks = {layer: self._mask(server, client, layer) for layer in self._layers(server)}
        self._load_global(model, m.rest_of(server), masks)
        return model

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        """Kept values and unpruned tensors both ways, and the new mask up, one bit for a weight."""
        layers = self._layers(server)
        bits = sum(server[m.weight_name(n)].numel() for n in layers) if self.options.search == "dynamic" else 0
        return sampled * (2 * 8 * payload_bytes(self.broadcast(server, 0, -1)) + bits)

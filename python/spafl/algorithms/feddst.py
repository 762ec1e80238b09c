"""FedDST (Bibikar et al., AAAI 2022): one global sparse model whose mask the clients move by pruning and growing.

The first mask keeps the largest of the first weights of each layer. Clients train the weights of the mask. In every
``adjust_every``-th round each sampled client drops a share of its smallest weights after half of its epochs, grows as
many from 0 by the size of the gradient of one batch, trains on, and uploads its mask too. The server averages every
weight over the clients that have it, by sample counts, and keeps the largest of each layer. All clients are tested with
the global model.

Sources are the paper and its code (bibikar/feddst at 25d6184). What is otherwise here, and why:

* the code's default adjusts after the last of ten epochs, so that what is grown is still 0 when the server keeps the
  largest; half of the epochs let it be trained first;
* the code grows among all weights, and so sets kept ones of a large gradient to 0; here among those that are left out;
* the code's share is ``share^2 / 2 (1 + cos)``, for it multiplies by the share twice; here ``share / 2 (1 + cos)``;
* ERK scales densities (Evci et al., ICML 2020); the code scales sparsities, which comes out nearly uniform;
* masks travel as bits, one for a weight (the code bills the kept share of that). Nobody but the server remembers one,
  so a sampled client receives it with the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from ..cost import Cost
from ..wire import Message, payload_bytes
from . import masks as m
from .base import Algorithm, BaseOptions, ServerState, Training, Upload
from .client import Client, Evaluation
from .dense import averaged, dense_paper_macs, local_sgd, masked, snapshot

ADJUSTING = "adjusting"
_SERVER_ONLY = (m.SHAPE, ADJUSTING)


class FedDSTOptions(BaseOptions):
    """Settings of FedDST."""

    sparsity: float = Field(default=0.8, ge=0, lt=1)
    """Share of the weights of convolutions and linear layers that is 0."""
    budget: m.Budget = "erk"
    """How the layers share what is kept."""
    adjust_every: int = Field(default=10, ge=1)
    """Rounds between two changes of the mask."""
    adjust_share: float = Field(default=0.05, ge=0, le=1)
    """Share of the kept weights that a change replaces at first; it falls to 0 as a cosine. The authors' runs of MNIST
    have .05, of CIFAR .01."""
    adjust_until: int = Field(default=200, ge=1)
    """Round from which the mask stays; in the published code half of the run's rounds, by default 400."""


class FedDST(Algorithm):
    """Multiply-accumulates by formula are those of the kept weights; what runs is dense, so they are not seconds."""

    Options = FedDSTOptions
    options: FedDSTOptions
    steady_uploads = False
    macs_are_seconds = False

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        return m.prunable(model)

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return {}

    def server_state(self, model: nn.Module) -> ServerState:
        weights = m.weight_layers(model)
        kept = m.budgets(weights, 1 - self.options.sparsity, self.options.budget)
        chosen = {name: m.largest(weight.abs(), kept[name]) for name, weight in weights.items()}
        dense = {m.weight_name(name) for name in weights}
        state = m.sparse_values(weights, chosen) | {m.MASK + name: m.pack(mask) for name, mask in chosen.items()}
        state |= {m.SHAPE + name: torch.tensor(w.shape) for name, w in weights.items()}
        return state | snapshot(model, [n for n in model.state_dict() if n not in dense]) | {ADJUSTING: torch.tensor(0)}

    def adjusts(self, round: int) -> bool:
        """Whether the mask is changed in a round."""
        return 0 < round < self.options.adjust_until and round % self.options.adjust_every == 0

    # -- messages

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        return {name: t for name, t in server.items() if not name.startswith(_SERVER_ONLY)}

    def expected_upload(self, server: ServerState, round: int, client: int) -> Message:
        adjusts = self.adjusts(round)
        return {
            name: t for name, t in self.broadcast(server, round, client).items()
            if adjusts or not name.startswith(m.MASK)
        }  # fmt: skip

    def upload_fault(self, server: ServerState, message: Message) -> str | None:
        return m.mask_fault(message, server)

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        merged = dict(server)
        weights = [float(upload.samples) for upload in uploads]
        for name in m.rest_of(self.broadcast(server, round, 0)):
            merged[name] = averaged(server[name], [u.message[name] for u in uploads], weights)
        for layer in m.layers_of(server, m.VALUES):
            values = [u.message[m.VALUES + layer] for u in uploads]
            if not self.adjusts(round):
                merged[m.VALUES + layer] = averaged(server[m.VALUES + layer], values, weights)
                continue
            shape = server[m.SHAPE + layer].tolist()
            masks = [m.unpack(u.message[m.MASK + layer], shape) for u in uploads]
            merged |= _merged_layer(layer, values, masks, weights)
        merged[ADJUSTING] = torch.tensor(int(self.adjusts(round + 1)))
        return merged, {}

    # -- client

    def _received(self, client: Client, message: Message) -> dict[str, Tensor]:
        weights = m.weight_layers(client.model)
        masks = {n: m.unpack(message[m.MASK + n], w.shape).to(w.device) for n, w in weights.items()}
        m.load_sparse(client.model, message, masks)
        return masks

    def train(self, client: Client, message: Message, round: int) -> Training:
        masks = self._received(client, message)
        share = {name: mask.double().mean().item() for name, mask in masks.items()}
        batches = client.training_batches(round)
        # Half of the epochs: what is grown has to be trained before it is judged by its size.
        length = client.batches_per_epoch()
        before = client.planned_steps // length // 2 * length if self.adjusts(round) else None
        losses, cost = [], Cost()
        if before is not None:
            if before:
                loss, part = self._sgd(client, round, masks, itertools.islice(batches, before))
                losses, cost = [(loss, part.steps)], cost + part
            masks, part = self._adjusted(client, masks, round)
            cost += part
        loss, part = self._sgd(client, round, masks, batches)
        losses, cost = [*losses, (loss, part.steps)], cost + part
        cost += Cost(paper_macs=dense_paper_macs(client, cost.steps, share))
        upload = self._upload(client, masks, self.adjusts(round))
        return Training(upload, sum(v * n for v, n in losses) / max(cost.steps, 1), cost)

    @staticmethod
    def _sgd(client: Client, round: int, masks: dict[str, Tensor], batches: object) -> tuple[float, Cost]:
        extra = masked({m.weight_name(name): mask for name, mask in masks.items()})
        return local_sgd(client, round, extra, batches)  # type: ignore[arg-type]

    def _adjusted(self, client: Client, masks: dict[str, Tensor], round: int) -> tuple[dict[str, Tensor], Cost]:
        gradients, cost = m.dense_gradients(client, masks, round)
        share = m.cosine(self.options.adjust_share, round, self.options.adjust_until)
        new = {}
        with torch.no_grad():
            for name, weight in m.weight_layers(client.model).items():
                stays, new[name] = m.prune_and_grow(weight, masks[name], gradients[name], share)
                weight.mul_(stays)  # what is grown starts at 0, also where it was dropped just now
        return new, replace(cost, steps=0)

    @staticmethod
    def _upload(client: Client, masks: dict[str, Tensor], with_masks: bool) -> Message:
        weights = m.weight_layers(client.model)
        dense = {m.weight_name(name) for name in weights}
        upload = m.sparse_values(weights, masks)
        upload |= snapshot(client.model, [n for n in client.model.state_dict() if n not in dense])
        return upload | {m.MASK + n: m.pack(mask) for n, mask in masks.items()} if with_masks else upload

    # -- evaluation and cost

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        return self.broadcast(server, round, 0)

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        masks = self._received(client, message)
        return m.densities_of(masks, client.evaluate_model(train_data)[0])

    def client_model(
        self, model: nn.Module, server: ServerState, own: Mapping[str, Tensor], client: int
    ) -> nn.Module | None:
        shapes = {n: server[m.SHAPE + n].tolist() for n in m.layers_of(server, m.VALUES)}
        masks = {n: m.unpack(server[m.MASK + n], shape) for n, shape in shapes.items()}
        m.load_sparse(model, self.broadcast(server, 0, client), masks)
        return model

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        """Kept values and unpruned tensors both ways; in a round that changes the mask, this as bits, both ways."""
        message = self.broadcast(server, 0, 0)
        floats = {name: t for name, t in message.items() if not name.startswith(m.MASK)}
        bits = sum(int(server[m.SHAPE + n].prod()) for n in m.layers_of(server, m.VALUES))
        return 2 * sampled * (8 * payload_bytes(floats) + int(server[ADJUSTING]) * bits)


def _merged_layer(
    layer: str, values: Sequence[Tensor], masks: Sequence[Tensor], weights: Sequence[float]
) -> dict[str, Tensor]:
    """``sum n m w / sum n m`` over the clients, of which the largest are kept, as many as a client has."""
    total = torch.zeros(masks[0].shape, dtype=torch.float64)
    held = torch.zeros_like(total)
    for value, mask, weight in zip(values, masks, weights, strict=True):
        total += m.scattered(value.double(), mask) * weight
        held += mask * weight
    mean = total / held.clamp_min(1e-300)
    new = m.largest(torch.where(held > 0, mean.abs(), -1.0), len(values[0]))
    return {m.VALUES + layer: mean[new].to(values[0].dtype), m.MASK + layer: m.pack(new)}

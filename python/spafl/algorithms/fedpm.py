"""FedPM (Isik et al., ICLR 2023): weights stay as they were drawn; what is learned and sent is which of them to use.

Every weight is ``+c`` or ``-c`` (its first sign; ``c = weight_scale / sqrt(fan in)``) and has a score ``s``, at first
from a standard normal distribution: it is used with probability ``sigmoid(s)``. A client trains scores with Adam,
through samples of the mask (straight through the sampling), and uploads one sample of its mask, a bit for a weight.
The server counts: ``theta = (alpha - 1) / (alpha + beta - 2)`` with ``alpha`` and ``beta`` one plus the ones and zeros
received since the last reset, and sends ``logit(theta)``. All clients are tested with one sample of the global mask.

Sources are the paper and its code (BerivanIsik/sparse-random-networks at cf6b549). What is otherwise here, and why:

* a score's gradient is that of its probability times ``sigmoid'``, as the paper derives it; the code multiplies it by
  the probability once more (``Bern.backward``), which Adam mostly takes out again;
* Adam's moments start fresh in every round, as those of all methods here; the code keeps them at the client,
  which would be two more floats for each weight and client;
* biases and the scale and shift of norms are not learned: 0, 1 and 0. The code draws and masks biases like weights (its
  networks have no norms). Running statistics travel and are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from spafl_kernels.computed import ComputedConv2d, ComputedLinear, ComputedWeight

from .. import rng
from ..wire import Message, payload_bytes
from . import masks as m
from .base import Algorithm, BaseOptions, ServerState, Training, Upload
from .client import Client, Evaluation
from .dense import averaged, dense_paper_macs, load_tensors, local_sgd, snapshot

SCORES, ONES, ZEROS, SEED = ".scores", "ones:", "zeros:", "seed:"
NEVER = 0.01
"""A received bit counts as this or as one minus this (published code): no probability gets stuck at 0 or 1."""


class FedPMOptions(BaseOptions):
    """Settings of FedPM."""

    variant: Literal["published"] = "published"
    """Presets ``training``: Adam at a learning rate of .1, as the published code trains scores. Their gradients are
    small: SGD needs a learning rate of about 10."""
    weight_scale: float = Field(default=math.e, gt=0, allow_inf_nan=False)
    """Weights are this divided by ``sqrt(fan in)``, with their sign; e as in the published code."""
    reset_every: int = Field(default=1, ge=1)
    """Rounds after which the server forgets its counts; 1 as in the published code: the mean of the sampled masks."""


class _Sampled(torch.autograd.Function):
    """A sample of Bernoulli(p); its gradient is passed on to p."""

    @staticmethod
    def forward(ctx: object, p: Tensor) -> Tensor:  # type: ignore[override]
        return (torch.rand_like(p) < p).to(p.dtype)  # as torch.bernoulli, in a third of the time

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class _Scored(ComputedWeight):
    """A layer whose weight is fixed and whose scores are trained.

    In train mode the mask is sampled; in eval mode it is what the sign of the scores says.
    """

    scores: nn.Parameter

    def freeze(self, scale: float, generator: torch.Generator) -> None:
        """Fix the weight at +-scale / sqrt(fan in) by its sign, drop the bias, and draw scores."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        c = scale / math.sqrt(weight[0].numel())
        self.register_buffer("weight", torch.where(weight.detach() >= 0, c, -c).to(weight.dtype))
        self.scores = nn.Parameter(torch.randn(weight.shape, generator=generator).to(weight))
        if self._parameters.get("bias") is not None:
            self._parameters["bias"] = None

    def computed_weight(self) -> Tensor:
        if not self.training:
            return self.weight * (self.scores > 0)
        return self.weight * _Sampled.apply(torch.sigmoid(self.scores))


class ScoredConv2d(_Scored, ComputedConv2d):
    """A convolution of that kind."""


class ScoredLinear(_Scored, ComputedLinear):
    """A linear layer of that kind."""


_CLASSES: dict[type, type[_Scored]] = {nn.Conv2d: ScoredConv2d, nn.Linear: ScoredLinear}


def scored(model: nn.Module, scale: float) -> nn.Module:
    """A dense model, in place, with scores on every convolution and linear layer and nothing else to train."""
    generator = torch.Generator().manual_seed(m.seed_of(model))
    for p in model.parameters():
        p.requires_grad_(False)
    for module in model.modules():
        if type(module) in _CLASSES:
            module.__class__ = _CLASSES[type(module)]
            assert isinstance(module, _Scored)
            module.freeze(scale, generator)
        elif (
            isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm))
            and module.weight is not None
        ):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    return model


class FedPM(Algorithm):
    """What runs is dense: multiply-accumulates by formula are FedAvg's. A weight is a bit up and a float down."""

    Options = FedPMOptions
    options: FedPMOptions
    presets: ClassVar = {"published": {"training": {"optimizer": "adam", "lr": 0.1}}}
    macs_are_seconds = False

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        return scored(m.prunable(model), self.options.weight_scale)

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return {}

    def server_state(self, model: nn.Module) -> ServerState:
        names = [n for n in model.state_dict() if n.endswith(SCORES)]
        statistics = [n for n, _ in model.named_buffers() if not n.endswith("weight")]
        server = snapshot(model, names + statistics) | {SEED: torch.tensor(m.seed_of(model))}
        for name in names:
            server[ONES + name] = torch.zeros_like(server[name])
            server[ZEROS + name] = torch.zeros_like(server[name])
        return server | self._test_masks(server, 0)

    # -- messages

    @staticmethod
    def _scores(server: Mapping[str, Tensor]) -> list[str]:
        return [n for n in server if n.endswith(SCORES) and not n.startswith((ONES, ZEROS, m.MASK))]

    @staticmethod
    def _statistics(server: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in server.items() if not n.endswith(SCORES) and n != SEED}

    def _test_masks(self, server: ServerState, round: int) -> dict[str, Tensor]:
        """The one sample of the global mask that all clients are tested with."""
        generator = rng.torch_stream(int(server[SEED]), "mask of a test", round)
        names = sorted(self._scores(server))
        return {m.MASK + n: m.pack(torch.bernoulli(torch.sigmoid(server[n]), generator=generator) > 0) for n in names}

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        return {name: server[name] for name in self._scores(server)} | self._statistics(server)

    def expected_upload(self, server: ServerState, round: int, client: int) -> Message:
        return {n: t for n, t in server.items() if n.startswith(m.MASK)} | self._statistics(server)

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        merged = dict(server)
        for name in self._scores(server):
            shape, fresh = server[name].shape, round % self.options.reset_every == 0
            samples = [m.unpack(upload.message[m.MASK + name], shape) for upload in uploads]
            ones = torch.stack(samples).sum(0).to(server[name].dtype)
            zeros = len(samples) - ones
            if not fresh:
                ones, zeros = ones + server[ONES + name], zeros + server[ZEROS + name]
            merged[ONES + name], merged[ZEROS + name] = ones, zeros
            theta = NEVER + (1 - 2 * NEVER) * ones / (ones + zeros)
            merged[name] = torch.logit(theta)
        equal = [1.0] * len(uploads)
        for name, tensor in self._statistics(server).items():
            merged[name] = averaged(tensor, [u.message[name] for u in uploads], equal)
        return merged | self._test_masks(merged, round + 1), {}

    # -- client

    def train(self, client: Client, message: Message, round: int) -> Training:
        load_tensors(client.model, message)
        loss, cost = local_sgd(client, round)
        generator = client.torch_stream("mask", round)
        upload: dict[str, Tensor] = snapshot(client.model, self._statistics(message))
        for name in sorted(self._scores(message)):  # a message has another order after a run was resumed
            p = torch.sigmoid(client.model.get_parameter(name).detach().cpu())
            upload[m.MASK + name] = m.pack(torch.bernoulli(p, generator=generator) > 0)
        return Training(upload, loss, replace(cost, paper_macs=dense_paper_macs(client, cost.steps)))

    # -- evaluation and cost

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        return self.expected_upload(server, round, 0)

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        masks = self._load_masks(client.model, message)
        return m.densities_of(masks, client.evaluate_model(train_data)[0])

    @torch.no_grad()
    def _load_masks(self, model: nn.Module, message: Mapping[str, Tensor]) -> dict[str, Tensor]:
        masks = {}
        for name in m.layers_of(message, m.MASK):
            scores = model.get_parameter(name)
            mask = m.unpack(message[m.MASK + name], scores.shape)
            scores.copy_(mask.to(scores.dtype) * 2 - 1)
            masks[name.removesuffix(SCORES)] = mask
        load_tensors(model, self._statistics({n: t for n, t in message.items() if not n.startswith(m.MASK)}))
        return masks

    def client_model(
        self, model: nn.Module, server: ServerState, own: Mapping[str, Tensor], client: int
    ) -> nn.Module | None:
        self._load_masks(model, self.expected_upload(server, 0, client))
        return model

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        """A float down and at most a bit up for each weight (the paper's estimate is its entropy, and forgets the way
        down), and the running statistics both ways."""
        weights = sum(server[name].numel() for name in self._scores(server))
        return sampled * (33 * weights + 2 * 8 * payload_bytes(self._statistics(server)))

"""What methods with dense models share: messages that are whole models, local SGD, averaging, the paper's count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spafl_kernels.training import Extra

from ..cost import Cost
from ..wire import Message
from .aggregate import AggregationOptions, robust_mean
from .base import Upload
from .client import Client

Batches = Iterable[tuple[Tensor, Tensor]]


def dense_paper_macs(client: Client, steps: int, share: Mapping[str, float] | None = None) -> float:
    """``3 E D sum share MAC``: forward plus twice that for backward, counted over the layers that SpaFL would mask.

    Args:
        steps: that were done; ``E`` is how many passes over the samples they are.
        share: of each layer that is computed, by name; all of it by default.
    """
    per_sample = sum(macs * (1.0 if share is None else share[name]) for name, macs in client.macs.items())
    return 3.0 * client.epochs_of(steps) * len(client.train) * per_sample


@torch.no_grad()
def load_tensors(model: nn.Module, message: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model's of the same names, in place; names that the model does not have raise KeyError."""
    own = model.state_dict()
    for name, tensor in message.items():
        own[name].copy_(tensor)


def load_state(model: nn.Module, message: Message) -> None:
    """Copy a message that holds a whole state dict into a model, in place."""
    own = model.state_dict()
    if own.keys() != message.keys():
        missing = sorted(own.keys() ^ message.keys())
        raise ValueError(f"message and model differ in tensor {missing[0]!r}")
    load_tensors(model, message)


def snapshot(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Copies, on the CPU, of a model's tensors: all of its state dict, or those named."""
    state = model.state_dict()
    return {name: state[name].detach().cpu().clone() for name in (state if names is None else names)}


def local_sgd(
    client: Client, round: int, extra: Extra | None = None, batches: Batches | None = None
) -> tuple[float, Cost]:
    """Training of the client's model from a fresh optimiser: mean batch loss, steps, executed multiply-accumulates.

    Args:
        extra: see :class:`spafl_kernels.training.Trainer`.
        batches: those of the turn by default.
    """
    client.trainer.begin(client.sgd_options(round), extra=extra)
    loss, steps = client.run_sgd(round, batches)
    return loss, Cost(steps=steps, executed_macs=client.trainer.finish().macs)


def proximal(anchor: Mapping[str, Tensor], strength: float) -> Extra:
    """The gradient of ``strength / 2 * |w - anchor|^2``, for all parameters."""

    def extra(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, p in parameters.items():
            pull = (p.detach() - anchor[name]) * strength
            p.grad = pull if p.grad is None else p.grad.add_(pull)

    return extra


def masked(masks: Mapping[str, Tensor]) -> Extra:
    """No gradient where a mask is 0: entries that start at 0 stay there, with momentum and weight decay too."""

    def extra(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, mask in masks.items():
            if parameters[name].grad is not None:
                parameters[name].grad.mul_(mask)  # type: ignore[union-attr]

    return extra


def averaged(old: Tensor, values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum weights values / sum weights`` in float64, in the dtype of ``old`` (whole numbers are rounded)."""
    total = sum(weights)
    mean = torch.zeros_like(old, dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        mean += value.double() * (weight / total)
    return _as(mean, old)


def _as(value: Tensor, old: Tensor) -> Tensor:
    return (value if old.is_floating_point() else value.round()).to(old.dtype)


def merged_models(
    server: Mapping[str, Tensor], uploads: Sequence[Upload], options: AggregationOptions
) -> dict[str, Tensor]:
    """Every tensor of the server as the clients' average by sample counts, or as the options say."""
    weights = [float(upload.samples) for upload in uploads]
    merged: dict[str, Tensor] = {}
    for name, old in server.items():
        values = [upload.message[name] for upload in uploads]
        if options.aggregation == "mean":
            merged[name] = averaged(old, values, weights)
        else:
            stacked = torch.stack([value.double() for value in values])
            merged[name] = _as(robust_mean(stacked, options.aggregation, options.trim), old)
    return merged

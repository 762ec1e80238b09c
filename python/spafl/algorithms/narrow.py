"""Narrower copies of a model: the first channels of every hidden layer, stored and computed as small as they are.

What a width means for a model is found by running it: a layer reads as many channels as come in and has its share of
outputs; the last layer keeps all its classes. Whether that is the same function as the full model with everything else
0 is checked on random numbers, so that a model whose channels are cut up or shuffled on the way (attention heads, say)
is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..wire import payload_bytes
from .base import Upload
from .dense import averaged

Shapes = dict[str, tuple[int, ...]]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def part_of(channels: int, rate: float) -> int:
    """``ceil(rate * channels)``; the rate is a decimal, so .2 of 5 is 1."""
    return math.ceil(round(rate * channels, 9))


def layers_called(model: nn.Module, sample: Tensor) -> list[str]:
    """Names of the convolutions and linear layers in the order in which they are called.

    Raises:
        ValueError: the model has other tensors than those of convolutions, linear layers and BatchNorms, which nobody
            can say how to narrow; or a layer is called twice or never.
    """
    for name, module in model.named_modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        plain = type(module) in (nn.Conv2d, nn.Linear, *_NORMS) and getattr(module, "groups", 1) == 1
        if any(t is not None for t in own) and not plain:
            raise ValueError(
                f"its model cannot be narrowed: {name or 'the model'} ({type(module).__name__}) has tensors of its "
                "own, and only convolutions, linear layers and BatchNorms can be cut"
            )
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: called.append(name))
        for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]  # fmt: skip
    try:
        with torch.no_grad():
            copy_mode = {m: m.training for m in model.modules()}
            model.eval()(sample)
            for module, mode in copy_mode.items():
                module.training = mode
    finally:
        for handle in handles:
            handle.remove()
    if len(called) != len(handles) or len(set(called)) != len(called):
        raise ValueError("its model cannot be narrowed: a layer is called twice or never")
    return called


@torch.no_grad()
def shapes_at(model: nn.Module, sample: Tensor, rate: float) -> Shapes:
    """The shapes of a model's tensors where every hidden layer has the first ``ceil(rate * channels)`` outputs.

    Args:
        model: dense.
        sample: one input, with a batch dimension.

    Raises:
        ValueError: the model cannot be narrowed; one sentence.
    """
    called = layers_called(model, sample)
    small = copy.deepcopy(model).double().eval()
    # Something that no channel can be mistaken for another in.
    generator = torch.Generator().manual_seed(0)
    for name, tensor in small.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(
                torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + (0.1 if "var" in name else -0.5)
            )
    wide = copy.deepcopy(small)
    names = {module: name for name, module in small.named_modules()}

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        axis = -1 if isinstance(module, nn.Linear) else 1
        channels = args[0].shape[axis]
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is None or not tensor.dim():
                    continue
                rows = channels
                if not isinstance(module, _NORMS):
                    full = tensor.shape[0]
                    rows = full if names[module] == called[-1] else part_of(full, rate)
                tensor.data = (tensor[:rows, :channels] if tensor.dim() > 1 else tensor[:rows]).clone()

    cut_ones = (nn.Conv2d, nn.Linear, *_NORMS)
    handles = [m.register_forward_pre_hook(cut) for m in small.modules() if isinstance(m, cut_ones)]
    x = torch.rand(2, *sample.shape[1:], generator=generator, dtype=torch.float64)
    try:
        got = small(x)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"its model cannot be narrowed: channels do not fit together at width {rate} ({said})"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    shapes = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
    for name, tensor in wide.state_dict().items():
        outside = torch.ones_like(tensor, dtype=torch.bool)
        outside[box(shapes[name])] = False
        tensor[outside] = 0
    expected = wide(x)
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-8, atol=1e-10):
        raise ValueError(f"its model cannot be narrowed: at width {rate} it mixes channels up")
    return shapes


def box(shape: Sequence[int]) -> tuple[slice, ...]:
    """The index of the first entries along every axis."""
    return tuple(slice(n) for n in shape)


def resized(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """``model``, in place, with tensors of these shapes, each the first entries of what it was."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        tensor.data = tensor.detach()[box(shapes[name])].clone()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, _NORMS) and module.weight is not None:
            module.num_features = len(module.weight)
    return model


def shares(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Which part of its weights each layer has at these shapes."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found[name] = math.prod(shapes[f"{name}.weight"]) / module.weight.numel()
    return found


# -- a table of shapes as a tensor of the server's state


def as_table(names: Sequence[str], widths: Sequence[Shapes]) -> Tensor:
    """``(widths, names, 5)`` int64: number of axes, then sizes; -1 axes where a width does not have the tensor."""
    table = torch.full((len(widths), len(names), 5), -1, dtype=torch.int64)
    for at, shapes in enumerate(widths):
        for row, name in enumerate(sorted(names)):
            if name in shapes:
                table[at, row, 0] = len(shapes[name])
                table[at, row, 1 : 1 + len(shapes[name])] = torch.tensor(shapes[name], dtype=torch.int64)
    return table


def from_table(table: Tensor, names: Sequence[str], width: int) -> Shapes:
    """The shapes of one width."""
    rows: list[list[Any]] = table[width].tolist()
    return {name: tuple(row[1 : 1 + row[0]]) for name, row in zip(sorted(names), rows, strict=True) if row[0] >= 0}


def merged_parts(
    old: Tensor, parts: Sequence[Tensor], weights: Sequence[float], rows: Sequence[Tensor] | None = None
) -> Tensor:
    """Every entry as the average over the parts that have it; where none has, as it was.

    Args:
        old: whole.
        parts: each the first entries of it along every axis.
        weights: one for each part.
        rows: for each part, which of its rows (along the first axis) it is to be taken to have, bool; all by default.
    """
    if rows is None and all(part.shape == old.shape for part in parts):
        return averaged(old, parts, weights)
    total = torch.zeros(old.shape, dtype=torch.float64)
    held = torch.zeros_like(total)
    for at, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        has = torch.ones(len(part), dtype=torch.float64) if rows is None else rows[at].double()
        has = weight * has.view(-1, *[1] * (part.dim() - 1))
        total[box(part.shape)] += part.double() * has
        held[box(part.shape)] += has
    return torch.where(held > 0, total / held.clamp_min(1e-300), old.double()).to(old.dtype)


def merged_tensors(
    server: Mapping[str, Tensor],
    uploads: Sequence[Upload],
    weights: Sequence[float],
    rows: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """:func:`merged_parts` of every tensor of the server's that somebody sent.

    Args:
        rows: by the name of a tensor that all uploads have; see there.
    """
    merged = {}
    for name, old in server.items():
        holders = [(u.message[name], w) for u, w in zip(uploads, weights, strict=True) if name in u.message]
        if holders:
            parts, of_parts = [part for part, _ in holders], [w for _, w in holders]
            merged[name] = merged_parts(old, parts, of_parts, (rows or {}).get(name))
    return merged


def both_ways(sampled: int, widths: Sequence[Mapping[str, Tensor]]) -> int:
    """Bits that are expected of clients whose width is drawn, and who send and receive what it holds."""
    return round(2 * sampled * 8 * sum(payload_bytes(dict(tensors)) for tensors in widths) / len(widths))

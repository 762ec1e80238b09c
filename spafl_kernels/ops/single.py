"""One layer of one client through the operators: shapes as PyTorch's own functions have them, and choice of backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..reference import Estimator
from ..threshold_layer import Planned
from . import arguments, backend, direct, library
from .narrow import narrow


def _check_dtype(input: Tensor, weight: Tensor) -> None:
    if input.device != weight.device:
        raise ValueError(f"input is on {input.device} but weight is on {weight.device}")
    if input.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise ValueError(f"input must have the dtype of weight outside autocast; got {input.dtype} and {weight.dtype}")


def _choose(input: Tensor, weight: Tensor, groups: int, work: backend.Work) -> backend.Backend:
    """The implementation that runs; a fallback is said, or an error."""
    choice = backend.choose(input, weight, groups, work)
    if choice.fallback:
        backend.fall_back(choice.reason)
    return choice.backend


def _client(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


def _clients(planned: Planned | None) -> tuple[Tensor, ...]:
    return () if planned is None else (planned.plan.unsqueeze(0), planned.packed.unsqueeze(0))


# ----------------------------------------------------------------------------------------------- checked calls
@dataclasses.dataclass(frozen=True)
class _Known:
    """A direct call that was checked and for which the packed kernels were chosen."""

    options: direct.Options
    # What autocast and an uneven padding="same" make of the input first.
    dtype: torch.dtype | None
    pad: tuple[int, ...] | None
    # Keeps a table alive whose identity is one of the facts.
    table: Any


# By the facts of the call, so that a layer is looked at when something about it changes, and not in every step.
_known: dict[Hashable, _Known] = {}
_MOST = 4096  # a program whose shapes never repeat starts over


def _facts(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, planned: Planned | None, *rest: Hashable
) -> Hashable | None:
    """Everything that checks and choice depend on; None for a call that operators must see."""
    if not (backend.on_gpu(weight) and direct.plain(input, weight, threshold, bias)):
        return None
    table = backend.table_of(weight.get_device())
    return (
        input.shape, input.dtype, input.get_device(), weight.shape, weight.dtype, weight.get_device(),
        threshold.shape, threshold.dtype, threshold.get_device(),
        None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
        None if planned is None else (planned.plan.shape, planned.packed.shape, planned.packed.dtype),
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None, backend.REQUESTED,
        None if table is None else (id(table), backend.way(), backend.tf32(True), backend.tf32(False)), rest,
    )  # fmt: skip


def _direct(
    facts: Hashable, input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, planned: Planned | None,
    options: direct.Options, pad: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """A first call with these facts: checks, and remembers that they are right. ``input`` is padded already."""
    dtype = None
    if torch.is_autocast_enabled("cuda"):
        cast = library.cast(input, "cuda")
        dtype, input = None if cast is input else cast.dtype, cast
    plan, packed = (None, None) if planned is None else planned
    first = input.unsqueeze(0), weight.unsqueeze(0)
    dims = (3, 3) if options.geometry is None else (5, 5)
    arguments.check(*first, threshold.unsqueeze(0), _client(bias), options.estimator, dims)
    arguments.check_planned(*first, _client(plan), _client(packed))
    if len(_known) >= _MOST:
        _known.clear()
    _known[facts] = _Known(options, dtype, pad, backend.table_of(weight.get_device()))
    return direct.call(input, weight, threshold, bias, plan, packed, options)


def _again(
    known: _Known, input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, planned: Planned | None
) -> Tensor:
    """Another call with the same facts."""
    if known.pad is not None:
        input = F.pad(input, known.pad)
    if known.dtype is not None:
        input = input.to(known.dtype)
    plan, packed = (None, None) if planned is None else planned
    return direct.call(input, weight, threshold, bias, plan, packed, known.options)


# ----------------------------------------------------------------------------------------------- the two layers
def linear(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, estimator: Estimator, mask_bias: bool,
    density: float = 1.0, planned: Planned | None = None,
) -> Tensor:  # fmt: skip
    """One linear layer through the operator, or the reference with a stated reason. Shapes as ``F.linear`` has them."""
    facts = _facts(input, weight, threshold, bias, planned, estimator, mask_bias, density)
    known = None if facts is None else _known.get(facts)
    if known is not None:
        if input.dim() == 2:
            return _again(known, input, weight, threshold, bias, planned)
        y = _again(known, input.reshape(-1, input.shape[-1]), weight, threshold, bias, planned)
        return y.reshape(*input.shape[:-1], weight.shape[0])
    _check_dtype(input, weight)
    chosen = _choose(input, weight, 1, backend.linear_work(input, weight, density))
    if chosen == "reference":
        return reference.threshold_linear(input, weight, threshold, bias, estimator, mask_bias)
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must have {weight.shape[1]} features, as weight has; got shape {tuple(input.shape)}")
    rows = input.reshape(-1, input.shape[-1])
    if chosen == "narrow":
        y = narrow(rows, weight, threshold, bias, estimator, mask_bias, None)
    elif facts is not None:
        y = _direct(facts, rows, weight, threshold, bias, planned, direct.Options(None, estimator, mask_bias))
    else:
        y = library.call_linear(
            rows.unsqueeze(0), weight.unsqueeze(0), threshold.unsqueeze(0), _client(bias), estimator, mask_bias,
            *_clients(planned),
        )  # fmt: skip
    return y.reshape(*input.shape[:-1], weight.shape[0])


def _pad(
    kernel: Sequence[int], padding: int | Sequence[int] | str, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, ...] | None, tuple[int, int]]:
    """Numbers for ``"same"`` and ``"valid"``; an uneven ``"same"`` pads the input itself first, at the end."""
    if not isinstance(padding, str):
        return None, backend._pair(padding)
    if padding == "valid":
        return None, (0, 0)
    if padding != "same" or stride != (1, 1):
        raise ValueError(f"padding must be numbers, 'valid', or 'same' with stride 1; got {padding!r}, stride {stride}")
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    uneven = (0, total[1] % 2, 0, total[0] % 2) if any(t % 2 for t in total) else None
    return uneven, (total[0] // 2, total[1] // 2)


def conv2d(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
    groups: int,
    estimator: Estimator,
    mask_bias: bool,
    density: float = 1.0,
    planned: Planned | None = None,
) -> Tensor:
    """One convolution through the operator, or the reference with a stated reason. Shapes as ``F.conv2d`` has them."""
    strides, dilations = backend._pair(stride), backend._pair(dilation)
    given = padding if isinstance(padding, str) else backend._pair(padding)
    facts = _facts(
        input, weight, threshold, bias, planned, strides, given, dilations, groups, estimator, mask_bias, density
    )
    known = None if facts is None else _known.get(facts)
    if known is not None:
        if input.dim() == 4:
            return _again(known, input, weight, threshold, bias, planned)
        return _again(known, input.unsqueeze(0), weight, threshold, bias, planned).squeeze(0)
    _check_dtype(input, weight)
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be (N, in, H, W) or (in, H, W); got shape {tuple(input.shape)}")
    chosen = _choose(input, weight, groups, backend.conv_work(input, weight, stride, padding, dilation, density))
    if chosen == "reference":
        return reference.threshold_conv2d(
            input, weight, threshold, bias, stride, padding, dilation, groups, estimator, mask_bias
        )
    pad, pads = _pad(weight.shape[2:], padding, strides, dilations)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    batch = batch if pad is None else F.pad(batch, pad)
    if chosen == "triton" and facts is None:
        y = library.call_conv2d(
            batch.unsqueeze(0), weight.unsqueeze(0), threshold.unsqueeze(0), _client(bias), strides, pads, dilations,
            estimator, mask_bias, *_clients(planned),
        )  # fmt: skip
        y = y.squeeze(0)
    else:
        shape = (1, *batch.shape), (1, *weight.shape)
        geometry = arguments.geometry(*shape, strides, pads, dilations)
        if chosen == "narrow":
            y = narrow(batch, weight, threshold, bias, estimator, mask_bias, geometry)
        else:
            options = direct.Options(geometry, estimator, mask_bias)
            y = _direct(facts, batch, weight, threshold, bias, planned, options, pad)
    return y if input.dim() == 4 else y.squeeze(0)

"""One layer of one client through the operators: shapes as PyTorch's own functions have them, and choice of backend."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backend, eager, reference
from ..reference import Estimator
from ..threshold_layer import Selected, check_layer
from . import arguments, choice, direct, operators
from .geometry import Geometry
from .narrow import narrow
from .tables import choices, tiles


def _check_dtype(input: Tensor, weight: Tensor) -> None:
    if input.device != weight.device:
        raise ValueError(f"input is on {input.device} but weight is on {weight.device}")
    if input.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise ValueError(f"input must have the dtype of weight outside autocast; got {input.dtype} and {weight.dtype}")


def _choose(input: Tensor, weight: Tensor, groups: int, work: choice.Work) -> backend.Backend:
    """The implementation that runs; a fallback is said, or an error."""
    chosen = choice.choose(input, weight, groups, work)
    if chosen.fallback:
        choice.fall_back(chosen.reason)
    return chosen.backend


def _client(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


def _clients(selected: Selected | None) -> tuple[Tensor, ...]:
    return () if selected is None else (selected.selection.unsqueeze(0), selected.packed.unsqueeze(0))


# ----------------------------------------------------------------------------------------------- checked calls
class _Known(NamedTuple):
    """A direct call that was checked and for which the packed kernels were chosen."""

    call: direct.Call
    # What autocast and an uneven padding="same" make of the input first.
    dtype: torch.dtype | None
    pad: tuple[int, ...] | None
    # Keeps tables alive whose identities are among the facts.
    tables: tuple[Any, ...]


# By the facts of the call, so that a layer is looked at when something about it changes, and not in every step.
_known: dict[Hashable, _Known] = {}
_MOST = 4096  # a program whose shapes never repeat starts over


def _facts(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, selected: Selected | None, conv: bool,
    *options: Hashable,
) -> Hashable | None:  # fmt: skip
    """Everything that checks, choice and launches depend on; None for a call that operators must see."""
    if not (choice.on_gpu(weight) and eager.plain(input, weight, threshold, bias)):
        return None
    index, dtype = weight.get_device(), weight.dtype
    return (
        index, dtype, weight.shape, weight.stride(), input.get_device(), input.dtype, input.shape, input.stride(),
        threshold.get_device(), threshold.dtype, threshold.shape, threshold.stride(),
        None if bias is None else (bias.get_device(), bias.dtype, bias.shape, bias.stride()),
        None if selected is None else _facts_of_pass(*selected), _settings(index, dtype, conv), options,
    )  # fmt: skip


def _settings(index: int, dtype: torch.dtype, conv: bool) -> Hashable:
    """What choice and launches depend on beside tensors and a layer's own options."""
    table, measured = choices.SHELF.of(index), tiles.SHELF.of(index)
    return (
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
        dtype == torch.float32 and choice.tf32(conv), backend.REQUESTED,
        None if table is None else (id(table), choice.way()), None if measured is None else id(measured), conv,
    )  # fmt: skip


def _facts_of_pass(selection: Tensor, packed: Tensor) -> Hashable:
    return selection.get_device(), selection.dtype, selection.shape, packed.get_device(), packed.dtype, packed.shape


def _first(
    facts: Hashable, input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, selected: Selected | None,
    geometry: Geometry | None, estimator: Estimator, mask_bias: bool, pad: tuple[int, ...] | None = None,
) -> Tensor | None:  # fmt: skip
    """A first call with these facts: checks, and remembers that they are right; None where operators are to do it.

    ``input`` is padded already.
    """
    dtype = None
    if torch.is_autocast_enabled("cuda"):
        cast = operators.cast(input, "cuda")
        dtype, input = None if cast is input else cast.dtype, cast
    selection, packed = (None, None) if selected is None else selected
    first, dims = (input.unsqueeze(0), weight.unsqueeze(0)), (3, 3) if geometry is None else (5, 5)
    arguments.check(*first, threshold.unsqueeze(0), _client(bias), estimator, dims)
    arguments.check_selected(*first, _client(selection), _client(packed))
    if not direct.possible(input, weight, threshold, bias):
        return None
    tf32 = input.dtype == torch.float32 and choice.tf32(conv=geometry is not None)
    call = direct.Call(input, weight, threshold, bias, geometry, estimator, mask_bias, tf32)
    if len(_known) >= _MOST:
        _known.clear()
    index = weight.get_device()
    _known[facts] = _Known(call, dtype, pad, (choices.SHELF.of(index), tiles.SHELF.of(index)))
    return direct.run(call, input, weight, threshold, bias, selection, packed)


def _again(
    known: _Known, input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, selected: Selected | None
) -> Tensor:
    """Another call with the same facts."""
    if known.pad is not None:
        input = F.pad(input, known.pad)
    if known.dtype is not None:
        input = input.to(known.dtype)
    selection, packed = (None, None) if selected is None else selected
    return direct.run(known.call, input, weight, threshold, bias, selection, packed)


class _Repeated(NamedTuple):
    """A known call that was made again, by what a third one is recognised by."""

    same: direct.Same
    settings: Hashable
    options: tuple[Any, ...]
    known: _Known


# By the weight's identity, which decides nothing (another tensor of these facts is as good), and the input's shape.
_repeated: dict[Hashable, _Repeated] = {}


def _tensors(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, selected: Selected | None
) -> tuple[Tensor, ...]:
    if selected is None:
        return (input, weight, threshold) if bias is None else (input, weight, threshold, bias)
    return (input, weight, threshold, *selected) if bias is None else (input, weight, threshold, bias, *selected)


def _recognise(tensors: tuple[Tensor, ...], biased: bool, conv: bool, options: tuple[Any, ...]) -> _Known | None:
    """The known call that has these facts, if it is the one that the weight had last; in a third of the time."""
    input, weight = tensors[:2]
    if not eager.unseen():
        return None
    found = _repeated.get((id(weight), input.shape, biased, len(tensors)))
    if (
        found is None
        or not found.same(*tensors)
        or found.options != options
        or found.settings != _settings(weight.get_device(), weight.dtype, conv)
    ):
        return None
    return found.known


def _remember(tensors: tuple[Tensor, ...], biased: bool, conv: bool, options: tuple[Any, ...], known: _Known) -> None:
    """Let :func:`_recognise` find this call."""
    input, weight = tensors[:2]
    same = direct.same_as(*tensors)
    if same is None:
        return
    if len(_repeated) >= _MOST:
        _repeated.clear()
    settings = _settings(weight.get_device(), weight.dtype, conv)
    _repeated[id(weight), input.shape, biased, len(tensors)] = _Repeated(same, settings, options, known)


# ----------------------------------------------------------------------------------------------- the two layers
def linear(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, estimator: Estimator, mask_bias: bool,
    density: float = 1.0, selected: Selected | None = None,
) -> Tensor:  # fmt: skip
    """One linear layer through the operator, or the reference with a stated reason. Shapes as ``F.linear`` has them."""
    options, tensors = (estimator, mask_bias, density), _tensors(input, weight, threshold, bias, selected)
    facts, known = None, _recognise(tensors, bias is not None, False, options)
    if known is None:
        facts = _facts(input, weight, threshold, bias, selected, False, *options)
        known = None if facts is None else _known.get(facts)
        if known is not None:
            _remember(tensors, bias is not None, False, options, known)
    if known is not None:
        if input.dim() == 2:
            return _again(known, input, weight, threshold, bias, selected)
        y = _again(known, input.reshape(-1, input.shape[-1]), weight, threshold, bias, selected)
        return y.reshape(*input.shape[:-1], weight.shape[0])
    check_layer(weight, threshold, estimator)
    _check_dtype(input, weight)
    chosen = _choose(input, weight, 1, choice.linear_work(input, weight, density))
    if chosen == "reference":
        return reference.threshold_linear(input, weight, threshold, bias, estimator, mask_bias)
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must have {weight.shape[1]} features, as weight has; got shape {tuple(input.shape)}")
    rows = input.reshape(-1, input.shape[-1])
    found: Tensor | None = None
    if chosen == "narrow":
        found = narrow(rows, weight, threshold, bias, estimator, mask_bias, None)
    elif facts is not None:
        found = _first(facts, rows, weight, threshold, bias, selected, None, estimator, mask_bias)
    if found is None:
        found = operators.call_linear(
            rows.unsqueeze(0), weight.unsqueeze(0), threshold.unsqueeze(0), _client(bias), estimator, mask_bias,
            *_clients(selected),
        )  # fmt: skip
    return found.reshape(*input.shape[:-1], weight.shape[0])


def _pad(
    kernel: Sequence[int], padding: int | Sequence[int] | str, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, ...] | None, tuple[int, int]]:
    """Numbers for ``"same"`` and ``"valid"``; an uneven ``"same"`` pads the input itself first, at the end."""
    if not isinstance(padding, str):
        return None, choice._pair(padding)
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
    selected: Selected | None = None,
) -> Tensor:
    """One convolution through the operator, or the reference with a stated reason. Shapes as ``F.conv2d`` has them."""
    options = (stride, padding, dilation, groups, estimator, mask_bias, density)
    tensors = _tensors(input, weight, threshold, bias, selected)
    facts, known = None, _recognise(tensors, bias is not None, True, options)
    strides, dilations = choice._pair(stride), choice._pair(dilation)
    if known is None:
        given = padding if isinstance(padding, str) else choice._pair(padding)
        facts = _facts(
            input, weight, threshold, bias, selected, True, strides, given, dilations, groups, estimator, mask_bias,
            density,
        )  # fmt: skip
        known = None if facts is None else _known.get(facts)
        if known is not None:
            _remember(tensors, bias is not None, True, options, known)
    if known is not None:
        if input.dim() == 4:
            return _again(known, input, weight, threshold, bias, selected)
        return _again(known, input.unsqueeze(0), weight, threshold, bias, selected).squeeze(0)
    check_layer(weight, threshold, estimator)
    _check_dtype(input, weight)
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be (N, in, H, W) or (in, H, W); got shape {tuple(input.shape)}")
    chosen = _choose(input, weight, groups, choice.conv_work(input, weight, stride, padding, dilation, density))
    if chosen == "reference":
        return reference.threshold_conv2d(
            input, weight, threshold, bias, stride, padding, dilation, groups, estimator, mask_bias
        )
    pad, pads = _pad(weight.shape[2:], padding, strides, dilations)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    batch = batch if pad is None else F.pad(batch, pad)
    found: Tensor | None = None
    if chosen == "narrow" or facts is not None:
        geometry = arguments.geometry((1, *batch.shape), (1, *weight.shape), strides, pads, dilations)
        if chosen == "narrow":
            found = narrow(batch, weight, threshold, bias, estimator, mask_bias, geometry)
        else:
            found = _first(facts, batch, weight, threshold, bias, selected, geometry, estimator, mask_bias, pad)
    if found is None:
        found = operators.call_conv2d(
            batch.unsqueeze(0), weight.unsqueeze(0), threshold.unsqueeze(0), _client(bias), strides, pads, dilations,
            estimator, mask_bias, *_clients(selected),
        )  # fmt: skip
        found = found.squeeze(0)
    return found if input.dim() == 4 else found.squeeze(0)

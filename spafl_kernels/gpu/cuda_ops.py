"""The CUDA C++ operators: threshold pass, active lists, fused optimiser step, compact copies.

The kernels (``csrc/cuda``) treat all layers of a model and all clients of a cohort in one or two launches, write into
tensors that the caller owns, never wait for the device, and may be captured in a CUDA graph. Their library is optional:
importing this module loads nothing, :func:`available` tries once, :func:`why_not` says what is missing.

Every parameter has the client as its leading dimension; for a single model use ``weight.unsqueeze(0)``. Below, C is the
number of clients, L the number of layers, ``O_l`` the filters of layer l and ``T = sum_l O_l``; in ``(C, T)`` tensors
layer l owns the columns ``[sum(O_0 .. O_{l-1}), + O_l)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library

from .. import native

NAMES = (
    "threshold_pass_cuda",
    "active_lists_cuda",
    "fused_step_cuda",
    "compact_gather_cuda",
    "compact_scatter_cuda",
)

_namespace = "spafl"
_reason: str | None = "not loaded yet"


def load(path: str | Path | None = None, namespace: str = "spafl") -> None:
    """Load the library that holds the operators and register their fake implementations.

    Args:
        path: the shared library; default: the package's extension, ``spafl_kernels/_C*.so``.
        namespace: the ``torch.ops`` namespace that the library was built for.

    Raises:
        FileNotFoundError: there is no library at ``path``.
        OSError: the library at ``path`` does not fit this torch.
        RuntimeError: the library was built without CUDA; this torch was built without CUDA; or the package's extension
            is missing or does not fit, which the message explains.
    """
    global _namespace, _reason
    if path is None:
        # Checks that the library fits this torch and this package before it is loaded.
        if not native.available():
            raise RuntimeError(native.why_not())
    elif not Path(path).is_file():
        raise FileNotFoundError(f"no library at {path}")
    elif not _defined(namespace):
        torch.ops.load_library(str(path))
    if not _defined(namespace):
        raise RuntimeError(f"{path or 'the C++ extension'} holds no CUDA kernels: it was built without them")
    # Throws here, not in the middle of training, if this torch does not say on which stream to launch.
    getattr(torch.ops, namespace).require_cuda_stream()
    _register_fakes(namespace)
    _namespace, _reason = namespace, None


def _defined(namespace: str) -> bool:
    name = f"{namespace}::{NAMES[0]}"
    if not hasattr(getattr(torch.ops, namespace), NAMES[0]):
        return False
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CUDA", "CPU"))


def available() -> bool:
    """Whether the operators can be called; tries to load the packaged library the first time."""
    global _reason
    if _reason == "not loaded yet":
        try:
            load()
        except (OSError, RuntimeError) as error:
            _reason = str(error)
    return _reason is None


def why_not() -> str | None:
    """Why :func:`available` is false, or None."""
    return None if available() else _reason


def _op(name: str) -> Any:
    if not available():
        raise RuntimeError(f"{name}: the CUDA operators are not available: {_reason}")
    return getattr(getattr(torch.ops, _namespace), name)


@dataclass(frozen=True)
class MaskState:
    """What the threshold pass knows about a cohort: preallocated, updated in place, all of it on the device.

    Attributes:
        filters: ``O_l`` of every layer.
        pad_to: packed weights have zero rows up to the next multiple of this.
        scores: ``(C, T)``, dtype of the weights: ``mean|w|``.
        mask: ``(C, T)`` bool: ``score > threshold``.
        flipped: ``(C, T)`` bool: the mask changed in the last pass (all true in a first pass).
        active: ``(C, T)`` int32: per layer the active filters, ascending, then -1.
        inverse: ``(C, T)`` int32: the place of a filter in ``active``, -1 if pruned.
        counts: ``(C, L)`` int32: active filters.
        changed: ``(C, L)`` bool: any filter of the layer flipped.
        packed: per layer ``(C, O_l rounded up to pad_to, ...)``: the rows of active filters, then zero rows up to the
            next multiple of ``pad_to``; rows after that keep whatever they held. Empty when packing was not asked for.
    """

    filters: tuple[int, ...]
    pad_to: int
    scores: Tensor
    mask: Tensor
    flipped: Tensor
    active: Tensor
    inverse: Tensor
    counts: Tensor
    changed: Tensor
    packed: tuple[Tensor, ...]

    def layer(self, tensor: Tensor, index: int) -> Tensor:
        """The columns of one layer in a ``(C, T)`` tensor of this state."""
        start = sum(self.filters[:index])
        return tensor[:, start : start + self.filters[index]]


def mask_state(weights: Sequence[Tensor], pad_to: int | None = None) -> MaskState:
    """Uninitialised buffers for :func:`threshold_pass`.

    Args:
        weights: per layer ``(C, O_l, ...)``, float64, float32, float16 or bfloat16.
        pad_to: allocate packed weights too, padded up to multiples of this (1 or more).

    Raises:
        ValueError: no layers, a weight with fewer than 3 dimensions, or ``pad_to < 1``.
    """
    if not weights:
        raise ValueError("weights must name at least one layer")
    for i, weight in enumerate(weights):
        if weight.dim() < 3:
            raise ValueError(f"weights[{i}] must have shape (clients, filters, ...); got {tuple(weight.shape)}")
    if pad_to is not None and pad_to < 1:
        raise ValueError(f"pad_to must be 1 or more; got {pad_to}")
    first = weights[0]
    filters = tuple(weight.shape[1] for weight in weights)
    wide, narrow = (first.shape[0], sum(filters)), (first.shape[0], len(filters))

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=first.device)

    packed: tuple[Tensor, ...] = ()
    if pad_to is not None:
        packed = tuple(_empty_packed(weight, -(-weight.shape[1] // pad_to) * pad_to) for weight in weights)
    return MaskState(
        filters=filters,
        pad_to=pad_to or 1,
        scores=empty(wide, first.dtype),
        mask=empty(wide, torch.bool),
        flipped=empty(wide, torch.bool),
        active=empty(wide, torch.int32),
        inverse=empty(wide, torch.int32),
        counts=empty(narrow, torch.int32),
        changed=empty(narrow, torch.bool),
        packed=packed,
    )


def _empty_packed(weight: Tensor, rows: int) -> Tensor:
    """``(C, rows, ...)`` in the memory order that ``weight`` has within a filter."""
    fan_in = math.prod(weight.shape[2:])
    strides = (rows * fan_in, fan_in, *weight.stride()[2:])
    return torch.empty_strided(
        (weight.shape[0], rows, *weight.shape[2:]), strides, dtype=weight.dtype, device=weight.device
    )


def threshold_pass(
    weights: Sequence[Tensor], thresholds: Sequence[Tensor], state: MaskState, *, compare: bool = True
) -> None:
    """Scores, masks, active lists and packed weights of all layers and clients, into ``state``: two launches.

    The score is summed in fp32 (float64 for float64 weights), divided by the fan-in and rounded once to the dtype of
    the weights; the comparison is made in that dtype. Equal weights have bitwise equal scores wherever they lie in
    memory. A NaN score or threshold prunes, as in :mod:`spafl_kernels.reference`; nothing is raised for it, because
    that would mean waiting for the device.

    Args:
        weights: per layer ``(C, O_l, ...)``; each client one block of memory (contiguous or channels_last), filters
            outermost.
        thresholds: per layer ``(C, O_l)``, dtype of the weights.
        state: from :func:`mask_state`.
        compare: read the former mask in ``state`` to tell flips; False in the first pass, which flags everything.

    Raises:
        RuntimeError: arguments of another dtype, device, shape or memory order than said here, or no CUDA operators.
    """
    _op("threshold_pass_cuda")(
        list(weights),
        list(thresholds),
        compare,
        state.pad_to,
        state.scores,
        state.mask,
        state.flipped,
        state.active,
        state.inverse,
        state.counts,
        state.changed,
        list(state.packed),
    )


def active_lists(weights: Sequence[Tensor], state: MaskState) -> None:
    """The second half of :func:`threshold_pass`, from ``state.mask`` and ``state.flipped``: one launch.

    For use after :func:`fused_step`. Arguments and errors as in :func:`threshold_pass`.
    """
    _op("active_lists_cuda")(
        list(weights),
        state.mask,
        state.flipped,
        state.pad_to,
        state.active,
        state.inverse,
        state.counts,
        state.changed,
        list(state.packed),
    )


@dataclass(frozen=True)
class StepState:
    """Buffers of :func:`fused_step`, preallocated, on the device.

    Attributes:
        learning_rate: float64, ``(1,)`` or ``(C,)``: change it in place, also between replays of a CUDA graph.
        penalty: float64, ``(1,)`` or ``(C,)``: the coefficient c of ``c * sum exp(-tau)``, warm-up included.
        norms: float64 ``(C,)``: the gradient norm before clipping, of the last step that clipped.
        weight_momenta, threshold_momenta, other_momenta: zeros before a first step; empty without momentum.
        partials: float64, scratch.
    """

    learning_rate: Tensor
    penalty: Tensor
    norms: Tensor
    weight_momenta: tuple[Tensor, ...]
    threshold_momenta: tuple[Tensor, ...]
    other_momenta: tuple[Tensor, ...]
    partials: Tensor


def step_state(
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    others: Sequence[Tensor] = (),
    *,
    learning_rate: float,
    penalty: float = 0.0,
    momentum: float = 0.0,
) -> StepState:
    """Buffers for :func:`fused_step`; momentum buffers (zeros) only if ``momentum`` is not 0."""
    if not weights:
        raise ValueError("weights must name at least one layer")
    clients, device = weights[0].shape[0], weights[0].device
    rows = [weight.shape[1] for weight in weights] + [0] * len(others)
    sizes = [math.prod(tensor.shape[1:]) for tensor in (*weights, *others)]

    def buffers(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in tensors) if momentum else ()

    def double(*values: float, size: int = 1) -> Tensor:
        return torch.tensor(values * size, dtype=torch.float64, device=device)

    return StepState(
        learning_rate=double(learning_rate),
        penalty=double(penalty),
        norms=double(float("nan"), size=clients),
        weight_momenta=buffers(weights),
        threshold_momenta=buffers(thresholds),
        other_momenta=buffers(others),
        partials=torch.empty((clients, _op("fused_step_partials")(rows, sizes)), dtype=torch.float64, device=device),
    )


def fused_step(
    weights: Sequence[Tensor],
    weight_grads: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    threshold_grads: Sequence[Tensor],
    others: Sequence[Tensor],
    other_grads: Sequence[Tensor],
    state: StepState,
    masks: MaskState,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    max_norm: float | None = None,
) -> None:
    """One SGD step of a cohort, in place, and the scores, mask and flips that follow from it.

    Two launches; one without clipping. For every client on its own, in the order and with the roundings of PyTorch:
    threshold gradients get ``-c * exp(-tau)``;
    ``clip_grad_norm_`` over all parameters, factor ``min(1, max_norm / (norm + 1e-6))``; ``torch.optim.SGD`` without
    dampening or Nesterov. Gradients are read only. ``masks.scores``, ``masks.mask`` and ``masks.flipped`` are updated
    (a pass of :func:`threshold_pass` must have filled the mask); call :func:`active_lists` for the lists.

    Args:
        weights, weight_grads: per layer ``(C, O_l, ...)``, float32 or float64; gradients in the memory order of their
            weight.
        thresholds, threshold_grads: per layer ``(C, O_l)``.
        others, other_grads: every further parameter, ``(C, ...)``.
        state: from :func:`step_state`; its momenta must be there exactly if ``momentum`` is not 0.
        masks: from :func:`mask_state`.
        momentum: in [0, 1).
        weight_decay: 0 or more.
        max_norm: positive; None: no clipping, and no norm.

    Raises:
        RuntimeError: arguments of another dtype, device, shape or memory order than said here, or no CUDA operators.
    """
    _op("fused_step_cuda")(
        list(weights),
        list(weight_grads),
        list(state.weight_momenta),
        list(thresholds),
        list(threshold_grads),
        list(state.threshold_momenta),
        list(others),
        list(other_grads),
        list(state.other_momenta),
        state.learning_rate,
        state.penalty,
        momentum,
        weight_decay,
        max_norm,
        state.partials,
        state.norms,
        masks.scores,
        masks.mask,
        masks.flipped,
    )


def compact_gather(
    full: Sequence[Tensor],
    compact: Sequence[Tensor],
    masks: MaskState,
    row_layers: Sequence[int],
    column_layers: Sequence[int],
) -> Tensor:
    """``compact <- full``: the active rows and columns, in list order, zeros beyond the counts.

    One launch for all tensors. Every tensor is seen as ``(C, rows, outer, columns, inner)``: a convolution's weight has
    outer 1 and inner ``kH * kW``, its channels_last storage outer ``kH * kW`` and inner 1, a bias ``(C, O, 1, 1, 1)``.

    Args:
        full: ``(C, R, outer, K, inner)``, each client contiguous; any of the dtypes of :func:`threshold_pass`, all the
            same.
        compact: ``(C, r, outer, k, inner)``, each client contiguous, ``r`` and ``k`` large enough for the counts.
        masks: lists and counts.
        row_layers: per tensor the layer whose active filters are its rows, -1: keep all rows.
        column_layers: the same for columns: the layer that feeds this one, -1: keep all columns.

    Returns:
        int32 ``(C, len(full))`` on the device: rows and columns that ``compact`` had no room for; anything but 0 is an
        error of the caller, which only the device can see.

    Raises:
        RuntimeError: arguments of another dtype, device, shape or memory order than said here, or no CUDA operators.
    """
    return _compact_copy("compact_gather_cuda", full, compact, masks, row_layers, column_layers)


def compact_scatter(
    full: Sequence[Tensor],
    compact: Sequence[Tensor],
    masks: MaskState,
    row_layers: Sequence[int],
    column_layers: Sequence[int],
) -> Tensor:
    """``full <- compact``: the inverse of :func:`compact_gather`; what is not listed keeps its value in ``full``."""
    return _compact_copy("compact_scatter_cuda", full, compact, masks, row_layers, column_layers)


def _compact_copy(
    name: str,
    full: Sequence[Tensor],
    compact: Sequence[Tensor],
    masks: MaskState,
    row_layers: Sequence[int],
    column_layers: Sequence[int],
) -> Tensor:
    short_by = torch.empty((masks.counts.shape[0], len(full)), dtype=torch.int32, device=masks.counts.device)
    _op(name)(
        list(full),
        list(compact),
        masks.active,
        masks.counts,
        list(masks.filters),
        list(row_layers),
        list(column_layers),
        short_by,
    )
    return short_by


def _register_fakes(namespace: str) -> None:
    """All operators only write into their arguments: a fake has nothing to make, it checks devices and lengths."""
    if namespace in _faked:
        return
    _faked.add(namespace)

    def one_device(name: str, *arguments: Any) -> None:
        tensors = [t for a in arguments for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
        devices = sorted({str(tensor.device) for tensor in tensors})
        torch._check(len(devices) == 1, lambda: f"{name}: all tensors must be on one device; got {', '.join(devices)}")

    def length(name: str, what: str, tensors: Sequence[Any], size: int) -> None:
        torch._check(len(tensors) == size, lambda: f"{name}: {what} must have {size} entries; got {len(tensors)}")

    def lists(name: str, weights: list[Tensor], active: Tensor, counts: Tensor, packed: list[Tensor]) -> None:
        columns = sum(weight.shape[1] for weight in weights)
        torch._check(active.shape[1] == columns, lambda: f"{name}: active must have {columns} columns")
        torch._check(counts.shape[1] == len(weights), lambda: f"{name}: counts must have {len(weights)} columns")
        if packed:
            length(name, "packed", packed, len(weights))

    @library.register_fake(f"{namespace}::threshold_pass_cuda")
    def _(weights, thresholds, compare, pad_to, scores, mask, flipped, active, inverse, counts, changed, packed):
        name = "threshold_pass_cuda"
        one_device(name, weights, thresholds, scores, mask, flipped, active, inverse, counts, changed, packed)
        length(name, "thresholds", thresholds, len(weights))
        lists(name, weights, active, counts, packed)

    @library.register_fake(f"{namespace}::active_lists_cuda")
    def _(weights, mask, flipped, pad_to, active, inverse, counts, changed, packed):
        one_device("active_lists_cuda", weights, mask, flipped, active, inverse, counts, changed, packed)
        lists("active_lists_cuda", weights, active, counts, packed)

    @library.register_fake(f"{namespace}::fused_step_cuda")
    def _(weights, weight_grads, weight_momenta, thresholds, threshold_grads, threshold_momenta, others, *rest):
        name, other_grads = "fused_step_cuda", rest[0]
        lists = (weight_grads, weight_momenta, thresholds, threshold_grads, threshold_momenta, others)
        one_device(name, weights, *lists, *rest)
        length(name, "weight_grads", weight_grads, len(weights))
        length(name, "thresholds", thresholds, len(weights))
        length(name, "threshold_grads", threshold_grads, len(weights))
        length(name, "other_grads", other_grads, len(others))

    for copy in ("compact_gather_cuda", "compact_scatter_cuda"):

        @library.register_fake(f"{namespace}::{copy}")
        def _(full, compact, active, counts, filters, row_layers, column_layers, short_by, name=copy):
            one_device(name, full, compact, active, counts, short_by)
            length(name, "compact", compact, len(full))
            length(name, "row_layers", row_layers, len(full))
            length(name, "column_layers", column_layers, len(full))


_faked: set[str] = set()

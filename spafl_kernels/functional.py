"""Functional forms of the threshold layers, and the helpers that look at their filters."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair, _single

from . import reference
from .cpu import skip
from .gpu import choice, single
from .gpu.tables.classes import DENSITIES, density_step
from .reference import Estimator, filter_scores
from .threshold_layer import Selected, ThresholdLayer, check_layer

__all__ = [
    "Estimator",
    "active_filters",
    "check_thresholds",
    "collapse_guard_",
    "density",
    "filter_scores",
    "importance_update_",
    "observe",
    "threshold_conv1d",
    "threshold_conv2d",
    "threshold_conv_transpose2d",
    "threshold_layers",
    "threshold_linear",
    "threshold_penalty",
]


def threshold_conv2d(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    estimator: Estimator = "identity",
    mask_bias: bool = False,
    known_density: float = 1.0,
    selected: Selected | None = None,
) -> Tensor:
    """2-d convolution whose filters are pruned, whole, while ``mean|w| <= threshold`` (SpaFL, arXiv 2406.00431).

    Args:
        input: ``(N, in, H, W)`` or ``(in, H, W)``.
        weight: ``(out, in / groups, kH, kW)``, same dtype as ``input`` (or under autocast).
        threshold: ``(out,)``, dtype and device of ``weight``.
        bias: ``(out,)`` or None. A pruned filter keeps its bias unless ``mask_bias``.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        estimator: straight-through rule of the threshold comparison, ``"identity"`` or ``"window"``.
        mask_bias: prune the bias together with its filter.
        known_density: a share of active filters that is not exceeded, in (0, 1], as far as the host knows. On a GPU it
            picks the backend, by measured times; the result does not depend on it.
        selected: a threshold pass over this weight and threshold with this estimator, packed in the dtype of ``input``
            (of autocast under it); the kernels make their own if None. Nothing may change in between.

    Returns:
        ``(N, out, H', W')`` or ``(out, H', W')``.

    Raises:
        ValueError: unknown estimator, or a threshold of another shape, dtype or device than the weight asks for.
    """
    if choice.on_gpu(weight):
        return single.conv2d(
            input,
            weight,
            threshold,
            bias,
            stride,
            padding,
            dilation,
            groups,
            estimator,
            mask_bias,
            known_density,
            selected,
        )
    check_layer(weight, threshold, estimator)

    def masked(x: Tensor, w: Tensor, tau: Tensor, b: Tensor | None) -> Tensor:
        return reference.threshold_conv2d(x, w, tau, b, stride, padding, dilation, groups, estimator, mask_bias)

    layer = skip.convolution(masked, weight, _pair(stride), padding, _pair(dilation), groups, estimator, mask_bias)
    return skip.run(layer, input, weight, threshold, bias)


def threshold_conv1d(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int] = 1,
    padding: int | tuple[int] | str = 0,
    dilation: int | tuple[int] = 1,
    groups: int = 1,
    estimator: Estimator = "identity",
    mask_bias: bool = False,
    known_density: float = 1.0,
) -> Tensor:
    """1-d convolution whose filters are pruned, whole, while ``mean|w| <= threshold`` (SpaFL, arXiv 2406.00431).

    On a GPU it is a 2-d convolution of images one high.

    Args:
        input: ``(N, in, L)`` or ``(in, L)``.
        weight: ``(out, in / groups, k)``, same dtype as ``input`` (or under autocast).
        threshold, bias, estimator, mask_bias, known_density: as for :func:`threshold_conv2d`.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv1d`.

    Returns:
        ``(N, out, L')`` or ``(out, L')``.

    Raises:
        ValueError: unknown estimator, or a threshold of another shape, dtype or device than the weight asks for.
    """
    check_layer(weight, threshold, estimator)
    if not choice.on_gpu(weight):

        def masked(x: Tensor, w: Tensor, tau: Tensor, b: Tensor | None) -> Tensor:
            return reference.threshold_conv1d(x, w, tau, b, stride, padding, dilation, groups, estimator, mask_bias)

        steps = _single(stride), padding, _single(dilation)
        layer = skip.convolution(masked, weight, *steps, groups, estimator, mask_bias)
        return skip.run(layer, input, weight, threshold, bias)
    (step,), (gap,) = _single(stride), _single(dilation)
    pad = padding if isinstance(padding, str) else (0, *_single(padding))
    return single.conv2d(
        input.unsqueeze(-2), weight.unsqueeze(-2), threshold, bias, (1, step), pad, (1, gap), groups, estimator,
        mask_bias, known_density,
    ).squeeze(-2)  # fmt: skip


def threshold_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    estimator: Estimator = "identity",
    mask_bias: bool = False,
) -> Tensor:
    """Transposed 2-d convolution whose filters are pruned, whole, while ``mean|w| <= threshold``.

    A filter is what makes one output channel, see :func:`spafl_kernels.reference.filters`. On a GPU there is no kernel
    that skips, and a warning (``SPAFL_STRICT``: an error) says so.

    Args:
        input: ``(N, in, H, W)`` or ``(in, H, W)``.
        weight: ``(in, out / groups, kH, kW)``, same dtype as ``input`` (or under autocast).
        threshold, bias: ``(out,)``.
        stride, padding, output_padding, groups, dilation: as in :func:`torch.nn.functional.conv_transpose2d`.
        estimator, mask_bias: as for :func:`threshold_conv2d`.

    Returns:
        ``(N, out, H', W')`` or ``(out, H', W')``.

    Raises:
        ValueError: unknown estimator, or a threshold of another shape, dtype or device than the weight asks for.
    """
    check_layer(weight, threshold, estimator, groups)

    def masked(x: Tensor, w: Tensor, tau: Tensor, b: Tensor | None) -> Tensor:
        return reference.threshold_conv_transpose2d(
            x, w, tau, b, stride, padding, output_padding, groups, dilation, estimator, mask_bias
        )

    if choice.on_gpu(weight):
        choice.fall_back(choice.NO_TRANSPOSED)
        return masked(input, weight, threshold, bias)
    layer = skip.convolution(
        masked, weight, _pair(stride), padding, _pair(dilation), groups, estimator, mask_bias, _pair(output_padding)
    )
    return skip.run(layer, input, weight, threshold, bias)


def threshold_linear(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    estimator: Estimator = "identity",
    mask_bias: bool = False,
    known_density: float = 1.0,
    selected: Selected | None = None,
) -> Tensor:
    """Linear map whose neurons are pruned, whole, while ``mean|w| <= threshold`` (SpaFL, arXiv 2406.00431).

    Args:
        input: ``(..., in)``.
        weight: ``(out, in)``.
        threshold: ``(out,)``, dtype and device of ``weight``.
        bias: ``(out,)`` or None. A pruned neuron keeps its bias unless ``mask_bias``.
        estimator: straight-through rule of the threshold comparison, ``"identity"`` or ``"window"``.
        mask_bias: prune the bias together with its neuron.
        known_density, selected: as for :func:`threshold_conv2d`.

    Returns:
        ``(..., out)``.

    Raises:
        ValueError: unknown estimator, or a threshold of another shape, dtype or device than the weight asks for.
    """
    if choice.on_gpu(weight):
        return single.linear(input, weight, threshold, bias, estimator, mask_bias, known_density, selected)
    check_layer(weight, threshold, estimator)

    def masked(x: Tensor, w: Tensor, tau: Tensor, b: Tensor | None) -> Tensor:
        return reference.threshold_linear(x, w, tau, b, estimator, mask_bias)

    return skip.run(skip.linear(masked, estimator, mask_bias), input, weight, threshold, bias)


def threshold_layers(model: nn.Module) -> Iterator[tuple[str, ThresholdLayer]]:
    """``(name, layer)`` of every threshold layer of ``model``, each once, in registration order."""
    for name, module in model.named_modules():
        if isinstance(module, ThresholdLayer):
            yield name, module


@torch.no_grad()
def active_filters(weight: Tensor, threshold: Tensor, transposed_groups: int | None = None) -> Tensor:
    """Indices of the active filters, ascending: int64, shape ``(active,)``, on the device of ``weight``.

    ``transposed_groups``: see :func:`spafl_kernels.reference.filters`.
    """
    return (filter_scores(weight, transposed_groups) > threshold).nonzero().flatten()


def threshold_penalty(model: nn.Module) -> Tensor:
    """``sum_l sum_i exp(-tau_li)`` over all threshold layers, differentiable; multiply by the coefficient yourself.

    A scalar tensor; 0 for a model without threshold layers. The regulariser of SpaFL (arXiv 2406.00431).
    """
    return reference.penalty([layer.threshold for _, layer in threshold_layers(model)])


@torch.no_grad()
def density(model: nn.Module) -> dict[str, float]:
    """Share of active filters of every threshold layer, by layer name, in [0, 1]."""
    return {name: layer.density() for name, layer in threshold_layers(model)}


@torch.no_grad()
def check_thresholds(model: nn.Module | Mapping[str, ThresholdLayer]) -> None:
    """Refuse thresholds that are not finite: every comparison with NaN is false, so they would prune without a word.

    It waits for the device once, which is why layers themselves do not ask; loading a state dict,
    :func:`observe` and the beginning of a training do.

    Args:
        model: a model, or its threshold layers by name.

    Raises:
        ValueError: names the layers and how many of their thresholds are NaN or infinite.
    """
    layers = dict(threshold_layers(model)) if isinstance(model, nn.Module) else model
    values = [layer.threshold.detach() for layer in layers.values()]
    if not values or torch.cat([v.to(values[0].device) for v in values]).isfinite().all():
        return
    counts = {name: int((~layer.threshold.isfinite()).sum()) for name, layer in layers.items()}
    wrong = [f"{name} ({n} of {len(layers[name].threshold)})" for name, n in counts.items() if n]
    raise ValueError(f"thresholds must be finite; NaN or infinite in {', '.join(wrong)}")


@torch.no_grad()
def observe(model: nn.Module) -> dict[str, float]:
    """Let every threshold layer know its density, which on a GPU decides between backends where times were measured.

    Call it from time to time, once a round or an epoch: it waits for the device. Without it a layer counts as dense.
    Sets ``known_density`` of each layer to its density, rounded up to one that is measured; results of the layers do
    not depend on it.

    Returns:
        Share of active filters by layer name, in [0, 1].

    Raises:
        ValueError: a threshold is not finite.
    """
    check_thresholds(model)
    layers = dict(threshold_layers(model))
    if not layers:
        return {}
    shares = torch.stack([layer.mask().double().mean() for layer in layers.values()]).tolist()
    for layer, share in zip(layers.values(), shares, strict=True):
        layer.known_density = DENSITIES[density_step(share)]
    return dict(zip(layers, shares, strict=True))


@torch.no_grad()
def collapse_guard_(model: nn.Module, floor: float = 0.01) -> list[str]:
    """Bring back layers of which hardly anything is left: their thresholds become 0, in place.

    For training loops of one's own, after every step of the optimiser: nothing behind a layer without active filters
    learns from the data. Trainers have it as ``SGDOptions.collapse_floor``, which like the published code looks at the
    density of the last forward pass. Waits for the device.

    Args:
        model: any module.
        floor: density in [0, 1) at or below which a layer's thresholds are reset (published code: 0.01).

    Returns:
        Names of the layers that were reset.

    Raises:
        ValueError: ``floor`` is out of range.
    """
    if not 0 <= floor < 1:
        raise ValueError(f"floor must be in [0, 1); got {floor!r}")
    collapsed = [name for name, share in density(model).items() if share <= floor]
    layers = dict(threshold_layers(model))
    for name in collapsed:
        layers[name].threshold.zero_()
    return collapsed


def warn_of_collapse(masks: Mapping[str, Tensor], known: Collection[str] = ()) -> set[str]:
    """Warn of layers without any active filter, by name; returns those that are not among the known ones."""
    found = {name for name, mask in masks.items() if name not in known and not bool(mask.any())}
    if found:
        warnings.warn(
            f"every filter of {', '.join(sorted(found))} is pruned: it passes nothing on and may never come back; "
            "spafl_kernels.collapse_guard_(model), after every step, resets the thresholds of such layers",
            stacklevel=2,
        )
    return found


def refuse_transforms(what: str) -> None:
    """Raise ``RuntimeError`` under ``torch.func``, which would see a snapshot of the model and not its parameters."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{what} cannot run under torch.func; transform the model itself, whose layers support vmap and grad"
        )


@torch.no_grad()
def importance_update_(
    weight: Tensor, delta: Tensor, normaliser: Literal["kernel", "row"], transposed_groups: int | None = None
) -> None:
    """Shift every filter along the sign of its sum by the change of its global threshold, in place.

    ``w_ij -= delta_i / d * sign(sum_j w_ij)``, ``sign(0) = 0``; pruned filters too (SpaFL, arXiv 2406.00431).

    Args:
        weight: ``(out, ...)``, or that of a transposed convolution; changed in place.
        delta: ``(out,)``, new minus old global threshold.
        normaliser: ``"kernel"``: ``d`` is the size of the kernel (``kH * kW``) for a convolution and the row length for
            a linear layer (the published code); ``"row"``: ``d`` is the row length ``n_in`` for both.
        transposed_groups: see :func:`spafl_kernels.reference.filters`.
    """
    if normaliser not in ("kernel", "row"):
        raise ValueError(f"normaliser must be kernel or row; got {normaliser!r}")
    rows = reference.filters(weight, transposed_groups).flatten(1)
    divisor = rows.shape[1]
    if normaliser == "kernel" and weight.dim() > 2:
        divisor = weight.shape[2:].numel()
    weight -= reference.per_filter(delta / divisor * rows.sum(dim=1).sign(), weight, transposed_groups)

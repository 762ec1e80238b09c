"""The definition of threshold layers, in plain PyTorch. Every other implementation is tested against this file.

A filter is what makes one output channel. A weight of shape ``(out, ...)`` is read as ``out`` filters of ``n_in``
numbers each: its leading index is the filter's. The weight of a transposed convolution is ``(in, out / groups, ...)``,
and filter ``o`` is ``weight[:, o]`` within its group: with ``g, j = divmod(o, out / groups)`` it is
``weight[g * in / groups : (g + 1) * in / groups, j]`` (:func:`filters`).

Filter ``i`` has the score ``s_i = mean_j |w_ij|``; it is *active* while ``s_i > tau_i`` (strictly) and *pruned*, whole,
otherwise:

    W~ = m * W,    m_i = step(s_i - tau_i)

The step has no useful derivative, so the backward pass replaces it by an *estimator* ``h``. With ``G = dL/dW~`` and
``r_i = sum_j G_ij w_ij``:

    dL/dtau_i  = -h_i r_i
    dL/dw_ij   = m_i G_ij + h_i r_i sign(w_ij) / n_in        (sign(0) = 0)

==========  ===========================  ==============================================================
estimator   h_i                          source
==========  ===========================  ==============================================================
identity    1                            SpaFL (arXiv 2406.00431), and the published Fashion-MNIST code
window      1 if ``|s_i - tau_i| > 1``   the published CIFAR-10 and CIFAR-100 code
==========  ===========================  ==============================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Estimator = Literal["identity", "window"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)

# Half-width outside which the "window" estimator lets the gradient through (published CIFAR code).
WINDOW = 1.0


def check_estimator(estimator: str) -> None:
    """Raise ``ValueError`` unless ``estimator`` is one of :data:`ESTIMATORS`."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}; got {estimator!r}")


def filters(weight: Tensor, transposed_groups: int | None = None) -> Tensor:
    """A weight with one filter per leading index.

    Args:
        weight: ``(out, ...)``, or ``(in, out / groups, ...)`` of a transposed convolution.
        transposed_groups: the groups of the transposed convolution that the weight belongs to; None for all others.

    Returns:
        ``(out, ...)``: the weight itself, or, of a transposed convolution, ``(out, in / groups, ...)``: a view with one
        group, else a copy.
    """
    if transposed_groups is None:
        return weight
    return weight.unflatten(0, (transposed_groups, -1)).transpose(1, 2).flatten(0, 1)


def per_filter(values: Tensor, weight: Tensor, transposed_groups: int | None = None) -> Tensor:
    """A number for every filter, in the shape in which it multiplies that filter's weights.

    Args:
        values: ``(out,)``.
        weight, transposed_groups: as for :func:`filters`.

    Returns:
        ``(out, 1, ...)``, or ``(in, out / groups, 1, ...)`` of a transposed convolution.
    """
    kernel = (1,) * (weight.dim() - 2)
    if transposed_groups is None:
        return values.view(-1, 1, *kernel)
    inputs, outputs = weight.shape[:2]
    rows = values.view(transposed_groups, 1, outputs).expand(-1, inputs // transposed_groups, -1)
    return rows.reshape(inputs, outputs, *kernel)


def filter_scores(weight: Tensor, transposed_groups: int | None = None) -> Tensor:
    """Score of every filter: the mean absolute value of its weights.

    Args:
        weight: ``(out, ...)``, floating point, or that of a transposed convolution.
        transposed_groups: as for :func:`filters`.

    Returns:
        ``(out,)``, dtype of ``weight``.
    """
    return filters(weight, transposed_groups).flatten(1).abs().mean(dim=1)


class _Step(torch.autograd.Function):
    """``1[margin > 0]`` with a straight-through estimator as its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(margin: Tensor, estimator: str) -> Tensor:
        return (margin > 0).to(margin.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        margin, estimator = inputs
        ctx.estimator = estimator
        ctx.save_for_backward(margin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        (grad,) = grad_outputs
        (margin,) = ctx.saved_tensors
        if ctx.estimator == "window":
            grad = grad * (margin.abs() > WINDOW)
        return grad, None


def filter_mask(
    weight: Tensor, threshold: Tensor, estimator: Estimator = "identity", transposed_groups: int | None = None
) -> Tensor:
    """The mask of every filter, differentiable through the estimator.

    Args:
        weight: ``(out, ...)``, floating point, or that of a transposed convolution.
        threshold: ``(out,)``.
        estimator: ``"identity"`` or ``"window"``.
        transposed_groups: as for :func:`filters`.

    Returns:
        ``(out,)`` of zeros and ones, in the dtype of ``weight``.
    """
    check_estimator(estimator)
    return _Step.apply(filter_scores(weight, transposed_groups) - threshold, estimator)


def mask_weight_and_bias(
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    estimator: Estimator,
    mask_bias: bool,
    transposed_groups: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(W~, b~)``: the masked weight, and the bias, masked too if ``mask_bias``."""
    mask = filter_mask(weight, threshold, estimator, transposed_groups)
    masked = weight * per_filter(mask, weight, transposed_groups)
    if bias is not None and mask_bias:
        bias = bias * mask
    return masked, bias


def penalty(thresholds: Sequence[Tensor]) -> Tensor:
    """``sum exp(-tau)`` over these thresholds, differentiable; a scalar."""
    return torch.stack([torch.exp(-tau).sum() for tau in thresholds]).sum() if thresholds else torch.zeros(())


def add_penalty_gradient_(grad: Tensor, threshold: Tensor, coefficient: float) -> Tensor:
    """Add the gradient of ``coefficient * sum exp(-tau)`` to that of a threshold, in place."""
    return grad.sub_(torch.exp(-threshold), alpha=coefficient)


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
) -> Tensor:
    """Masked dense convolution; arguments and shapes as in :func:`torch.nn.functional.conv2d`."""
    masked, bias = mask_weight_and_bias(weight, threshold, bias, estimator, mask_bias)
    return F.conv2d(input, masked, bias, stride, padding, dilation, groups)


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
) -> Tensor:
    """Masked dense convolution; arguments and shapes as in :func:`torch.nn.functional.conv1d`."""
    masked, bias = mask_weight_and_bias(weight, threshold, bias, estimator, mask_bias)
    return F.conv1d(input, masked, bias, stride, padding, dilation, groups)


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
    """Masked dense transposed convolution; arguments and shapes as in :func:`torch.nn.functional.conv_transpose2d`."""
    masked, bias = mask_weight_and_bias(weight, threshold, bias, estimator, mask_bias, groups)
    return F.conv_transpose2d(input, masked, bias, stride, padding, output_padding, groups, dilation)


def threshold_linear(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    estimator: Estimator = "identity",
    mask_bias: bool = False,
) -> Tensor:
    """Masked dense linear map; arguments and shapes as in :func:`torch.nn.functional.linear`."""
    masked, bias = mask_weight_and_bias(weight, threshold, bias, estimator, mask_bias)
    return F.linear(input, masked, bias)


def mask_gradients(
    weight: Tensor,
    threshold: Tensor,
    grad_masked: Tensor,
    estimator: Estimator = "identity",
    transposed_groups: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The closed form of the gradients, for kernels that do not go through autograd.

    Args:
        weight: ``(out, ...)``, or that of a transposed convolution.
        threshold: ``(out,)``.
        grad_masked: ``G = dL/dW~``, shape of ``weight``.
        estimator: ``"identity"`` or ``"window"``.
        transposed_groups: as for :func:`filters`.

    Returns:
        ``(dL/dW, dL/dtau)``, shapes of ``weight`` and ``threshold``.
    """
    check_estimator(estimator)
    margin = filter_scores(weight, transposed_groups) - threshold
    rows = filters(weight, transposed_groups).flatten(1)
    dot = (filters(grad_masked, transposed_groups).flatten(1) * rows).sum(dim=1)
    if estimator == "window":
        dot = dot * (margin.abs() > WINDOW)
    active = per_filter((margin > 0).to(weight.dtype), weight, transposed_groups)
    moved = per_filter(dot / rows.shape[1], weight, transposed_groups)
    return active * grad_masked + moved * weight.sign(), -dot

"""The definition of threshold layers, in plain PyTorch. Every other implementation is tested against this file.

A weight of shape ``(out, ...)`` is read as ``out`` filters of ``n_in`` numbers each. Filter ``i`` has the score
``s_i = mean_j |w_ij|``; it is *active* while ``s_i > tau_i`` (strictly) and *pruned*, whole, otherwise:

    W~ = m * W,    m_i = step(s_i - tau_i)

The step has no useful derivative, so the backward pass replaces it by an *estimator* ``h``. With ``G = dL/dW~`` and
``r_i = sum_j G_ij w_ij``:

    dL/dtau_i  = -h_i r_i
    dL/dw_ij   = m_i G_ij + h_i r_i sign(w_ij) / n_in        (sign(0) = 0)

==========  =========================  ==============================================================
estimator   h_i                        source
==========  =========================  ==============================================================
identity    1                          SpaFL (arXiv 2406.00431), and the published Fashion-MNIST code
window      1 if |s_i - tau_i| > 1     the published CIFAR-10 and CIFAR-100 code
==========  =========================  ==============================================================
"""

from __future__ import annotations

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


def filter_scores(weight: Tensor) -> Tensor:
    """Score of every filter: the mean absolute value of its weights.

    Args:
        weight: ``(out, ...)``, floating point.

    Returns:
        ``(out,)``, dtype of ``weight``.
    """
    return weight.flatten(1).abs().mean(dim=1)


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


def filter_mask(weight: Tensor, threshold: Tensor, estimator: Estimator = "identity") -> Tensor:
    """The mask of every filter, differentiable through the estimator.

    Args:
        weight: ``(out, ...)``, floating point.
        threshold: ``(out,)``.
        estimator: ``"identity"`` or ``"window"``.

    Returns:
        ``(out,)`` of zeros and ones, in the dtype of ``weight``.
    """
    check_estimator(estimator)
    return _Step.apply(filter_scores(weight) - threshold, estimator)


def mask_weight_and_bias(
    weight: Tensor, threshold: Tensor, bias: Tensor | None, estimator: Estimator, mask_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """``(W~, b~)``: the masked weight, and the bias, masked too if ``mask_bias``."""
    mask = filter_mask(weight, threshold, estimator)
    masked = weight * mask.view(-1, *(1,) * (weight.dim() - 1))
    if bias is not None and mask_bias:
        bias = bias * mask
    return masked, bias


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
    weight: Tensor, threshold: Tensor, grad_masked: Tensor, estimator: Estimator = "identity"
) -> tuple[Tensor, Tensor]:
    """The closed form of the gradients, for kernels that do not go through autograd.

    Args:
        weight: ``(out, ...)``.
        threshold: ``(out,)``.
        grad_masked: ``G = dL/dW~``, shape of ``weight``.
        estimator: ``"identity"`` or ``"window"``.

    Returns:
        ``(dL/dW, dL/dtau)``, shapes of ``weight`` and ``threshold``.
    """
    check_estimator(estimator)
    margin = filter_scores(weight) - threshold
    rows, grads = weight.flatten(1), grad_masked.flatten(1)
    dot = (grads * rows).sum(dim=1)
    if estimator == "window":
        dot = dot * (margin.abs() > WINDOW)
    grad_weight = (margin > 0).unsqueeze(1) * grads + dot.unsqueeze(1) * rows.sign() / rows.shape[1]
    return grad_weight.view_as(weight), -dot

"""PyTorch's dense operators on some of a layer's filters: what the narrow layers of both wings share.

Rows are filters: of a weight ``(filters, ...)`` along dimension 0, of a transposed convolution's along 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Steps", "gradients", "listed", "of_rows", "product"]

# Rows are rounded up to it: oneDNN computes blocks anyhow, and both it and cuDNN start anew for every new shape.
MULTIPLE = 8


class Steps(NamedTuple):
    """How a convolution without groups walks; a number per dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


def listed(wanted: Tensor, count: int) -> Tensor:
    """The ``count`` wanted rows, ascending, then others up to a multiple of :data:`MULTIPLE`: int64.

    Args:
        wanted: bool ``(filters,)``.
    """
    order = torch.argsort((~wanted).to(torch.int8), stable=True)
    return order[: -(-count // MULTIPLE) * MULTIPLE]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, steps: Steps | None) -> Tensor:
    """The dense operator; linear without ``steps``."""
    if steps is None:
        return F.linear(x, weight, bias)
    extra = steps.output_padding or (0,) * len(steps.stride)
    return torch.ops.aten.convolution(
        x, weight, bias, steps.stride, steps.padding, steps.dilation, steps.transposed, extra, 1
    )  # type: ignore[no-any-return]


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, steps: Steps | None, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the dense operator, of its input and weight; None where not needed."""
    if steps is None:
        return grad @ weight if need_input else None, grad.t() @ x if need_weight else None
    extra = steps.output_padding or (0,) * len(steps.stride)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, steps.stride, steps.padding, steps.dilation, steps.transposed, extra, 1,
        (need_input, need_weight, False),
    )[:2]  # fmt: skip


def of_rows(
    g: Tensor, weight: Tensor, dim: int, active: Tensor | None, passes: Tensor | None, of_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of some filters from their rows ``G`` of the gradient of the masked weight.

    Args:
        g, weight: of these filters, which are counted along ``dim``.
        active, passes: of these filters: the mask, and where the estimator lets a gradient through; None: everywhere.
        of_bias: what a masked bias adds to ``r_i``: its gradient times itself.

    Returns:
        ``m_i G_ij + h_i r_i sign(w_ij) / n_in``, shape of ``weight``, and ``h_i r_i``, see docs/layers.md.
    """
    r = (g * weight).sum([d for d in range(g.dim()) if d != dim])
    if of_bias is not None:
        r = r + of_bias
    if passes is not None:
        r = r * passes
    shape = [-1 if d == dim else 1 for d in range(g.dim())]
    if active is not None:
        g = g * active.view(shape)
    return torch.addcmul(g, (r / (weight.numel() // len(r))).view(shape), weight.sign()), r

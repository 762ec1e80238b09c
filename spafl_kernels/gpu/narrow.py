"""Threshold layers by PyTorch's own dense operators (cuDNN, cuBLAS) on the active filters alone.

The same function as the reference, in plain PyTorch on any device and any floating dtype. The host has to know how many
filters are active, so each pass waits for the device once: not for CUDA graphs, ``torch.compile`` or ``torch.func``.
What it has over the packed kernels is arithmetic that they lack: float32 without tf32 runs on cuDNN's kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..executed import note_number
from ..reference import Estimator
from ..some_filters import Steps, gradients, listed, of_rows, product
from .geometry import Geometry


def _first(wanted: Tensor) -> tuple[Tensor, int]:
    """Rows to compute, the wanted ones first; and how many these are."""
    count = int(wanted.sum())  # waits for the device
    return listed(wanted, count), count


def _masked(weight: Tensor, active: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """Rows of the masked weight, in the dtype of ``x``; of pruned ones what is not NaN is 0."""
    return (weight[rows] * active[rows].view(-1, *(1,) * (weight.dim() - 1))).to(x.dtype)


def _cost(x: Tensor, weight: Tensor, geometry: Geometry | None) -> int:
    """MACs of one filter in one product."""
    positions = len(x) * (1 if geometry is None else geometry.output[0] * geometry.output[1])
    return positions * weight.shape[1:].numel()


def _steps(geometry: Geometry | None) -> Steps | None:
    return None if geometry is None else Steps(geometry.stride, geometry.padding, geometry.dilation)


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, estimator: Estimator,
        mask_bias: bool, geometry: Geometry | None,
    ) -> Tensor:  # fmt: skip
        margin = reference.filter_scores(weight) - threshold
        active = margin > 0
        # A pruned filter with a NaN among its weights spoils what it takes part in: 0 * NaN is NaN in the definition.
        computed = active | margin.isnan()
        rows, count = _first(computed)
        size = (*x.shape[:1], len(weight), *(() if geometry is None else geometry.output))
        format = torch.contiguous_format if geometry is None else torch.channels_last
        y = torch.zeros(size, dtype=x.dtype, device=x.device).contiguous(memory_format=format)
        shown = bias * active if bias is not None and mask_bias else bias
        if shown is not None:
            y += shown.to(x.dtype).view(-1, *(1,) * (y.dim() - 2))
        if count:
            note_number(len(rows) * _cost(x, weight, geometry))
            w, b = _masked(weight, active, rows, x), None if shown is None else shown[rows].to(x.dtype)
            y.index_copy_(1, rows[:count], product(x, w, b, _steps(geometry))[:, :count])
        passes = margin.abs() > reference.WINDOW if estimator == "window" else torch.ones_like(active)
        ctx.save_for_backward(x, weight, bias, active, computed, passes, rows)
        ctx.count, ctx.mask_bias, ctx.geometry = count, mask_bias, geometry
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: without this the results would count as constants
            raise RuntimeError(
                "second derivatives are not implemented by the narrow threshold layers; use spafl_kernels.reference, "
                "which has them"
            )
        x, weight, bias, active, computed, passes, rows = ctx.saved_tensors
        count, geometry = ctx.count, ctx.geometry
        need_input, need_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:4])
        dims = (0,) if geometry is None else (0, 2, 3)
        dx = None
        if need_input:
            dx = torch.zeros_like(x)
            if count:
                note_number(count * _cost(x, weight, geometry))
                columns = grad.index_select(1, rows[:count])
                w = _masked(weight, active, rows[:count], x)
                dx = gradients(columns, x, w, _steps(geometry), True, False)[0]
        if not need_weight:
            return dx, None, None, None, None, None, None
        # Pruned filters whose r_i is not certainly 0 need their row of G too.
        needed = computed | (passes & (grad != 0).any(dims))
        if bias is not None and ctx.mask_bias:
            needed |= ~bias.isfinite()
        rows, wanted = _first(needed)
        dw, dtau = torch.zeros_like(weight), weight.new_zeros(len(weight))
        total = grad.sum(dims).to(weight.dtype)
        if wanted:
            w = weight[rows]
            note_number(len(rows) * _cost(x, weight, geometry))
            g = gradients(grad.index_select(1, rows), x, w.to(x.dtype), _steps(geometry), False, True)[1]
            assert g is not None
            of_bias = total[rows] * bias[rows] if bias is not None and ctx.mask_bias else None
            found, r = of_rows(g.to(weight.dtype), w, 0, active[rows], passes[rows], of_bias)
            dw.index_copy_(0, rows[:wanted], found[:wanted])
            dtau.index_copy_(0, rows[:wanted], -r[:wanted])
        db = None
        if bias is not None:
            db = total * active if ctx.mask_bias else total
        return dx, dw, dtau, db, None, None, None


def narrow(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    estimator: Estimator,
    mask_bias: bool,
    geometry: Geometry | None,
) -> Tensor:
    """A threshold layer by dense operators on its active filters.

    Args:
        x: ``(M, in)``, or ``(N, in, H, W)`` with a geometry; under autocast cast to its dtype.
        weight: ``(out, in)`` or ``(out, in, kH, kW)``.
        threshold, bias: ``(out,)``.
        estimator, mask_bias: as for :func:`spafl_kernels.reference.threshold_conv2d`.
        geometry: of the convolution, None for a linear layer.

    Returns:
        ``(M, out)`` or ``(N, out, H', W')``, the latter channels last; dtype of ``x``. First derivatives only.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _Narrow.apply(x, weight, threshold, bias, estimator, mask_bias, geometry)

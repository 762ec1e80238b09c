"""The operators in plain PyTorch: the CPU implementation, and the definition the kernels are tested against.

Everything has a leading client dimension and is computed client by client with the masked reference. The products that
it notes (:mod:`spafl_kernels.executed`) are those of the kernels that it defines.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as conv_grad

from .. import executed, reference
from ..reference import Estimator
from .geometry import Geometry
from .packing import ACTIVE, FLIPPED, PASSES, SPOILED, Selection, capacity, row_stride


def selection_and_packed(
    weight: Tensor, threshold: Tensor, estimator: Estimator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Selection and packed weights, as the threshold pass makes them for a layer that had no selection before."""
    clients, out = weight.shape[:2]
    selection = Selection.empty(clients, out, weight.device)
    n_in = weight.shape[2:].numel()
    packed = torch.zeros(clients, capacity(out), row_stride(n_in), dtype=dtype, device=weight.device)
    for i in range(clients):
        scores = reference.filter_scores(weight[i])
        active, spoiled = scores > threshold[i], scores.isnan()
        listed = active | spoiled
        passes = torch.ones_like(active)
        if estimator == "window":
            passes = (scores - threshold[i]).abs() > reference.WINDOW
        count = listed.sum()
        order = torch.argsort((~listed).to(torch.int8), stable=True).int()
        rank = torch.arange(out, dtype=torch.int32, device=weight.device)
        selection.count[i] = count
        selection.changed[i] = 1
        selection.index[i] = torch.where(rank < count, order, -1)
        selection.inverse[i] = torch.where(listed, listed.cumsum(0).int() - 1, -1)
        selection.flags[i] = ACTIVE * active + PASSES * passes + FLIPPED + SPOILED * spoiled
        masked = weight[i] * active.view(-1, *(1,) * (weight.dim() - 2))
        rows = masked.movedim(1, -1).flatten(1)  # (kH, kW, in) order
        kept = torch.where((rank < count).unsqueeze(1), rows.index_select(0, order.long()), 0)
        packed[i, :out, :n_in] = kept.to(dtype)
    return selection.data, packed


def forward(
    input: Tensor, weight: Tensor, selection: Selection, bias: Tensor | None, mask_bias: bool, geometry: Geometry | None
) -> Tensor:
    """``(clients, M, out)``, or ``(clients, N, out, H', W')`` with a geometry."""
    outputs = []
    executed.note(selection.count, _cost(input, weight, geometry), weight.shape[2])
    for x, w, active, b in zip(
        input, weight, selection.mask, [None] * len(weight) if bias is None else bias, strict=True
    ):
        masked = (w * active.view(-1, *(1,) * (w.dim() - 1))).to(x.dtype)
        if b is not None:
            b = (b * active if mask_bias else b).to(x.dtype)
        if geometry is None:
            outputs.append(F.linear(x, masked, b))
        else:
            outputs.append(F.conv2d(x, masked, b, geometry.stride, geometry.padding, geometry.dilation))
    return torch.stack(outputs)


def _cost(input: Tensor, weight: Tensor, geometry: Geometry | None) -> int:
    """MACs of one filter and input channel in one product."""
    positions = input.shape[1] * (1 if geometry is None else geometry.output[0] * geometry.output[1])
    return positions * weight.shape[3:].numel()


def backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    selection: Selection,
    bias: Tensor | None,
    mask_bias: bool,
    geometry: Geometry | None,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dw, dtau, dbias)`` by the closed form; dbias is dL/d(masked bias), summed, if there is no bias.

    ``needs``: whether the gradients of the input, and of the rest, are wanted; for what is counted as executed.
    """
    results: tuple[list[Tensor], ...] = ([], [], [], [])
    active, passes = selection.mask, (selection.flags & PASSES).bool()
    if needs[0]:
        executed.note(selection.count, _cost(input, weight, geometry), weight.shape[2])
    if needs[1] and executed.counting():
        arrives = (grad != 0).transpose(1, 2).flatten(2).any(2)
        computed = (selection.inverse >= 0) | (passes & arrives)
        executed.note(computed.sum(1, dtype=torch.int32), _cost(input, weight, geometry), weight.shape[2])
    for i in range(len(weight)):
        m, h = active[i].to(weight.dtype), passes[i].to(weight.dtype)
        w = weight[i]
        shape = (-1, *(1,) * (w.dim() - 1))
        masked = (w * active[i].view(shape)).to(input.dtype)
        if geometry is None:
            dx = grad[i] @ masked
            g = grad[i].T @ input[i]
            db = grad[i].sum(0)
        else:
            rest = geometry.stride, geometry.padding, geometry.dilation
            dx = conv_grad.conv2d_input(input[i].shape, masked, grad[i], *rest)
            g = conv_grad.conv2d_weight(input[i], w.shape, grad[i], *rest)
            db = grad[i].sum((0, 2, 3))
        g, db = g.to(w.dtype), db.to(w.dtype)
        r = (g * w).flatten(1).sum(1)
        if bias is not None and mask_bias:
            r = r + db * bias[i]
            db = db * m
        r = h * r
        dw = m.view(shape) * g + r.view(shape) * w.sign() / w[0].numel()
        for result, value in zip(results, (dx, dw, -r, db), strict=True):
            result.append(value)
    dx, dw, dtau, db = (torch.stack(result) for result in results)
    return dx, dw, dtau, db

"""Backward of linear and convolution layers, over the filters that can have a gradient and over nothing else.

Steps, each a launch without the host:

1. *collect*: read ``dL/dy`` once, in any layout; write the channels of active filters next to each other (both products
   below would otherwise gather channels in their inner loop, which forbids wide loads); per block of rows, sum every
   channel (bias gradient) and note whether it holds anything but zeros.
2. *extend*: add up those partial results in a fixed order, and append to the list of active filters the pruned ones
   whose gradient is needed: the estimator passes, and ``dL/dy`` of the channel is not all zero. With a ReLU behind the
   layer there are none, and they cost nothing. Each one there is costs its row of the weight gradient, as a dense
   layer would pay: the exact ``r_i`` of a pruned filter needs all of it.
3. *collect extra*: the channels of those filters; programs return at once when there are none.
4. *dgrad*: ``dL/dx``, reduced over active filters; positions are split by their residue modulo the stride, so that no
   kernel tap is visited in vain.
5. *wgrad*: rows ``G_i`` of the listed filters, float32, split over the batch into slabs.
6. *finish*: add the slabs in a fixed order; ``r_i = sum_j G_ij w_ij``; ``dL/dw`` and ``dL/dtau`` of every filter, zeros
   for those that are not listed.

Nothing is accumulated atomically, so results are the same in every run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..executed import counting, note
from ..tables import tiles as measured
from .collect import collecting
from .dgrad import input_gradient
from .forward import restrict
from .geometry import (
    Geometry,
    channels_last,
    channels_last_strides,
    dense_rows,
    empty_channels_last,
    like_rows,
    needs_copy,
    positions,
)
from .launch import REMEMBERED, Launch, current_stream
from .plan import Plan, capacity
from .tiles import Tile
from .wgrad import WeightGradients, weight_gradients


@dataclasses.dataclass(frozen=True)
class _Backward:
    """What the backward pass of given sizes needs beside its tensors."""

    copy: bool
    collected: tuple[int, ...]
    collect: Launch
    dx: tuple[int, ...]
    dx_strides: tuple[int, ...]
    dgrad: Launch | None
    weight: WeightGradients | None
    # Keeps the table of tiles alive whose identity is one of the facts.
    table: Any


@functools.lru_cache(REMEMBERED)
def _prepare(
    grad: tuple[tuple[int, ...], tuple[int, ...]], x: tuple[tuple[int, ...], tuple[int, ...]],
    weight: tuple[tuple[int, ...], tuple[int, ...]], dtypes: tuple[torch.dtype, ...], packed: int, plan: int,
    inputs: tuple[int, int] | None, bias: tuple[torch.dtype, int] | None, geometry: Geometry, mask_bias: bool,
    tf32: bool, need_input: bool, need_weight: bool, tile: Tile | None, device: torch.device, table: int,
) -> _Backward:  # fmt: skip
    """By everything that the launches depend on.

    Args:
        grad, x, weight: shapes and strides.
        dtypes: of these three, the packed weights and the plan.
        packed, plan: distances between clients in the packed weights and the plan.
        inputs: the same of the plan of the input, and its channels.
        bias: its dtype and the distance between clients.
        device: of all.
        table: identity of the table of measured tiles.
    """
    (clients, n, out, high, wide), g = grad[0], geometry
    channels, listed = (g.channels, None) if inputs is None else (inputs[1], inputs[0])
    weights = None
    if need_weight:
        bias_client = None if bias is None else bias[1]
        weights = weight_gradients(
            grad, positions(*x), weight, dtypes[1], bias_client, g, channels, mask_bias, tf32, tile, device, plan,
            listed,
        )  # fmt: skip
    product = None
    if need_input:
        product = input_gradient(
            clients, n, out, g, channels, dtypes[1], tf32, tile, device, packed, plan, listed
        )  # fmt: skip
    return _Backward(
        copy=needs_copy(*x),
        collected=(clients, n * high * wide, capacity(out)),
        collect=collecting(
            *grad, plan, partial_client=None if weights is None else math.prod(weights.partial[1:])
        ),
        dx=(clients, n, channels, g.height, g.width),
        dx_strides=channels_last_strides(channels, g.height, g.width, n),
        dgrad=product,
        weight=weights,
        table=measured.of(device),
    )  # fmt: skip


def layer_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    plan: Plan,
    bias: Tensor | None,
    geometry: Geometry,
    mask_bias: bool = False,
    tf32: bool = False,
    need_input: bool = True,
    need_weight: bool = True,
    tile: Tile | None = None,
    input_plan: Plan | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`~spafl_kernels.triton.forward.layer_forward` through the mask, as the definition gives them.

    Args:
        grad: ``dL/dy``, ``(clients, N, out, H', W')``, dtype of ``x``, any strides (also expanded).
        x, packed, plan, bias, geometry, mask_bias, tf32: as in the forward pass.
        weight: ``(clients, out, in[, kH, kW])``, the unmasked weight.
        need_input: whether ``dL/dx`` is wanted.
        need_weight: whether ``dL/dw``, ``dL/dtau`` and ``dL/db`` are wanted.
        tile: for both products, instead of the measured ones, or those of the rule.
        input_plan: as in the forward pass; ``dx`` and the columns of ``G`` of channels that are not listed are 0.

    Returns:
        ``(dx, dw, dtau, dbias)``: ``(clients, N, C, H, W)`` channels last in the dtype of ``x``; shape, dtype and
        memory order of ``weight``; ``(clients, out)`` in its dtype; ``(clients, out)`` in the dtype of ``bias``. None
        where not wanted (dbias: or no bias).
    """
    weight = dense_rows(weight)
    bias = None if bias is None else bias.contiguous()
    if grad.numel() == 0:
        return _nothing(x, weight, bias, need_input, need_weight)
    data, device, inputs = plan.data, x.device, None
    if input_plan is not None:
        x, packed, geometry = restrict(x, packed, input_plan, geometry)
        inputs = input_plan.data
    made = _prepare(
        (grad.shape, grad.stride()), (x.shape, x.stride()), (weight.shape, weight.stride()),
        (grad.dtype, x.dtype, weight.dtype, packed.dtype, data.dtype), packed.stride(0), data.stride(0),
        None if inputs is None or input_plan is None else (inputs.stride(0), input_plan.out),
        None if bias is None else (bias.dtype, bias.stride(0)), geometry, mask_bias, tf32, need_input, need_weight,
        tile, device, id(measured.of(device)),
    )  # fmt: skip
    inputs, stream, w = data if inputs is None else inputs, current_stream(x.get_device()), made.weight
    dx = dw = dtau = dbias = None
    collected = torch.empty(made.collected, dtype=grad.dtype, device=device)
    partial = data if w is None else torch.empty(w.partial, dtype=torch.float32, device=device)
    made.collect(stream, grad, collected, partial, data, data)
    channels = geometry.channels if input_plan is None else input_plan.count
    cost = made.collected[1] * math.prod(geometry.kernel)
    if made.dgrad is not None:
        if counting():
            note(plan.count, cost, channels)
        dx = torch.empty_strided(made.dx, made.dx_strides, dtype=x.dtype, device=device)
        made.dgrad(stream, collected, packed, dx, data, inputs)
    if w is not None:
        x = channels_last(x) if made.copy else x
        sums = torch.empty(w.sums, dtype=torch.float32, device=device)
        extended = torch.empty(w.extended, dtype=torch.int32, device=device)
        w.extend(stream, partial, sums, data, extended)
        w.extra(stream, grad, collected, data, data, extended)
        slabs = torch.empty(w.slabs, dtype=torch.float32, device=device)
        if counting():  # the active filters, and the pruned ones whose row is needed
            note(extended[:, 0], cost, channels)
        w.product(stream, x, collected, slabs, extended, inputs)
        dw = torch.empty_strided(weight.shape, w.dw, dtype=weight.dtype, device=device)
        dtau = torch.empty(w.sums, dtype=weight.dtype, device=device)
        dbias = None if bias is None else torch.empty(w.sums, dtype=bias.dtype, device=device)
        w.finish(
            stream, weight, weight if bias is None else bias, slabs, sums, data, extended, inputs, dw, dtau,
            dtau if dbias is None else dbias,
        )  # fmt: skip
    return dx, dw, dtau, dbias


def _nothing(
    x: Tensor, weight: Tensor, bias: Tensor | None, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of an empty batch: zeros."""
    clients, n, channels, high, wide = x.shape
    dx = empty_channels_last(clients, n, channels, (high, wide), x.dtype, x.device).zero_() if need_input else None
    if not need_weight:
        return dx, None, None, None
    dtau = weight.new_zeros(weight.shape[:2])
    return dx, like_rows(weight).zero_(), dtau, None if bias is None else bias.new_zeros(bias.shape)

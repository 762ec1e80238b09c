"""Backward of linear and convolution layers, over the filters that can have a gradient and over nothing else.

Steps, each a launch without the host:

1. *collect*: read ``dL/dy`` once, in any layout; write the channels of active filters next to each other (both products
   below would otherwise gather channels in their inner loop, which forbids wide loads); per block of rows, sum every
   channel (bias gradient) and note whether it holds anything but zeros.
2. *extend*: add up those partial results in a fixed order, 16 channels a program, and append to the list of active
   filters the pruned ones whose gradient is needed: the estimator passes, and ``dL/dy`` of the channel is not all zero.
   With a ReLU behind the layer there are none, and they cost nothing. Each one there is costs its row of the weight
   gradient, as a dense layer would pay: the exact ``r_i`` of a pruned filter needs all of it.
3. *collect extra*: the channels of those filters; programs return at once when there are none.
4. *dgrad*: ``dL/dx``, reduced over active filters; positions are split by their residue modulo the stride, so that no
   kernel tap is visited in vain.
5. *wgrad*: rows ``G_i`` of the listed filters, float32, split over the batch into slabs.
6. *finish*: add the slabs in a fixed order; ``r_i = sum_j G_ij w_ij``; ``dL/dw`` and ``dL/dtau`` of every filter, zeros
   for those that are not listed.

Nothing is accumulated atomically, so results are the same in every run.
"""

from __future__ import annotations

from torch import Tensor

from .collect import Statistics, collect_channels
from .device import on_device_of_first
from .dgrad import input_gradient
from .forward import restrict
from .geometry import Geometry, channels_last, dense_rows, empty_channels_last, like_rows
from .plan import Plan
from .tiles import Tile
from .wgrad import weight_gradients


@on_device_of_first
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
    n, g = x.shape[1], geometry
    if input_plan is not None:
        x, packed, g = restrict(x, packed, input_plan, g)
    else:
        x = channels_last(x)
    dx = dw = dtau = dbias = None
    statistics = Statistics.of(grad) if need_weight else None
    collected = collect_channels(grad, plan, statistics=statistics)
    if need_input:
        dx = input_gradient(collected, packed, plan, g, n, tf32, tile, input_plan)
    if statistics is not None:
        dw, dtau, dbias = weight_gradients(
            grad, collected, statistics, x, weight, plan, bias, g, mask_bias, tf32, tile, input_plan
        )
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

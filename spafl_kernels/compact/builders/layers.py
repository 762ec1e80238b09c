"""Calls of convolutions and linear layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers import ThresholdLayer
from ...ops.channels import is_channels_last
from ...ops.conv_pool import MAX_IN_CHANNELS, DirectConvReluPool
from ...ops.image_conv import DirectImageConv, Passes, image_passes
from ..flow import Op
from ..plan import Channels
from ..scope import Run, Scope
from ..slots import LayerSlot
from ..spread import pixels


def layer(scope: Scope, op: Op, i: int) -> Run:
    m, n = op.module, scope.count
    name = scope.names[id(m)]
    slot = scope.layers[name]
    source = scope.op(op.sources[0])
    mask_bias = isinstance(m, ThresholdLayer) and m.mask_bias
    drops = scope.channels(op) is not None and len(scope.plan.rows[name].dropped) > 0
    const_out = op.const and drops
    columns = None if op.data is None else scope.plan.channels(op.data)
    read = scope.full(source.name) if columns is None else None
    j = scope.index[source.name]
    const_in = columns is not None and source.const and len(columns.dropped) > 0
    conv = isinstance(m, nn.Conv2d)
    pad_first: list[int] | None = None
    padded = False
    taps: Tensor | None = None
    if conv:
        stride, padding, dilation, groups = m.stride, m.padding, m.dilation, m.groups
        if m.padding_mode != "zeros":
            pad_first, mode, padding = list(m._reversed_padding_repeated_twice), m.padding_mode, 0
        padded = padding != "valid" and padding not in (0, (0, 0))
        if const_in and padded:
            # A constant map under zero padding: which taps of the kernel fall inside the image, at every position.
            height, width = (source.shape or ())[2:]
            kernel = m.kernel_size[0] * m.kernel_size[1]
            eye = torch.eye(kernel, dtype=m.weight.dtype, device=m.weight.device).view(kernel, 1, *m.kernel_size)
            ones = torch.ones(1, 1, height, width, dtype=m.weight.dtype, device=m.weight.device)
            inside = F.conv2d(ones, eye, None, stride, padding, dilation)
            size, taps = inside.shape[2:], inside.view(kernel, -1)

    _count_macs(scope, op, source, slot, const_in, taps is not None)
    # Few enough input channels are a matter of the plan: a later layer comes within reach once inputs are pruned.
    within_reach = conv and not const_in and slot.weight.shape[1] <= MAX_IN_CHANNELS
    fused = scope.fused_pools.get(name) if within_reach else None
    if fused is not None:
        pooled, window = scope.index[fused[0]], fused[1]
        pad_h, pad_w = m.padding

    used, passes = _passes(scope, name, columns) if conv else ((0, 0), None)

    def run(env: list[Any], training: bool) -> None:
        x = env[j] if read is None else read(env)
        weight, bias, wd = slot.masked(mask_bias)
        mask = slot.mask
        if fused is not None and mask is None:
            env[i] = DirectConvReluPool.apply(x.contiguous(), weight, bias, pad_h, pad_w, window)
            env[3 * n + pooled] = True
            if const_out:
                env[n + i] = slot.bias_dropped
            return
        late = bias if mask is not None else None
        if mask is not None:
            bias = None
        shift = None
        if const_in and (c := env[n + j]) is not None:
            assert wd is not None
            if taps is not None:
                shift = _through(c, wd.flatten(2)) @ taps  # (rows, kernel) by (kernel, positions)
            else:
                flat = wd.flatten(1)
                kernel = flat.shape[1] // len(c)
                extra = torch.matmul(flat, c if kernel == 1 else c.repeat_interleave(kernel))
                bias = extra if bias is None else bias + extra
        if conv:
            if pad_first is not None:
                x = F.pad(x, pad_first, mode=mode)
            if passes is not None and is_channels_last(x) and weight.is_contiguous() and any(own := passes(len(x))):
                y = DirectImageConv.apply(x, weight, bias, stride, padding, used, own)
            else:
                y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
            if shift is not None:
                y = _AddMap.apply(y, shift) if is_channels_last(y) else y.add_(shift.view(1, -1, *size))
        else:
            y = F.linear(x, weight, bias)
        if mask is not None:
            shape = (1, -1, 1, 1) if conv else (-1,)
            if late is not None and mask_bias:
                y = y + late.view(shape).to(y.dtype)
            y = y * mask.view(shape).to(y.dtype)
            if late is not None and not mask_bias:
                y = y + late.view(shape).to(y.dtype)
        env[i] = y
        if const_out:
            env[n + i] = as_type_of(slot.bias_dropped, y)

    return run


def _through(constants: Tensor, weights: Tensor) -> Tensor:
    """``(C,)`` by ``(rows, C, kernel)``: ``(rows, kernel)``."""
    if weights.device.type == "cpu":
        return torch.matmul(constants, weights)
    # matmul would copy the weights, forward and backward, to have one product; elsewhere a call is what costs.
    return torch.bmm(constants.expand(len(weights), 1, -1), weights).squeeze(1)


def as_type_of(constants: Tensor | None, y: Tensor) -> Tensor | None:
    """Constants in the type of what they stand beside, which under autocast is not that of the parameters."""
    return constants if constants is None or constants.dtype == y.dtype else constants.to(y.dtype)


def _passes(
    scope: Scope, name: str, columns: Channels | None
) -> tuple[tuple[int, int], Callable[[int], Passes] | None]:
    """The channels of a convolution that are not padding, and by batch size the passes for :func:`image_conv`."""
    m, rows = scope.flow.layers[name].module, scope.plan.rows.get(name)
    inputs = m.in_channels if columns is None else len(columns.kept)
    outputs = m.out_channels if rows is None else len(rows.kept)
    used = max(inputs, 1), max(outputs, 1)
    plain = m.padding_mode == "zeros" and not isinstance(m.padding, str) and m.dilation == (1, 1) and m.groups == 1
    if not (scope.native and scope.channels_last and plain):
        return used, None
    dtype = m.weight.dtype
    return used, functools.cache(lambda batch: image_passes(batch, *used, dtype))


def depthwise(scope: Scope, op: Op, i: int) -> Run:
    """Channel by channel: only the kept filters' input channels are read, constants included."""
    m, n = op.module, scope.count
    name = scope.names[id(m)]
    slot, source = scope.layers[name], scope.op(op.sources[0])
    _count_macs(scope, op, source, slot, False, False)
    rows = scope.plan.rows.get(name)
    before = None if op.data is None else scope.plan.channels(op.data)
    read, j = scope.full(source.name), scope.index[source.name]
    mask_bias = isinstance(m, ThresholdLayer) and m.mask_bias
    const_out = op.const and rows is not None and len(rows.dropped) > 0
    # Without constants a dropped input channel is 0; then only channels kept on both sides are moved.
    select = None if rows is None or rows.full else rows.kept
    direct = before is not None and rows is not None and torch.equal(before.host.kept, rows.host.kept)

    def run(env: list[Any], training: bool) -> None:
        if direct:
            assert rows is not None and before is not None
            x = env[j].narrow(1, 0, len(before.kept)) if before.pads else env[j]
        else:
            x = read(env)
            if select is not None:
                x = x.index_select(1, select)
        weight, bias, _ = slot.masked(mask_bias)
        mask = slot.mask
        if rows is not None and rows.pads:
            x = F.pad(x, (0, 0, 0, 0, 0, rows.pads))
        padding: Any = m.padding
        if m.padding_mode != "zeros":
            x = F.pad(x, list(m._reversed_padding_repeated_twice), mode=m.padding_mode)
            padding = 0
        y = F.conv2d(x, weight, bias if mask is None else None, m.stride, padding, m.dilation, weight.shape[0])
        if mask is not None:
            if bias is not None and mask_bias:
                y = y + bias.view(1, -1, 1, 1).to(y.dtype)
            y = y * mask.view(1, -1, 1, 1).to(y.dtype)
            if bias is not None and not mask_bias:
                y = y + bias.view(1, -1, 1, 1).to(y.dtype)
        env[i] = y
        if const_out:
            env[n + i] = as_type_of(slot.bias_dropped, y)

    return run


def _count_macs(scope: Scope, op: Op, source: Op, slot: LayerSlot, const_in: bool, as_map: bool) -> None:
    passes = 3 if source.grad else 2
    scope.macs += passes * slot.weight.numel() * op.positions
    if const_in and (dropped := slot.weight_dropped) is not None:
        scope.macs_fixed += 3 * dropped.numel()
        if as_map:  # forward, and the gradient of what the constants make of each tap
            scope.macs_fixed += 2 * dropped[:, 0].numel() * op.positions


class _AddMap(torch.autograd.Function):
    """``_AddMap.apply(y, map)``: the same map on every image, in place; ``y`` in channels-last order.

    Autograd's sum of the gradient over the batch, and a sum with a map in another order than ``y``, take several times
    as long as a pass over the images.

    Args:
        y: ``(N, C, H, W)``.
        map: ``(C, H * W)``.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, map: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        pixels(y).view(len(y), -1).add_(map.t().reshape(1, -1))
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        channels = grad.shape[1]
        rows = grad.permute(0, 2, 3, 1).reshape(len(grad), -1)
        return grad, rows.sum(0).view(-1, channels).t() if ctx.needs_input_grad[1] else None

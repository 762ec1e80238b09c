"""Convolutions and linear layers: what decides which channels are kept, and what needs only those."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...computed import ComputedWeight, weight_of
from ...cpu.channels import is_channels_last
from ...cpu.conv_pool import MAX_IN_CHANNELS, DirectConvReluPool
from ...cpu.image_conv import DirectImageConv, Passes, image_passes
from ...layers import ThresholdConv2d, ThresholdLayer, ThresholdLinear
from ...training import Unsupported
from ..graph.layout import Layout, Segment
from ..plan.plan import Channels, Plan
from ..plan.state import as_transposed, by_filter
from ..run.constants import all_places, typed
from ..run.spread import pixels
from ..small import Value, take_rows_of
from .base import Const, Op, kinds_of

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..plan.slots import LayerSlot
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["Layer", "under_mask"]


@dataclass(eq=False)
class Layer(Op):
    """A convolution or a linear layer. ``reads``: layout of what it reads, None at full width."""

    kind = "layer"
    modules: ClassVar[tuple[type, ...]] = (nn.Conv2d, ThresholdConv2d, nn.Linear, ThresholdLinear)
    reads_channels = True
    fresh = True

    reads: Layout | None = None
    # Where a filter is applied in one sample: positions of the result, of the input if the layer is transposed.
    positions: int = 0

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        kinds: Iterator[Any] = kinds_of(Layer)
        kind = next((k for k in kinds if k.fits(m)), Layer)
        flow.layers[flow.names[id(m)]] = op = kind(node, grad=True)
        return op

    @classmethod
    def fits(cls, m: Any) -> bool:
        """Whether a layer is of a kind of its own."""
        return False

    @property
    def columns(self) -> Layout | None:
        """The channels that the weights have columns for; None if they have all."""
        return self.reads

    @property
    def dense(self) -> bool:
        """Whether every filter reads channels of its own choice, not its place's."""
        return True

    @property
    def is_conv(self) -> bool:
        return not isinstance(self.module, nn.Linear)

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, nn.ConvTranspose2d)

    @property
    def weight(self) -> Tensor:
        """``(filters, inputs, *kernel)``, at full size."""
        return by_filter(self.module, weight_of(self.module))

    @property
    def along(self) -> tuple[int, ...]:
        """The shape in which a number per filter broadcasts to the result."""
        return (1, -1, *(1,) * (self.module.weight.dim() - 2)) if self.is_conv else (-1,)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        """The layer with another weight, ``(filters, inputs, *kernel)``."""
        m = self.module
        if not self.is_conv:
            return F.linear(x, weight, bias)
        if self.transposed:
            weight = as_transposed(weight, groups)
            return F.conv_transpose2d(x, weight, bias, m.stride, m.padding, m.output_padding, groups, m.dilation)
        pad_first, padding = self.outer_padding()
        if pad_first is not None:
            x = F.pad(x, pad_first, mode=m.padding_mode)
        conv = F.conv1d if weight.dim() == 3 else F.conv2d
        return conv(x, weight, bias, m.stride, padding, m.dilation, groups)

    # -- channels --------------------------------------------------------------------------------------------------

    def follow(self, flow: Flow) -> None:
        m, before, ndim = self.module, flow.source(self), len(self.shape or ())
        shape = (before.shape if self.transposed else self.shape) or ()
        self.positions = prod(shape[2:] if self.is_conv else shape[1:-1])
        dim = 1 if self.is_conv else ndim - 1
        if before.layout is not None:
            if before.layout.dim != dim:
                flow.stop(self, "channels are not where the layer reads them")
            elif (reason := self.unread(before)) is not None:
                flow.stop(self, reason)
            else:
                self.reads = before.layout
        if self.is_conv and ndim != self.weight.dim():
            raise Unsupported(f"layer {self.node.target!r} gets an input without a batch dimension")
        if isinstance(m, ThresholdLayer):
            self.layout = Layout(dim, (Segment(((flow.names[id(m)], 0),), len(self.weight)),))
            self.const = Const.SAME if m.bias is not None and not m.mask_bias else Const.ZERO

    def unread(self, before: Op) -> str | None:
        """Why the kept channels of ``before`` cannot be read alone."""
        return None

    def product(self, plan: Plan, padded: bool) -> tuple[int, int, int]:
        """What is computed at every position: rows, inputs of each, and groups; with the zeros that fill it up."""
        m = self.module
        rows, columns = plan.rows.get(plan.names[id(m)]), None if self.columns is None else plan.channels(self.columns)
        count = len(self.weight) if rows is None else rows.stored if padded else len(rows.kept)
        width = self.weight.shape[1] if columns is None else columns.stored if padded else len(columns.kept)
        return count, width, 1

    # -- the call --------------------------------------------------------------------------------------------------

    def reads_constants(self, scope: Scope) -> bool:
        columns = None if self.columns is None else scope.plan.channels(self.columns)
        return columns is not None and bool(scope.op(self.sources[0]).const) and len(columns.dropped) > 0

    def takes_tail(self, scope: Scope) -> bool:
        """Whether ReLU and max-pool can be a part of the call.

        Few enough input channels are a matter of the plan: a later layer comes within reach once inputs are pruned.
        """
        slot = scope.layers[scope.flow.names[id(self.module)]]
        return not self.reads_constants(scope) and slot.weight.shape[1] <= MAX_IN_CHANNELS

    def build(self, scope: Scope, i: int) -> Run:
        m = self.module
        name = scope.flow.names[id(m)]
        slot = scope.layers[name]
        source = scope.op(self.sources[0])
        mask_bias = isinstance(m, ThresholdLayer) and m.mask_bias
        drops = scope.channels(self) is not None and len(scope.plan.rows[name].dropped) > 0
        const_out = bool(self.const) and drops
        columns = None if self.columns is None else scope.plan.channels(self.columns)
        read = scope.full(source.name) if columns is None else None
        j = scope.index[source.name]
        const_in = self.reads_constants(scope)
        conv, tail = self.is_conv, scope.tails.get(self.name)
        if conv:
            stride, dilation, groups = m.stride, m.dilation, m.groups
            pad_first, padding = self.outer_padding()
            shift = _ConvConstants(self, source.shape or ()) if const_in else None
        self.count_macs(scope, source, slot, const_in, conv and shift is not None and shift.taps is not None)
        used, passes = self.passes(scope, columns) if conv else ((0, 0), None)

        def run(env: Values, training: bool) -> None:
            x = env.kept[j] if read is None else read(env)
            weight, bias, wd = slot.masked(mask_bias)
            mask = slot.mask
            if tail is not None and mask is None:
                env.kept[i] = DirectConvReluPool.apply(x.contiguous(), weight, bias, *m.padding, tail.window)
                if const_out:
                    assert slot.bias_dropped is not None
                    env.constants[i] = torch.relu(slot.bias_dropped)
                return
            late = bias if mask is not None else None
            if mask is not None:
                bias = None
            extra: Tensor | None = None
            if const_in and (c := env.constants[j]) is not None:
                assert wd is not None
                if conv:
                    assert shift is not None
                    bias, extra = shift(c, wd, bias)
                elif c.dim() == 1:
                    bias, extra = _plus_product(wd.flatten(1), c, bias), None
                else:
                    extra = F.linear(c, wd)
            if conv:
                if pad_first is not None:
                    x = F.pad(x, pad_first, mode=m.padding_mode)
                if passes is not None and is_channels_last(x) and weight.is_contiguous() and any(own := passes(len(x))):
                    y = DirectImageConv.apply(x, weight, bias, stride, padding, used, own)
                else:
                    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
                if extra is not None:
                    y = _AddMap.apply(y, extra) if extra.dim() == 2 and is_channels_last(y) else _added(y, extra)
            else:
                y = F.linear(x, weight, bias)
                if extra is not None:
                    y = y + extra
            if mask is not None:
                y = under_mask(y, mask, late, mask_bias, self.along)
            c = typed(slot.bias_dropped, y) if const_out else None
            if tail is not None:
                y, c = tail(y), None if c is None else torch.relu(c)
            env.kept[i], env.constants[i] = y, c

        return run

    def outer_padding(self) -> tuple[list[int] | None, Any]:
        """How the image is padded before the convolution, if not with zeros, and the convolution's own padding."""
        m = self.module
        return (None, m.padding) if m.padding_mode == "zeros" else (list(m._reversed_padding_repeated_twice), 0)

    def passes(self, scope: Scope, columns: Channels | None) -> tuple[tuple[int, int], Callable[[int], Passes] | None]:
        """The channels of a convolution that are not padding, and by batch size the passes for :func:`image_conv`."""
        m = self.module
        rows = scope.plan.rows.get(scope.flow.names[id(m)])
        sizes = self.weight.shape[:2] if isinstance(m, ComputedWeight) else (m.out_channels, m.in_channels)
        inputs = sizes[1] if columns is None else len(columns.kept)
        outputs = sizes[0] if rows is None else len(rows.kept)
        used = max(inputs, 1), max(outputs, 1)
        plain = m.padding_mode == "zeros" and not isinstance(m.padding, str) and m.dilation == (1, 1) and m.groups == 1
        if not (scope.native and scope.channels_last and plain):
            return used, None
        dtype = m.weight.dtype
        return used, functools.cache(lambda batch: image_passes(batch, *used, dtype))

    def count_macs(self, scope: Scope, source: Op, slot: LayerSlot, const_in: bool, as_map: bool) -> None:
        scope.macs += (3 if source.grad else 2) * slot.weight.numel() * self.positions
        if const_in and (dropped := slot.weight_dropped) is not None:
            if source.const == Const.SAMPLE:
                scope.macs += 3 * dropped.numel()
            else:
                scope.macs_fixed += 3 * dropped.numel() * (self.positions if source.const == Const.PLACE else 1)
            if as_map:  # forward, and the gradient of what the constants make of each tap
                scope.macs_fixed += 2 * dropped[:, 0].numel() * self.positions

    # -- export ----------------------------------------------------------------------------------------------------

    def export(self, small: Small) -> Value:
        m, source = self.module, small.source(self)
        name, conv = small.flow.names[id(m)], self.is_conv
        rows, columns = small.plan.rows.get(name), None if self.columns is None else small.plan.channels(self.columns)
        weight, bias, dropped_bias = self.exported_rows(rows)
        node = self.exported_input(small, rows)
        border: Tensor | None = None
        if columns is not None:
            if source.constants is not None:
                dropped = weight.index_select(1, columns.dropped)
                bias, border = self.exported_constants(small, dropped, bias)
            weight = weight.index_select(1, columns.kept)
            if columns.pads:
                weight = F.pad(weight, [0, 0] * (weight.dim() - 2) + [0, columns.pads])
        result: Op = self
        out_constants = dropped_bias
        if (norm := small.folded.get(self.name)) is not None:
            result = norm
            scale, shift, out_constants = norm.numbers(rows, dropped_bias)
            weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
            bias = shift if bias is None else bias * scale + shift
            border = None if border is None else border * scale.view(1, -1, *(1,) * (border.dim() - 2))
        if conv:
            out = self.exported_conv(small, name, node, weight, bias, self.exported_groups(weight))
        else:
            made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
            made.weight.copy_(weight)
            if bias is not None:
                made.bias.copy_(bias)
            out = small.module(name, made, node)
        if border is not None:
            small.of_one_size(out, self.shape or (), 1 if conv else len(self.shape or ()) - 1)
            out = small.call(torch.add, out, small.buffer(f"{name}_border", border))
        value = Value(out, small.channels(result), out_constants)
        small.values[result.name] = value
        return value

    def exported_rows(self, rows: Channels | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight and bias of the kept rows under the mask, and what a dropped row's result is."""
        m = self.module
        weight, bias = self.weight.detach(), None if m.bias is None else m.bias.detach()
        if isinstance(m, ThresholdLayer):
            mask = m.mask().to(weight.dtype)
            weight = weight * mask.view(-1, *(1,) * (weight.dim() - 1))
            if bias is not None and m.mask_bias:
                bias = bias * mask
        if rows is None:
            return weight, bias, None
        dropped = bias[rows.dropped] if bias is not None and not m.mask_bias and len(rows.dropped) else None
        return take_rows_of(weight, rows), None if bias is None else take_rows_of(bias, rows), dropped

    def exported_conv(
        self, small: Small, name: str, node: fx.Node, weight: Tensor, bias: Tensor | None, groups: int
    ) -> fx.Node:
        m = self.module
        padding: Any = m.padding
        if isinstance(padding, str):
            # In numbers: ONNX Runtime refuses "same" with dilation.
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(m.dilation, m.kernel_size)]
            padding = tuple(t // 2 for t in total)
            if any(t % 2 for t in total):
                sides = [n for t in reversed(total) for n in (t // 2, t - t // 2)]
                padding = 0
                mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
                node = small.call(F.pad, node, sides, mode)
        if self.transposed:
            made: Any = nn.ConvTranspose2d(
                weight.shape[1] * groups, weight.shape[0], m.kernel_size, m.stride, padding, m.output_padding, groups,
                bias is not None, m.dilation, m.padding_mode, weight.device, weight.dtype,
            )  # fmt: skip
            weight = as_transposed(weight, groups)
        else:
            made = (nn.Conv1d if isinstance(m, nn.Conv1d) else nn.Conv2d)(
                weight.shape[1] * groups, weight.shape[0], m.kernel_size, m.stride, padding, m.dilation, groups,
                bias is not None, m.padding_mode, weight.device, weight.dtype,
            )  # fmt: skip
        made.weight.copy_(weight)
        if bias is not None:
            assert made.bias is not None
            made.bias.copy_(bias)
        return small.module(name, made, node)

    def exported_input(self, small: Small, rows: Channels | None) -> fx.Node:
        return small.full(self.sources[0]) if self.columns is None else small.source(self).node

    def exported_groups(self, weight: Tensor) -> int:
        return self.module.groups if self.is_conv else 1

    def exported_constants(
        self, small: Small, dropped: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The bias with what constants add to it, and what they add otherwise."""
        maps, c = small.constant_maps(self), small.source(self).constants
        assert maps is not None and c is not None
        if not self.is_conv:
            return (_plus_product(dropped, c, bias), None) if c.dim() == 1 else (bias, F.linear(maps, dropped))
        m = self.module
        pad_first, padding = self.outer_padding()
        if c.dim() == 1 and (pad_first is not None or padding in ("valid", 0, (0, 0))):
            return _plus_product(dropped.flatten(2).sum(2), c, bias), None
        if pad_first is not None:
            maps = F.pad(maps, pad_first, mode=m.padding_mode)
        return bias, F.conv2d(maps, dropped, None, m.stride, padding, m.dilation)


def under_mask(y: Tensor, mask: Tensor, bias: Tensor | None, mask_bias: bool, shape: tuple[int, ...]) -> Tensor:
    """A result without bias, masked, and the bias inside or outside the mask."""
    if bias is not None and mask_bias:
        y = y + bias.view(shape).to(y.dtype)
    y = y * mask.view(shape).to(y.dtype)
    return y + bias.view(shape).to(y.dtype) if bias is not None and not mask_bias else y


class _ConvConstants:
    """What the constants of dropped input channels add to a convolution's result.

    ``(constants, weights of dropped inputs, bias) -> (bias, what else is to be added)``; the latter is
    ``(rows, positions)`` or broadcasts to the result.
    """

    def __init__(self, op: Layer, shape: tuple[int, ...]) -> None:
        m = op.module
        self.settings = m.stride, m.padding, m.dilation
        self.shape = shape
        self.pad_first, padding = op.outer_padding()
        self.mode = m.padding_mode
        self.kernel = prod(m.kernel_size)
        self.taps: Tensor | None = None
        if self.pad_first is None and padding != "valid" and padding not in (0, (0, 0)):
            # A constant map under zero padding: which taps of the kernel fall inside the image, at every position.
            like = {"dtype": m.weight.dtype, "device": m.weight.device}
            eye = torch.eye(self.kernel, **like).view(self.kernel, 1, *m.kernel_size)
            inside = F.conv2d(torch.ones(1, 1, *shape[2:], **like), eye, None, *self.settings)
            self.size, self.taps = inside.shape[2:], inside.view(self.kernel, -1)

    def __call__(self, c: Tensor, weights: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if c.dim() == 1:
            if self.taps is None:
                return _plus_product(weights.flatten(1), c, bias), None
            return bias, _through(c, weights.flatten(2)) @ self.taps  # (rows, kernel) by (kernel, positions)
        if c.shape[2:].numel() > 1:
            c = all_places(c, self.shape, 1)
            if self.pad_first is not None:
                c = F.pad(c, self.pad_first, mode=self.mode)
                return bias, F.conv2d(c, weights, None, self.settings[0], 0, self.settings[2])
            return bias, F.conv2d(c, weights, None, *self.settings)
        # A constant of every sample: (samples, dropped).
        c = c.flatten(1)
        if self.taps is None:
            return bias, F.linear(c, weights.flatten(2).sum(2)).unflatten(1, (-1, 1, 1))
        by_tap = torch.einsum("nd,rdk->nrk", c, weights.flatten(2))
        return bias, (by_tap @ self.taps).unflatten(2, self.size)


def _added(y: Tensor, extra: Tensor) -> Tensor:
    return y.add_(extra.view(1, len(extra), *y.shape[2:]) if extra.dim() == 2 else extra)


def _plus_product(weights: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """``bias`` plus ``weights @ c``, every constant as often as the kernel has taps."""
    taps = weights.shape[1] // len(c)
    extra = torch.matmul(weights, c if taps == 1 else c.repeat_interleave(taps))
    return extra if bias is None else bias + extra


def _through(constants: Tensor, weights: Tensor) -> Tensor:
    """``(C,)`` by ``(rows, C, kernel)``: ``(rows, kernel)``."""
    if weights.device.type == "cpu":
        return torch.matmul(constants, weights)
    # matmul would copy the weights, forward and backward, to have one product; elsewhere a call is what costs.
    return torch.bmm(constants.expand(len(weights), 1, -1), weights).squeeze(1)


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

"""A compact plan turned into a list of calls: the forward pass on compact activations.

Every value has two parts: the tensor of kept channels, and the constants of its dropped channels (None when they are
all 0). The tensors of layers and norms are read from slots at every run, so that whoever owns them may replace them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .. import native
from ..layers import ThresholdLayer
from ..ops.channels import is_channels_last
from ..ops.conv_pool import MAX_IN_CHANNELS, MAX_KERNEL, POOLS, DirectConvReluPool, DirectReluPool
from ..ops.image_conv import DirectImageConv, Passes, image_passes
from ..ops.norm import DirectBatchNormRelu
from ..ops.norm import pools as takes_pool
from .flow import Flow, Op
from .heads import Heads, attend
from .plan import Channels, Plan
from .spread import Pick, Spread, Summand, pixels

__all__ = ["LayerSlot", "NormSlot", "Program", "always_fused", "prefers_channels_last"]


@dataclass
class LayerSlot:
    """Compact tensors of one layer. Rows are the kept filters, then zero rows.

    Args:
        weight: ``(rows, kept inputs + pads, *kernel)``.
        weight_dropped: ``(rows, dropped inputs, *kernel)``; may be None where dropped inputs are 0.
        bias: ``(rows,)`` or None.
        bias_dropped: bias of the dropped filters; None without bias.
        mask: ``(rows,)`` multiplies the output if some kept filters are pruned; its gradient is ``sum G w`` per row.
        rows: ``(rows,)`` multiplies the weights instead, where that gradient is not wanted.
    """

    weight: Any
    weight_dropped: Tensor | None = None
    bias: Tensor | None = None
    bias_dropped: Tensor | None = None
    mask: Tensor | None = None
    rows: Tensor | None = None

    def masked(self, mask_bias: bool) -> tuple[Any, Tensor | None, Tensor | None]:
        """Weight, bias and the weights of dropped inputs under ``rows``."""
        weight, bias, dropped, rows = self.weight, self.bias, self.weight_dropped, self.rows
        if rows is not None:
            column = rows.view(-1, *(1,) * (weight.dim() - 1))
            weight = weight * column
            dropped = None if dropped is None else dropped * column
            bias = bias * rows if bias is not None and mask_bias else bias
        return weight, bias, dropped


@dataclass
class NormSlot:
    """Compact tensors of one BatchNorm; the last four are those of dropped channels, None if there are none."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    weight_dropped: Tensor | None = None
    bias_dropped: Tensor | None = None
    mean_dropped: Tensor | None = None
    var_dropped: Tensor | None = None


Run = Callable[[list[Any], bool], None]


class Program:
    """Runs ``flow`` under ``plan``. ``macs`` are executed per sample by one training step, ``macs_fixed`` per step."""

    def __init__(
        self,
        flow: Flow,
        plan: Plan,
        layers: dict[str, LayerSlot],
        norms: dict[str, NormSlot],
        channels_last: bool = False,
        compiled: bool = True,
    ) -> None:
        self.flow, self.plan, self.layers, self.norms = flow, plan, layers, norms
        self._channels_last = channels_last
        weight = next(flow.model.parameters())
        floats = (torch.float32, torch.float64)
        self._native = compiled and weight.device.type == "cpu" and weight.dtype in floats and native.available()
        self._fused = fused_pools(flow) if self._native else {}
        self._fused_norms = fused_norms(flow) if self._native else {}
        self.macs = self.macs_fixed = 0
        self._index = {name: i for i, name in enumerate(flow.ops)}
        self._count = len(self._index)
        self._names = {id(op.module): name for ops in (flow.layers, flow.norms) for name, op in ops.items()}
        self._pooled_first: set[str] = set()
        self._calls: list[tuple[Run, tuple[int, ...]]] = []
        last = {name: op.name for op in flow.ops.values() for name in op.sources}
        last[flow.output] = ""
        for op in flow.ops.values():
            if op.kind == "input":
                self._input = self._index[op.name]
                continue
            if op.kind in ("output", "inner"):
                continue
            run = getattr(self, f"_build_{op.kind}")(op, self._index[op.name])
            n = self._count
            frees = [self._index[s] for s in dict.fromkeys(op.sources) if last[s] == op.name]
            self._calls.append((run, tuple(i + part * n for i in frees for part in range(4))))
        self._output = self._full(flow.output)

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """The model's output for a batch, at full width.

        ``training`` is for functional calls; modules read their own flag.
        """
        # Per value: the kept channels, the constants, the full-width copy, and whether a fused call has made it.
        env: list[Any] = [None] * (4 * self._count)
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        env[self._input] = x
        for run, frees in self._calls:
            run(env, training)
            for i in frees:
                env[i] = None
        return self._output(env)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _channels(self, op: Op) -> Channels | None:
        return None if op.layout is None else self.plan.channels(op.layout)

    def _op(self, name: str) -> Op:
        return self.flow.ops[name]

    def _full(self, name: str) -> Callable[[list[Any]], Any]:
        """Reads a value at full width."""
        op, j, n = self._op(name), self._index[name], self._count
        channels = self._channels(op)
        if channels is None or channels.full:
            return lambda env: env[j]
        assert op.layout is not None
        spread = Spread(channels.kept, channels.width, op.layout.dim, self._native)

        def full(env: list[Any]) -> Tensor:
            if env[2 * n + j] is None:
                env[2 * n + j] = spread(env[j], env[n + j], None)
            return env[2 * n + j]

        return full

    # -- one method per kind of op ---------------------------------------------------------------------------------

    def _build_layer(self, op: Op, i: int) -> Run:
        m, n = op.module, self._count
        name = self._names[id(m)]
        slot = self.layers[name]
        source = self._op(op.sources[0])
        mask_bias = isinstance(m, ThresholdLayer) and m.mask_bias
        drops = self._channels(op) is not None and len(self.plan.rows[name].dropped) > 0
        const_out = op.const and drops
        columns = None if op.data is None else self.plan.channels(op.data)
        read = self._full(source.name) if columns is None else None
        j = self._index[source.name]
        const_in = columns is not None and source.const and len(columns.dropped) > 0
        self._count_macs(op, source, slot, const_in)
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

        # Few enough input channels are a matter of the plan: a later layer comes within reach once inputs are pruned.
        within_reach = conv and not const_in and slot.weight.shape[1] <= MAX_IN_CHANNELS
        fused = self._fused.get(name) if within_reach else None
        if fused is not None:
            pooled, window = self._index[fused[0]], fused[1]
            pad_h, pad_w = m.padding

        used, passes = self._image_passes(name, columns) if conv else ((0, 0), None)

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
                    shift = torch.matmul(c, wd.flatten(2)) @ taps  # (rows, kernel) by (kernel, positions)
                else:
                    flat = wd.flatten(1)
                    kernel = flat.shape[1] // len(c)
                    extra = torch.mv(flat, c if kernel == 1 else c.repeat_interleave(kernel))
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
                    y = y + late.view(shape)
                y = y * mask.view(shape)
                if late is not None and not mask_bias:
                    y = y + late.view(shape)
            env[i] = y
            if const_out:
                env[n + i] = slot.bias_dropped

        return run

    def _image_passes(
        self, name: str, columns: Channels | None
    ) -> tuple[tuple[int, int], Callable[[int], Passes] | None]:
        """The channels of a convolution that are not padding, and by batch size the passes for :func:`image_conv`."""
        m, rows = self.flow.layers[name].module, self.plan.rows.get(name)
        inputs = m.in_channels if columns is None else len(columns.kept)
        outputs = m.out_channels if rows is None else len(rows.kept)
        used = max(inputs, 1), max(outputs, 1)
        plain = m.padding_mode == "zeros" and not isinstance(m.padding, str) and m.dilation == (1, 1) and m.groups == 1
        if not (self._native and self._channels_last and plain):
            return used, None
        dtype = m.weight.dtype
        return used, functools.cache(lambda batch: image_passes(batch, *used, dtype))

    def _build_depthwise(self, op: Op, i: int) -> Run:
        """Channel by channel: only the kept filters' input channels are read, constants included."""
        m, n = op.module, self._count
        name = self._names[id(m)]
        slot, source = self.layers[name], self._op(op.sources[0])
        self._count_macs(op, source, slot, False)
        rows = self.plan.rows.get(name)
        before = None if op.data is None else self.plan.channels(op.data)
        read, j = self._full(source.name), self._index[source.name]
        mask_bias = isinstance(m, ThresholdLayer) and m.mask_bias
        const_out = op.const and rows is not None and len(rows.dropped) > 0
        # Without constants a dropped input channel is 0; then only channels kept on both sides are moved.
        select = None if rows is None or rows.full else rows.kept
        direct = before is not None and rows is not None and bool(torch.equal(before.kept, rows.kept))

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
                    y = y + bias.view(1, -1, 1, 1)
                y = y * mask.view(1, -1, 1, 1)
                if bias is not None and not mask_bias:
                    y = y + bias.view(1, -1, 1, 1)
            env[i] = y
            if const_out:
                env[n + i] = slot.bias_dropped

        return run

    def _count_macs(self, op: Op, source: Op, slot: LayerSlot, const_in: bool) -> None:
        passes = 3 if source.grad else 2
        self.macs += passes * slot.weight.numel() * op.positions
        if const_in and slot.weight_dropped is not None:
            self.macs_fixed += 3 * slot.weight_dropped.numel()

    def _build_norm(self, op: Op, i: int) -> Run:
        m, n = op.module, self._count
        slot = self.norms[self._names[id(m)]]
        momentum, eps = m.momentum, m.eps
        channels = None if op.data is None else self.plan.channels(op.data)
        read = self._full(op.sources[0]) if channels is None else None
        drops = channels is not None and len(channels.dropped) > 0
        j = self._index[op.sources[0]]
        relu, pool, window = self._fused_norms.get(op.name, ("", "", 1))
        after_relu, after_pool = (3 * n + self._index[name] if name else 0 for name in (relu, pool))
        assert momentum is not None

        def run(env: list[Any], training: bool) -> None:
            x = env[j] if read is None else read(env)
            training = m.training
            arguments = (x, slot.running_mean, slot.running_var, slot.weight, slot.bias, training, momentum, eps)
            # Of one value per channel, or none, PyTorch knows what to say.
            if relu and x.numel() > x.shape[1]:
                pooled = window > 1 and takes_pool(x, window)
                env[i] = DirectBatchNormRelu.apply(*arguments, window if pooled else 1)
                env[after_pool if pooled else after_relu] = True
            else:
                env[i] = F.batch_norm(*arguments)
            if not drops:
                return
            c, mean, var, bias = env[n + j], slot.mean_dropped, slot.var_dropped, slot.bias_dropped
            assert mean is not None and var is not None
            if training:
                # A constant has batch variance 0, and its normalised value is 0.
                env[n + i] = bias
                with torch.no_grad():
                    mean.mul_(1 - momentum)
                    if c is not None:
                        mean.add_(c, alpha=momentum)
                    var.mul_(1 - momentum)
            else:
                out = -mean if c is None else c - mean
                out = out * torch.rsqrt(var + eps)
                if bias is not None:
                    out = (
                        torch.addcmul(bias, out, slot.weight_dropped) if slot.weight_dropped is not None else out + bias
                    )
                env[n + i] = out

        return run

    def _build_relu(self, op: Op, i: int) -> Run:
        apply, n, j = op.apply, self._count, self._index[op.sources[0]]
        assert apply is not None
        source = self._op(op.sources[0])
        users = [self._op(u.name) for u in op.node.users]
        if op.kind == "relu" and len(users) == 1 and users[0].kind == "pool" and _is_max(users[0]):
            # ReLU after the max-pool is the same function with the same gradient, on a quarter of the elements. What
            # falls anywhere, as GELU does, would be another function there.
            self._pooled_first.add(op.name)

            def pass_on(env: list[Any], training: bool) -> None:
                env[i], env[n + i] = env[j], env[n + j]

            return pass_on
        inside = source.kind in ("layer", "depthwise", "norm", "pool", "add") and single_user(self.flow, source)
        if inside and apply is F.relu:
            apply = torch.relu_
        outside: Any = op.apply

        def run(env: list[Any], training: bool) -> None:
            env[i] = env[j] if env[3 * n + i] else apply(env[j])
            c = env[n + j]
            if c is not None:
                env[n + i] = outside(c)

        return run

    _build_unary = _build_relu

    def _build_pool(self, op: Op, i: int) -> Run:
        apply, n, j = op.apply, self._count, self._index[op.sources[0]]
        assert apply is not None
        source = self._op(op.sources[0])
        relu = source.apply if source.name in self._pooled_first else None
        inner: Any = torch.relu_ if relu is F.relu else relu
        done = 3 * n + j  # ReLU is part of the norm before it
        window = _plain_window(op)
        direct = relu is F.relu and self._native and window is not None

        def run(env: list[Any], training: bool) -> None:
            y, c = env[j], env[n + j]
            if not env[3 * n + i]:
                if direct and y.is_contiguous():
                    y = DirectReluPool.apply(y, window)
                else:
                    y = apply(y)
                    if relu is not None and not env[done]:
                        y = inner(y)
            if relu is not None and c is not None:
                c = relu(c)
            env[i], env[n + i] = y, c

        return run

    def _build_same(self, op: Op, i: int) -> Run:
        n, j = self._count, self._index[op.sources[0]]

        def run(env: list[Any], training: bool) -> None:
            env[i], env[n + i] = env[j], env[n + j]

        return run

    def _build_flatten(self, op: Op, i: int) -> Run:
        n, j = self._count, self._index[op.sources[0]]
        before, after = self._channels(self._op(op.sources[0])), self._channels(op)
        assert before is not None and after is not None

        def run(env: list[Any], training: bool) -> None:
            x, c = env[j], env[n + j]
            repeat = x[0, 0].numel()
            if before.pads and (repeat > 1 or after.pads != before.pads):
                x = F.pad(x.narrow(1, 0, len(before.kept)).flatten(1), (0, after.pads))
            env[i] = x.flatten(1)
            if c is not None:
                env[n + i] = c.repeat_interleave(repeat) if repeat > 1 else c

        return run

    def _build_dropout(self, op: Op, i: int) -> Run:
        p, j = op.data, self._index[op.sources[0]]
        channels = self._channels(op)
        assert channels is not None and op.layout is not None
        dim = op.layout.dim

        def run(env: list[Any], training: bool) -> None:
            x = env[j]
            if training if op.module is None else op.module.training:
                # Draw the mask at full width: the same random numbers as the masked model.
                shape = list(x.shape)
                shape[dim] = channels.width
                noise = F.dropout(x.new_ones(shape), p, True).index_select(dim, channels.kept)
                if channels.pads:
                    shape[dim] = channels.pads
                    noise = torch.cat([noise, noise.new_zeros(shape)], dim)
                x = x * noise
            env[i] = x

        return run

    def _build_add(self, op: Op, i: int) -> Run:
        n = self._count
        a, b = (self._op(s.name) for s in op.node.args)
        ja, jb = self._index[a.name], self._index[b.name]
        if a.layout == b.layout:

            def run(env: list[Any], training: bool) -> None:
                env[i] = env[ja] + env[jb]
                ca, cb = env[n + ja], env[n + jb]
                env[n + i] = cb if ca is None else ca if cb is None else ca + cb

            return run
        after = self._channels(op)
        if after is not None:
            return self._add_channels(a, b, after, i)
        fa, fb = self._full(a.name), self._full(b.name)
        ca, cb = self._channels(a), self._channels(b)
        # Add a compact operand into the channels it has.
        if cb is not None and not cb.full:
            return self._add_into(fa, jb, b, cb, i)
        if ca is not None and not ca.full:
            return self._add_into(fb, ja, a, ca, i)

        def wide(env: list[Any], training: bool) -> None:
            env[i] = fa(env) + fb(env)

        return wide

    def _add_into(self, full: Callable[[list[Any]], Any], j: int, part: Op, channels: Channels, i: int) -> Run:
        assert part.layout is not None
        n, spread = self._count, Spread(channels.kept, channels.width, part.layout.dim, self._native)

        def run(env: list[Any], training: bool) -> None:
            env[i] = spread(env[j], env[n + j], full(env))

        return run

    def _add_channels(self, a: Op, b: Op, after: Channels, i: int) -> Run:
        """A sum of different channels: it has those that one of the operands has."""
        n, ja, jb = self._count, self._index[a.name], self._index[b.name]
        first, second = (self._summand(op, after) for op in (a, b))
        if second.spread is None:
            ja, jb, first, second = jb, ja, second, first

        def run(env: list[Any], training: bool) -> None:
            ca, cb = env[n + ja], env[n + jb]
            env[i] = second(env[jb], cb, first(env[ja], ca, None))
            ca, cb = first.left(ca), second.left(cb)
            env[n + i] = cb if ca is None else ca if cb is None else ca + cb

        return run

    def _summand(self, op: Op, after: Channels) -> Summand:
        channels = self._channels(op)
        assert channels is not None and op.layout is not None
        return Summand(channels, after, op.layout.dim, self._native)

    def _build_cat(self, op: Op, i: int) -> Run:
        n, dim = self._count, op.data
        after = self._channels(op)
        assert after is not None
        parts = []
        for s in op.node.args[0]:
            source = self._op(s.name)
            channels = self._channels(source)
            width = (source.shape or ())[dim]
            parts.append(
                (self._index[source.name], width if channels is None else len(channels.kept),
                 0 if channels is None else len(channels.dropped))
            )  # fmt: skip

        def run(env: list[Any], training: bool) -> None:
            xs = [env[j] if env[j].shape[dim] == real else env[j].narrow(dim, 0, real) for j, real, _ in parts]
            if after.pads:
                shape = list(xs[0].shape)
                shape[dim] = after.pads
                xs.append(xs[0].new_zeros(shape))
            env[i] = torch.cat(xs, dim)
            if any(env[n + j] is not None for j, _, _ in parts):
                x = xs[0]
                cs = [x.new_zeros(lost) if env[n + j] is None else env[n + j] for j, _, lost in parts]
                env[n + i] = torch.cat(cs)

        return run

    def _build_split(self, op: Op, i: int) -> Run:
        """A tuple of tensors and one of constants: one backward for all of them, where slices would have one each."""
        n, j, before = self._count, self._index[op.sources[0]], self._channels(self._op(op.sources[0]))
        layout = self._op(op.sources[0]).layout
        assert before is not None and layout is not None
        ends = torch.tensor([high for _, high in op.data], device=before.kept.device)
        sizes, lost = (
            torch.searchsorted(c, ends).diff(prepend=ends.new_zeros(1)).tolist() for c in (before.kept, before.dropped)
        )
        sizes.append(before.pads)

        def run(env: list[Any], training: bool) -> None:
            c = env[n + j]
            env[i], env[n + i] = env[j].split(sizes, layout.dim), None if c is None else c.split(lost)

        return run

    def _build_item(self, op: Op, i: int) -> Run:
        n, j, index = self._count, self._index[op.sources[0]], op.node.args[1]
        after = self._channels(op)
        assert after is not None and op.layout is not None
        index, dim, pads = index % len(self._op(op.sources[0]).data), op.layout.dim, after.pads

        def run(env: list[Any], training: bool) -> None:
            x, c = env[j][index], env[n + j]
            if pads:
                shape = list(x.shape)
                shape[dim] = pads
                x = torch.cat([x, x.new_zeros(shape)], dim)
            env[i], env[n + i] = x, None if c is None else c[index]

        return run

    def _build_attention(self, op: Op, i: int) -> Run:
        attention, shape = op.data, op.shape or ()
        ops = [self._op(name) for name in op.sources]
        # A channel that is dropped and not 0 must be there.
        known = [None if source.const else self._channels(source) for source in ops]
        device = next(self.flow.model.parameters()).device
        widths = (ops[0].shape or ())[2], (ops[2].shape or ())[2]
        heads = Heads(known, widths, attention.heads, self.plan.multiple > 1, device)
        reads: list[Callable[[list[Any]], Tensor]] = [
            self._pack(source, channels, pick, place, heads.width * attention.heads)
            for source, channels, pick, place in zip(ops, known, heads.picks, heads.places)
        ]
        after, width = self._channels(op), heads.width * attention.heads
        unpack, stored = None, shape[2] if after is None else after.stored
        if not len(heads.places[2]) == width == stored:
            unpack = Pick(heads.places[2], stored, 2, self._native)
        tokens = (ops[1].shape or ())[1]
        self.macs += 6 * shape[1] * tokens * width
        fused = self._native

        def run(env: list[Any], training: bool) -> None:
            q, k, v = (read(env) for read in reads)
            out = attend(q, k, v, attention.heads, attention.scale, fused)
            env[i] = out if unpack is None else unpack(out)

        return run

    def _pack(
        self, source: Op, channels: Channels | None, pick: Tensor, place: Tensor, width: int
    ) -> Callable[[list[Any]], Tensor]:
        """Reads the channels ``pick`` of a value, in their places among ``width``."""
        j, stored = self._index[source.name], (source.shape or ())[2] if channels is None else channels.stored
        read = self._full(source.name) if channels is None else lambda env: env[j]
        if len(pick) == width == stored:
            return read
        spread = Spread(place, width, 2, self._native)
        if len(pick) == (stored if channels is None else len(channels.kept)):
            return lambda env: spread(read(env), None, None)
        take = Pick(pick, max(len(pick), 1), 2, self._native)
        return lambda env: spread(take(read(env)), None, None)

    def _build_shape(self, op: Op, i: int) -> Run:
        source = self._op(op.sources[0])
        j, layout = self._index[source.name], source.layout
        args = op.node.args[1:] if op.node.op == "call_method" else ()

        def run(env: list[Any], training: bool) -> None:
            shape = list(env[j].shape)
            if layout is not None:
                shape[layout.dim] = layout.width
            env[i] = shape[args[0]] if args else torch.Size(shape)

        return run

    def _build_other(self, op: Op, i: int) -> Run:
        """Any other node, as the trace has it, on full-width inputs."""
        node, model = op.node, self.flow.model
        self.macs += op.macs * 3
        if node.op == "get_attr":
            parent, _, leaf = str(node.target).rpartition(".")
            owner = model.get_submodule(parent)

            def attribute(env: list[Any], training: bool) -> None:
                env[i] = getattr(owner, leaf)

            return attribute
        reads = {s.name: self._full(s.name) for s in node.all_input_nodes}
        flag = "training" in node.kwargs
        target = op.module if node.op == "call_module" else node.target

        def run(env: list[Any], training: bool) -> None:
            args = fx.node.map_arg(node.args, lambda s: reads[s.name](env))
            kwargs = dict(fx.node.map_arg(node.kwargs, lambda s: reads[s.name](env)))
            if flag:
                kwargs["training"] = training
            if node.op == "call_method":
                env[i] = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                env[i] = target(*args, **kwargs)

        return run


def prefers_channels_last(flow: Flow) -> bool:
    """Measured on a CPU: 10-20 % less time for Conv4; more for a fused first layer.

    Not where a norm reads a kept bias: BatchNorm of that constant is beta plus rounding, ReLU asks for its sign, and
    the rounding is that of the masked model only in the same memory order.
    """
    norms = [op for op in flow.norms.values() if isinstance(op.module, nn.BatchNorm2d)]
    biased = any(_reads_kept_bias(flow, op) for op in flow.norms.values())
    return len(flow.image) == 3 and flow.image[0] > 1 and bool(norms) and not biased


def _reads_kept_bias(flow: Flow, norm: Op) -> bool:
    """Whether a pruned filter can reach ``norm`` as the constant of its bias."""
    nodes, seen = list(norm.node.all_input_nodes), set()
    while nodes:
        op = flow.ops[nodes.pop().name]
        if op.name in seen:
            continue
        seen.add(op.name)
        if isinstance(op.module, ThresholdLayer) and op.module.bias is not None and not op.module.mask_bias:
            return True
        if op.kind != "layer":
            nodes += op.node.all_input_nodes
    return False


def single_user(flow: Flow, op: Op) -> bool:
    return len([u for u in op.node.users if flow.ops[u.name].kind != "shape"]) == 1


def fused_pools(flow: Flow) -> dict[str, tuple[str, int]]:
    """Layers whose convolution, ReLU and max-pool can be one compiled call: ``{layer: (pool op, window)}``.

    The call is made while a plan leaves the layer at most ``MAX_IN_CHANNELS`` input channels; above that a general
    convolution is as fast.
    """
    found = {}
    for name, op in flow.layers.items():
        m = op.module
        if not isinstance(m, nn.Conv2d) or op.kind != "layer":
            continue
        if m.stride != (1, 1) or m.dilation != (1, 1) or m.groups != 1 or m.padding_mode != "zeros":
            continue
        if isinstance(m.padding, str) or max(m.kernel_size) > MAX_KERNEL:
            continue
        relu = _only_user(flow, op)
        if relu is None or relu.kind != "relu" or relu.apply is not F.relu:
            continue
        pool = _only_user(flow, relu)
        if pool is not None and pool.kind == "pool" and (window := _plain_window(pool)) is not None:
            found[name] = (pool.name, window)
    return found


def fused_norms(flow: Flow) -> dict[str, tuple[str, str, int]]:
    """Norms whose only user is a ReLU, so that both can be one compiled call: ``{norm: (relu op, pool op, window)}``.

    The pool is the ReLU's only user, if a kernel knows it; else it is ``""`` and the window 1. Not where a norm reads a
    kept bias, for the reason in :func:`prefers_channels_last`.
    """
    found = {}
    for op in flow.norms.values():
        relu = _only_user(flow, op)
        if relu is None or relu.kind != "relu" or relu.apply is not F.relu or _reads_kept_bias(flow, op):
            continue
        pool = _only_user(flow, relu)
        window = _plain_window(pool) if pool is not None and pool.kind == "pool" else None
        found[op.name] = (relu.name, "", 1) if pool is None or window is None else (relu.name, pool.name, window)
    return found


def _only_user(flow: Flow, op: Op) -> Op | None:
    """The only op that reads a value or its shape, which a fused call may not have."""
    users = [flow.ops[u.name] for u in op.node.users]
    return users[0] if len(users) == 1 else None


def always_fused(flow: Flow) -> set[str]:
    """Layers of :func:`fused_pools` that are within reach under every plan; their rows need no rounding to blocks."""
    return {name for name in fused_pools(flow) if flow.layers[name].module.in_channels <= MAX_IN_CHANNELS}


def _plain_window(op: Op) -> int | None:
    """Window of a max-pool without overlap, padding or dilation that a compiled kernel knows."""
    m = op.module
    if not isinstance(m, nn.MaxPool2d) or m.ceil_mode:
        return None
    window = m.kernel_size if isinstance(m.kernel_size, int) else m.kernel_size[0]
    square = m.kernel_size in (window, (window, window)) and m.stride in (window, (window, window))
    return window if square and window in POOLS and m.padding in (0, (0, 0)) and m.dilation in (1, (1, 1)) else None


def _is_max(op: Op) -> bool:
    if isinstance(op.module, nn.MaxPool2d):
        return True
    return op.node.op == "call_function" and op.node.target in (F.max_pool2d, torch.max_pool2d)


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

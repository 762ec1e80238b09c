"""Convolutions in groups: filters that read their group's channels only."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...layers import ThresholdLayer
from ..graph.layout import Layout
from ..plan.plan import Channels, Plan
from ..run.constants import all_places, chosen, like_value, typed
from ..run.spread import Pick, Spread, packed
from ..small import Small, Value
from .base import Const, Op
from .layers import Layer, under_mask

if TYPE_CHECKING:
    from ..run.program import Values
    from ..run.scope import Run, Scope

__all__ = ["Depthwise", "Grouped"]


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


class _InGroups:
    """A filter reads the channels of its place, so weights have no columns to leave out."""

    @property
    def columns(self) -> Layout | None:
        return None

    @property
    def dense(self) -> bool:
        return False

    def takes_tail(self, scope: Scope) -> bool:
        return False


@dataclass(eq=False)
class Depthwise(_InGroups, Layer):
    """One input by group: the channels of the kept filters are read, constants included."""

    kind = "depthwise"
    modules: ClassVar[tuple[type, ...]] = ()

    @classmethod
    def fits(cls, m: Any) -> bool:
        return isinstance(m, _CONVOLUTIONS) and m.groups > 1 and m.groups == m.in_channels

    @property
    def times(self) -> int:
        """Filters by channel."""
        return self.module.out_channels // self.module.in_channels

    def product(self, plan: Plan, padded: bool) -> tuple[int, int, int]:
        count, width, _ = super().product(plan, padded)
        return count, width, count

    def build(self, scope: Scope, i: int) -> Run:
        m = self.module
        name = scope.flow.names[id(m)]
        slot, source = scope.layers[name], scope.op(self.sources[0])
        self.count_macs(scope, source, slot, False, False)
        rows = scope.plan.rows.get(name)
        before = None if self.reads is None else scope.plan.channels(self.reads)
        read, j = scope.full(source.name), scope.index[source.name]
        mask_bias = isinstance(m, ThresholdLayer) and m.mask_bias
        const_out = bool(self.const) and rows is not None and len(rows.dropped) > 0
        # Without constants a dropped input channel is 0; then only channels kept on both sides are moved.
        every = rows is None or rows.full
        select = None if rows is None or every else rows.kept // self.times
        alike = self.times == 1 and before is not None and rows is not None
        direct = alike and torch.equal(before.host.kept, rows.host.kept)  # type: ignore[union-attr]
        own = None
        if self.times == 1 and rows is not None and not every and not direct:
            own = _Own(before, rows, scope)

        def run(env: Values, training: bool) -> None:
            if direct:
                assert rows is not None and before is not None
                x = env.kept[j].narrow(1, 0, len(before.kept)) if before.pads else env.kept[j]
            elif own is not None:
                x = own(env.kept[j], env.constants[j])
            else:
                x = read(env)
                if select is not None:
                    x = x.index_select(1, select)
            weight, bias, _ = slot.masked(mask_bias)
            mask = slot.mask
            if own is None and rows is not None and rows.pads:
                x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, rows.pads])
            y = self.apply(x, weight, bias if mask is None else None, m.groups if every else len(weight))
            if mask is not None:
                y = under_mask(y, mask, bias, mask_bias, self.along)
            env.kept[i] = y
            if const_out:
                env.constants[i] = typed(slot.bias_dropped, y)

        return run

    def exported_groups(self, weight: Tensor) -> int:
        return weight.shape[0]

    def exported_input(self, small: Small, rows: Channels | None) -> fx.Node:
        source, name = small.source(self), self.sources[0]
        kept = torch.arange(len(self.weight)) if rows is None else rows.kept
        pads, wanted = 0 if rows is None else rows.pads, kept // self.times
        before = source.channels
        if self.times == 1 and rows is None:
            return small.full(name)
        if self.times == 1 and before is not None and torch.equal(before.kept, kept) and before.pads == pads:
            return source.node
        if before is not None and not before.full:
            node = small.relayout(name, wanted)
        else:
            index = small.buffer(f"{self.name}_inputs", wanted)
            node = small.call(torch.index_select, source.node, 1, index)
        return small.padded(node, pads, 1, len(self.along))


class _Own:
    """The channels of the kept filters, each filter's own, from the channels that are there and from constants.

    Args:
        before: the channels of what is read; None: all.
        rows: the filters.
        scope: of the program.
    """

    def __init__(self, before: Channels | None, rows: Channels, scope: Scope) -> None:
        wanted, native, device = rows.host.kept, scope.native, scope.device
        at = wanted if before is None else before.host.order[wanted]
        count = rows.width if before is None else len(before.kept)
        there = at < count
        pick, place = at[there], there.nonzero().flatten()
        self._pads, self._dropped = rows.pads, (at[~there] - count).to(device, non_blocking=True)
        self._take = None if len(pick) == count else Pick(pick, max(len(pick), 1), 1, native, device)
        self._spread = Spread(place, rows.stored, 1, native, device)

    def __call__(self, x: Tensor, constants: Tensor | None) -> Tensor:
        if self._take is not None:
            x = self._take(x)
        if constants is not None:
            dim, ndim = (0, 1) if constants.dim() == 1 else (1, constants.dim())
            constants = F.pad(chosen(constants, self._dropped, dim), [0, 0] * (ndim - 1 - dim) + [0, self._pads])
        return self._spread(x, constants, None)


@dataclass(frozen=True)
class _Packing:
    """Where kept rows and inputs go in a convolution of as many groups as have a kept row, all of them equally large.

    Args:
        groups: which groups those are; at least one.
        height, width: rows and inputs of each.
        rows: by row of the packed weight, the stored row, or ``stored`` for a row of zeros.
        inputs: by input of the packed weight, the channel of the source, or -1 for one of zeros.
        result: where in the packed result the kept rows are.
    """

    groups: Tensor
    height: int
    width: int
    rows: Tensor
    inputs: Tensor
    result: Tensor


def _packing(m: Any, rows: Channels | None, inputs: Channels | None) -> _Packing:
    """All on the CPU. Small groups seldom shrink, for all are as large as the largest; what is read of them does."""
    size, width = m.out_channels // m.groups, m.in_channels // m.groups
    kept = torch.arange(m.out_channels) if rows is None else rows.host.kept
    there = torch.arange(m.in_channels) if inputs is None else inputs.host.kept
    by_row = torch.bincount(kept // size, minlength=m.groups)
    groups = by_row.nonzero().flatten() if len(kept) else torch.zeros(1, dtype=torch.int64)
    by_input = torch.bincount(there // width, minlength=m.groups)
    high, wide = max(1, int(by_row.max())), max(1, int(by_input[groups].max()))
    stored = m.out_channels if rows is None else rows.stored
    order = torch.full((m.groups,), -1).index_copy(0, groups, torch.arange(len(groups)))

    def place(members: Tensor, of: int, counts: Tensor, largest: int) -> Tensor:
        """In the packed order; ``members`` ascend."""
        group = members // of
        first = counts.cumsum(0) - counts
        return order[group] * largest + torch.arange(len(members)) - first[group]

    result = place(kept, size, by_row, high)
    all_rows = torch.full((len(groups) * high,), stored).index_copy(0, result, torch.arange(len(kept)))
    used = order[there // width] >= 0
    all_inputs = torch.full((len(groups) * wide,), -1)
    all_inputs[place(there, width, by_input, wide)[used]] = there[used]
    return _Packing(groups, high, wide, all_rows, all_inputs, result)


@dataclass(eq=False)
class Grouped(_InGroups, Layer):
    """Several inputs by group. Kept rows and inputs are packed, and zeros make the groups equally large."""

    kind = "grouped"
    modules: ClassVar[tuple[type, ...]] = ()

    @classmethod
    def fits(cls, m: Any) -> bool:
        return isinstance(m, _CONVOLUTIONS) and 1 < m.groups < m.in_channels

    def unread(self, before: Op) -> str | None:
        return (
            "a grouped convolution of pruned channels that vary over samples" if before.const == Const.SAMPLE else None
        )

    def packing(self, plan: Plan) -> _Packing:
        reads = None if self.reads is None else plan.channels(self.reads)
        return _packing(self.module, plan.rows.get(plan.names[id(self.module)]), reads)

    def product(self, plan: Plan, padded: bool) -> tuple[int, int, int]:
        p = self.packing(plan)
        return len(p.groups) * p.height, p.width, len(p.groups)

    def build(self, scope: Scope, i: int) -> Run:
        m, source = self.module, scope.op(self.sources[0])
        name = scope.flow.names[id(m)]
        slot, rows, p = scope.layers[name], scope.plan.rows.get(name), self.packing(scope.plan)
        before = None if self.reads is None else scope.plan.channels(self.reads)
        mask_bias = isinstance(m, ThresholdLayer) and m.mask_bias
        const_out = bool(self.const) and rows is not None and len(rows.dropped) > 0
        const_in = bool(source.const) and before is not None and len(before.dropped) > 0
        stored, group_count = m.out_channels if rows is None else rows.stored, len(p.groups)
        kernel = prod(m.kernel_size)
        scope.macs += (3 if source.grad else 2) * len(p.rows) * p.width * kernel * self.positions
        used = (p.inputs >= 0).nonzero().flatten()
        wanted = p.inputs[used] if before is None else before.host.order[p.inputs[used]]
        read = packed(scope, source, before, wanted, used, len(p.inputs), 1)
        taken, every = self.weights(p, stored), self.all_inputs(p)
        row_index = p.rows.to(scope.device)
        alike = len(p.result) == len(p.rows) == stored
        unpack = None if alike else Pick(p.result, stored, 1, scope.native, scope.device)
        inputs, dropped = every.to(scope.device), None if before is None else before.dropped

        def run(env: Values, training: bool) -> None:
            weight, bias, _ = slot.masked(mask_bias)
            mask, c = slot.mask, env.constants[j] if const_in else None
            filled = F.pad(weight, [0, 0] * (weight.dim() - 1) + [0, 1]).index_select(0, row_index)
            inside = None
            if bias is not None and mask is None:
                inside = F.pad(bias, (0, 1)).index_select(0, row_index)
            y = self.apply(read(env), taken(filled), inside, group_count)
            if c is not None:
                assert dropped is not None
                c = like_value(c, 1, len(self.along))
                shape = [c.shape[0], m.in_channels, *c.shape[2:]]
                whole = c.new_zeros(shape).index_copy(1, dropped, c).index_select(1, inputs)
                size = (source.shape or ())[2:]
                y = y + self.apply(all_places(whole, (1, len(inputs), *size), 1), filled, None, group_count)
            if unpack is not None:
                y = unpack(y)
            if mask is not None:
                y = under_mask(y, mask, bias, mask_bias, self.along)
            env.kept[i] = y
            if const_out:
                env.constants[i] = typed(slot.bias_dropped, y)

        j = scope.index[source.name]
        return run

    def all_inputs(self, p: _Packing) -> Tensor:
        """The channels of the groups that are there."""
        width = self.weight.shape[1]
        return (p.groups.unsqueeze(1) * width + torch.arange(width)).flatten()

    def weights(self, p: _Packing, stored: int) -> _Columns:
        width = self.weight.shape[1]
        local = torch.where(p.inputs >= 0, p.inputs % width, width).view(len(p.groups), p.width)
        return _Columns(local, width, p.height, self.module.weight.device)

    def export(self, small: Small) -> Value:
        m, source = self.module, small.source(self)
        name = small.flow.names[id(m)]
        rows, p = small.plan.rows.get(name), self.packing(small.plan)
        before = None if self.reads is None else small.plan.channels(self.reads)
        weight, bias, dropped_bias = self.exported_rows(rows)
        filled = F.pad(weight, [0, 0] * (weight.dim() - 1) + [0, 1])[p.rows]
        inside = None if bias is None else F.pad(bias, (0, 1))[p.rows]
        if before is None:
            node, order, count = small.full(self.sources[0]), torch.arange(m.in_channels), m.in_channels
        else:
            node, order, count = source.node, before.host.order, before.stored
        index = torch.where(p.inputs >= 0, order[p.inputs.clamp(min=0)], count)
        if not torch.equal(index, torch.arange(count)):
            node = small.padded(node, int((index == count).any()), 1, len(self.along))
            node = small.call(torch.index_select, node, 1, small.buffer(f"{self.name}_inputs", index.to(weight.device)))
        packed_weight = self.weights(p, len(weight))(filled)
        out = self.exported_conv(small, name, node, packed_weight, inside, len(p.groups))
        if before is not None and (maps := small.constant_maps(self)) is not None:
            whole = maps.new_zeros(1, m.in_channels, *maps.shape[2:]).index_copy(1, before.dropped, maps)
            whole = whole[:, self.all_inputs(p)]
            border = self.apply(whole, filled, None, len(p.groups))
            small.of_one_size(out, self.shape or (), 1)
            out = small.call(torch.add, out, small.buffer(f"{self.name}_border", border))
        if not torch.equal(p.result, torch.arange(len(p.rows))):
            out = small.call(torch.index_select, out, 1, small.buffer(f"{self.name}_rows", p.result.to(weight.device)))
            out = small.padded(out, 0 if rows is None else rows.pads, 1, len(self.along))
        return Value(out, small.channels(self), dropped_bias)


class _Columns:
    """Takes the kept inputs of every group: ``(groups * height, inputs, ...)`` to ``(groups * height, width, ...)``.

    ``index``: ``(groups, width)``: which, or ``count`` for zeros.
    """

    def __init__(self, index: Tensor, count: int, height: int, device: torch.device) -> None:
        whole = torch.equal(index, torch.arange(count).expand_as(index)) if index.shape[1] == count else False
        rows = index.repeat_interleave(height, 0)
        flat = rows + torch.arange(len(rows)).unsqueeze(1) * (count + 1)
        self.flat = None if whole else flat.flatten().to(device)
        self.width = index.shape[1]

    def __call__(self, weight: Tensor) -> Tensor:
        if self.flat is None:
            return weight
        shape = weight.shape
        padded = F.pad(weight, [0, 0] * (weight.dim() - 2) + [0, 1])
        return padded.flatten(0, 1).index_select(0, self.flat).view(shape[0], self.width, *shape[2:])

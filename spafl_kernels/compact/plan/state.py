"""What the compact engines know of a model's layers and norms: full tensors, channels under the plan, and slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...computed import ComputedWeight, weight_of
from ...layers import ThresholdLayer
from ...reference import filters
from ..graph.flow import Flow
from ..graph.layout import Layout
from .plan import Channels, Plan
from .slots import LayerSlot, NormSlot

__all__ = [
    "LayerState", "NormState", "Tensors", "all_channels", "as_transposed", "by_filter", "channels_of",
    "channels_of_norm", "full_name", "per_filter", "put_rows", "same_channels", "slots_of", "take_rows", "take_weight",
]  # fmt: skip

# Key of a tensor, the tensor at full size, and its momentum.
Tensors = Iterator[tuple[tuple[str, str], Tensor, Tensor | None]]


class LayerState:
    """One convolution or linear.

    ``begin`` is the place of its first threshold among all thresholds, ``positions`` the number of places in the result
    where a filter is applied. ``copied``: its filters do not lie side by side in the model, so weight and momentum are
    copies, which are to be written back.
    """

    weight: Any = None
    momentum: Tensor | None = None
    threshold: Tensor  # of threshold layers

    def __init__(self, name: str, module: Any, begin: int, positions: int = 1) -> None:
        self.name, self.module = name, module
        weight = by_filter(module, weight_of(module))
        self.rows, self.inputs = weight.shape[:2]
        self.size = weight[0].numel()
        self.work = self.size * positions  # multiply-accumulates of a filter for one sample
        self.is_threshold = isinstance(module, ThresholdLayer)
        self.window = self.is_threshold and module.estimator == "window"
        self.mask_bias = self.is_threshold and module.mask_bias
        self.copied = isinstance(module, nn.ConvTranspose2d) and 1 < module.groups < module.in_channels
        self.begin = begin
        self.part = slice(begin, begin + self.rows)  # of its thresholds among all
        self.slot = LayerSlot(weight_of(module))
        # Set by each plan.
        self.row_channels: Channels | None = None
        self.column_channels: Channels | None = None
        # Set by each change of the masks: where the window lets gradients through, and whether any row has a sign term.
        self.far: Tensor | None = None
        self.signed = False

    def read(self, momentum: Mapping[str, Tensor]) -> None:
        """Take hold of the model's tensors and of their momenta (none if ``momentum`` is empty)."""
        m = self.module
        self.weight = self._matrix(m.weight.data, self.weight)
        self.bias = None if m.bias is None else m.bias.data
        if self.is_threshold:
            self.threshold = m.threshold.data
        self.full_momentum: Tensor | None = None
        old, self.momentum = self.momentum, None
        self.bias_momentum: Tensor | None = None
        self.threshold_momentum: Tensor | None = None
        if momentum:
            self.full_momentum = momentum[full_name(self.name, "weight")]
            self.momentum = self._matrix(self.full_momentum, old)
            if self.bias is not None:
                self.bias_momentum = momentum[full_name(self.name, "bias")]
            if self.is_threshold:
                self.threshold_momentum = momentum[full_name(self.name, "threshold")]

    def _matrix(self, full: Tensor, old: Tensor | None) -> Tensor:
        """``(filters, inputs, kernel)`` of a tensor of the model; a copy lies where the last one did."""
        found = by_filter(self.module, full).view(self.rows, self.inputs, -1)
        again = self.copied and old is not None and (old.dtype, old.device) == (found.dtype, found.device)
        return old.copy_(found) if again and old is not None else found

    def lend_whole(self) -> None:
        """Let the forward pass read the module's own tensors, of which nothing is left out."""
        m = self.module
        if isinstance(m, ComputedWeight):
            self.slot.weight, self.slot.bias = m.computed_weight(), m.computed_bias()
        else:
            self.slot.weight, self.slot.bias = by_filter(m, m.weight), m.bias

    def write_back(self, momentum: bool = False) -> None:
        """Copy the weight, or its momentum, to the model's tensor, unless it lies there."""
        m = self.module
        source, full = (self.momentum, self.full_momentum) if momentum else (self.weight, m.weight.data)
        if self.copied and source is not None and full is not None:
            full.copy_(as_transposed(source, m.groups).view_as(full))

    def tensors(self) -> Tensors:
        yield (self.name, "w"), self.weight, self.momentum
        if self.bias is not None:
            yield (self.name, "b"), self.bias, self.bias_momentum


class NormState:
    """One BatchNorm: affine parameters have a share in the arena, statistics are kept in the slot."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        self.slot = NormSlot(None, None, module.running_mean, module.running_var)
        self.channels: Channels | None = None  # set by each plan

    def read(self, momentum: Mapping[str, Tensor]) -> None:
        """Take hold of the model's tensors and of their momenta (none if ``momentum`` is empty)."""
        self.slot.batches = 0  # those of a training that broke off
        self._tensors = [
            ((self.name, key), p.data, momentum[full_name(self.name, leaf)] if momentum else None)
            for key, leaf, p in (("ng", "weight", self.module.weight), ("nb", "bias", self.module.bias))
            if p is not None
        ]

    def tensors(self) -> Tensors:
        yield from self._tensors

    def set_channels(self, channels: Channels) -> None:
        """Make room for the statistics under a new plan."""
        self.channels, slot, full = channels, self.slot, self.module.running_mean
        slot.running_mean, slot.running_var = full.new_zeros(channels.stored), full.new_zeros(channels.stored)
        slot.mean_dropped = slot.var_dropped = None
        if count := len(channels.dropped):
            slot.mean_dropped, slot.var_dropped = full.new_empty(count), full.new_empty(count)

    def load_statistics(self) -> None:
        m, slot, channels = self.module, self.slot, self.channels
        assert channels is not None
        for full, kept, dropped in (
            (m.running_mean, slot.running_mean, slot.mean_dropped),
            (m.running_var, slot.running_var, slot.var_dropped),
        ):
            take_rows(full, channels, kept)
            if dropped is not None:
                torch.index_select(full, 0, channels.dropped, out=dropped)
        self._known = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        both = self.module.running_mean, self.module.running_var
        return [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in both]

    def count_batches(self, batches: int | None = None) -> None:
        """Tell the module of the batches that were seen; ``batches``: so many instead, where nobody has counted."""
        seen, self.slot.batches = self.slot.batches if batches is None else batches, 0
        if self.module.num_batches_tracked is not None:
            self.module.num_batches_tracked += seen

    def store_statistics(self) -> None:
        m, slot, channels = self.module, self.slot, self.channels
        assert channels is not None
        if self._versions() != self._known:
            raise RuntimeError(f"the statistics of norm {self.name!r} were changed by somebody else during a training")
        real = len(channels.kept)
        put_rows(m.running_mean, channels, slot.running_mean[:real])
        put_rows(m.running_var, channels, slot.running_var[:real])
        if len(channels.dropped):
            m.running_mean[channels.dropped] = slot.mean_dropped
            m.running_var[channels.dropped] = slot.var_dropped
        self._known = self._versions()


def by_filter(module: Any, weight: Tensor) -> Tensor:
    """A layer's weight, or what has its shape, as ``(filters, inputs, *kernel)``.

    A view, but for transposed convolutions of several inputs by group, whose filters do not lie side by side.
    """
    return filters(weight, module.groups) if isinstance(module, nn.ConvTranspose2d) else weight


def as_transposed(weight: Tensor, groups: int) -> Tensor:
    """``(filters, inputs, ...)`` as a transposed convolution has it: ``(all inputs, filters / groups, ...)``."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def per_filter(value: Tensor, layout: Layout, name: str, count: int) -> Tensor:
    """By filter of layer ``name``: the largest of its channels' values in ``layout``, or 0 if that is larger."""
    out, at = value.new_zeros(count), 0
    for s in layout.segments:
        for start in (first for source, first in s.sources if source == name):
            rows = slice(start, start + s.count)
            out[rows] = torch.maximum(out[rows], value[at : at + s.width].view(-1, s.repeat).amax(1))
        at += s.width
    return out


def full_name(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def all_channels(width: int, device: torch.device) -> Channels:
    made = Channels(width, torch.arange(width), torch.empty(0, dtype=torch.int64), 0)
    return (
        made
        if device.type == "cpu"
        else Channels(
            width, made.kept.to(device, non_blocking=True), made.dropped.to(device, non_blocking=True), 0, made
        )
    )


def channels_of(
    layer: LayerState, flow: Flow, plan: Plan, whole: Callable[[int, torch.device], Channels] = all_channels
) -> tuple[Channels, Channels]:
    """The rows and columns of a layer under a plan; ``whole`` makes those of which nothing is dropped."""
    layout, device = flow.layers[layer.name].columns, layer.module.weight.device
    rows = plan.rows.get(layer.name) or whole(layer.rows, device)
    return rows, whole(layer.inputs, device) if layout is None else plan.channels(layout)


def channels_of_norm(
    norm: NormState, flow: Flow, plan: Plan, whole: Callable[[int, torch.device], Channels] = all_channels
) -> Channels:
    """The channels of a norm under a plan."""
    m, layout = norm.module, flow.layout_in(norm.name)
    return whole(m.num_features, m.running_mean.device) if layout is None else plan.channels(layout)


def slots_of(states: Mapping[str, LayerState] | Mapping[str, NormState]) -> dict[str, Any]:
    return {name: state.slot for name, state in states.items()}


def same_channels(a: Channels, b: Channels | None) -> bool:
    return b is not None and a.pads == b.pads and torch.equal(a.host.kept, b.host.kept)


def put_rows(full: Tensor, rows: Channels, values: Tensor) -> None:
    if len(rows.dropped):
        full.index_copy_(0, rows.kept, values)
    else:
        full.copy_(values)


def take_rows(full: Tensor, rows: Channels, out: Tensor) -> None:
    """The kept rows of ``full``, then zeros, into ``out``."""
    count = len(rows.kept)
    if rows.pads:
        out[count:].zero_()
    if len(rows.dropped):
        torch.index_select(full, 0, rows.kept, out=out[:count])
    else:
        out[:count].copy_(full)


def take_weight(
    full: Tensor, rows: Channels, columns: Channels, kept: Tensor, dropped: Tensor | None, scratch: Tensor | None = None
) -> None:
    """The kept rows of a weight, their kept columns and their dropped ones apart, with zeros behind rows and columns.

    Args:
        full: ``(filters, inputs, kernel)``.
        rows, columns: which of them are kept.
        kept: ``(rows.stored, columns.stored, kernel)``, overwritten.
        dropped: ``(rows.stored, dropped columns, kernel)``, overwritten; None where these are not wanted.
        scratch: ``(kept rows, inputs, kernel)`` if rows are dropped; allocated if None.
    """
    count = len(rows.kept)
    part = torch.index_select(full, 0, rows.kept, out=scratch) if len(rows.dropped) else full
    if columns.pads or rows.pads:
        kept.zero_()
        kept = kept[:count, : len(columns.kept)]
    if len(columns.dropped):
        torch.index_select(part, 1, columns.kept, out=kept)
    else:
        kept.copy_(part)
    if dropped is not None:
        if rows.pads:
            dropped[count:].zero_()
        torch.index_select(part, 1, columns.dropped, out=dropped[:count])

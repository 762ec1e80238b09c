"""A plan: which channels are kept for the current masks. Made anew when a mask changes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..graph.flow import Flow
from ..graph.layout import Layout, Segment

__all__ = ["Channels", "Plan", "padding_for"]


@dataclass(frozen=True)
class Channels:
    """The channels of one layout under a plan.

    Args:
        width: number of channels at full width.
        kept, dropped: int64 indices into them, ascending, where the model is.
        pads: zero channels behind the kept ones.
        copy: the same on the CPU; None if these are there.
    """

    width: int
    kept: Tensor
    dropped: Tensor
    pads: int
    copy: Channels | None = None

    @property
    def host(self) -> Channels:
        """The same on the CPU, for questions that would wait for a device."""
        return self if self.copy is None else self.copy

    @property
    def stored(self) -> int:
        return len(self.kept) + self.pads

    @cached_property
    def order(self) -> Tensor:
        """int64 ``(width,)``: where every channel is in ``cat(kept, dropped)``."""
        places = torch.arange(self.width, device=self.kept.device)
        return torch.empty_like(places).index_copy_(0, torch.cat([self.kept, self.dropped]), places)

    @property
    def full(self) -> bool:
        return self.pads == 0 and len(self.kept) == self.width


def padding_for(kept: int, width: int, multiple: int) -> int:
    """Zero rows to add to ``kept`` filters: up to a multiple, never beyond the full width, and never no row at all.

    One row is kept even when all are pruned, so that no operator meets an empty tensor.
    """
    return max(min(-(-kept // multiple) * multiple, width), 1) - kept


class Plan:
    """Kept filters of every threshold layer, and what that means for every layout.

    Args:
        keep: by threshold layer, bool ``(filters,)``: which filters are computed.
        device: where the indices of channels go; None: where the model is.
        multiple: convolutions keep a multiple of this many channels, filled with zero rows; oneDNN computes blocks of
            eight anyway, and shapes repeat (a new shape costs a primitive: 1.2-3.3 ms measured).
        exact: layers that are not rounded up, because something else computes them.
        linear: linear layers, and whatever else a product reads, are rounded up as convolutions are; on a GPU rows that
            begin at a multiple of 16 bytes take the faster products.
    """

    def __init__(
        self,
        flow: Flow,
        keep: dict[str, Tensor],
        multiple: int = 8,
        exact: Collection[str] = (),
        linear: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._device = next(flow.model.parameters()).device if device is None else device
        keep = {name: mask.cpu() for name, mask in keep.items()}
        self.keep, self.names = keep, flow.names
        self.multiple = multiple
        self._cache: dict[Layout, Channels] = {}
        self.rows: dict[str, Channels] = {}
        self._linear = linear
        self._images = {name for name in keep if len(flow.layers[name].shape or ()) == 4}
        for name, mask in keep.items():
            rounded = (name in self._images or linear) and flow.layers[name].dense and name not in exact
            self.rows[name] = _channels(mask, multiple if rounded else 1, self._device)

    def channels(self, layout: Layout) -> Channels:
        """The channels of a layout (cached)."""
        if layout not in self._cache:
            self._cache[layout] = self._make(layout)
        return self._cache[layout]

    def _make(self, layout: Layout) -> Channels:
        if len(layout.segments) == 1:
            (s,) = layout.segments
            if len(s.sources) == 1 and s.repeat == 1 and s.count == len(self.keep[s.sources[0][0]]):
                return self.rows[s.sources[0][0]]
        # A sum of images is what a convolution reads.
        rounded = (
            layout.summed and self._images.issuperset(layout.sources) and all(s.repeat == 1 for s in layout.segments)
        )
        rounded = rounded or self._linear
        mask = torch.cat([self._kept(s) for s in layout.segments])
        return _channels(mask, self.multiple if rounded else 1, self._device)

    def _kept(self, segment: Segment) -> Tensor:
        """Bool ``(segment.width,)``."""
        parts = [self.keep[name][start : start + segment.count] for name, start in segment.sources]
        if not parts:
            return torch.ones(segment.width, dtype=torch.bool)
        return torch.stack(parts).any(0).repeat_interleave(segment.repeat)


def _channels(mask: Tensor, multiple: int, device: torch.device) -> Channels:
    kept, dropped = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    made = Channels(len(mask), kept, dropped, padding_for(len(kept), len(mask), multiple))
    if device.type == "cpu":
        return made
    kept, dropped = torch.cat([kept, dropped]).to(device, non_blocking=True).split([len(kept), len(dropped)])
    return Channels(made.width, kept, dropped, made.pads, made)

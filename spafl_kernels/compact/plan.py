"""A plan: which channels are kept for the current masks. Made anew when a mask changes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .flow import Flow, Layout, Segment

__all__ = ["Channels", "Plan", "padding_for"]


@dataclass(frozen=True)
class Channels:
    """The channels of one layout under a plan.

    Args:
        width: number of channels at full width.
        kept, dropped: int64 indices into them, ascending.
        pads: zero channels behind the kept ones.
    """

    width: int
    kept: Tensor
    dropped: Tensor
    pads: int

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
        multiple: convolutions keep a multiple of this many channels, filled with zero rows; oneDNN computes blocks of
            eight anyway, and shapes repeat (a new shape costs a primitive: 1.2-3.3 ms measured).
        exact: layers that are not rounded up, because something else computes them.
    """

    def __init__(self, flow: Flow, keep: dict[str, Tensor], multiple: int = 8, exact: Collection[str] = ()) -> None:
        self.keep = keep
        self._cache: dict[Layout, Channels] = {}
        self.rows: dict[str, Channels] = {}
        for name, mask in keep.items():
            op = flow.layers[name]
            kept, width = mask.nonzero().flatten(), len(mask)
            rounded = op.kind == "layer" and len(op.shape or ()) == 4 and name not in exact
            pads = padding_for(len(kept), width, multiple if rounded else 1)
            self.rows[name] = Channels(width, kept, (~mask).nonzero().flatten(), pads)

    def channels(self, layout: Layout) -> Channels:
        """The channels of a layout (cached)."""
        if layout not in self._cache:
            self._cache[layout] = self._make(layout)
        return self._cache[layout]

    def _make(self, layout: Layout) -> Channels:
        if len(layout.segments) == 1:
            (s,) = layout.segments
            if s.source and s == Segment(s.source, 0, len(self.keep[s.source])):
                return self.rows[s.source]
        device = next(iter(self.keep.values())).device
        parts = []
        for s in layout.segments:
            if s.source:
                parts.append(self.keep[s.source][s.start : s.stop].repeat_interleave(s.repeat))
            else:
                parts.append(torch.ones(s.width, dtype=torch.bool, device=device))
        mask = torch.cat(parts)
        kept = mask.nonzero().flatten()
        pads = 0 if len(kept) else 1
        return Channels(len(mask), kept, (~mask).nonzero().flatten(), pads)

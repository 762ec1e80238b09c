"""Attention on kept channels, packed head by head.

A channel of q counts only with the same channel of k, and a channel of v only for itself, so all three can be narrower
inside every head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..plan.plan import Channels

__all__ = ["Heads", "attend"]

# With fewer channels a head, or a number between, the products are not faster (measured, docs/decisions/native-cpu.md).
LANES = 16


class Heads:
    """Where the kept channels of q, k and v go; all on the CPU.

    Args:
        channels: of q, k and v, those that are kept; None: all.
        widths: channels of q (and k) and of v.
        heads: number of heads.
        rounded: round up to :data:`LANES`.

    Attributes:
        width: channels a head, in all three.
        picks: for q, k, v: which stored channels are used, int64.
        places: for q, k, v: where they go among ``heads * width``.
    """

    def __init__(
        self,
        channels: Sequence[Channels | None],
        widths: tuple[int, int],
        heads: int,
        rounded: bool,
    ) -> None:
        kept = [torch.ones(width, dtype=torch.bool) for width in (widths[0], *widths)]
        for mask, known in zip(kept, channels):
            if known is not None:
                mask.index_fill_(0, known.dropped, False)
        both = kept[0] & kept[1]
        masks = [mask.view(heads, -1) for mask in (both, both, kept[2])]
        width = max(1, max(int(m.sum(1).max()) for m in masks))
        full = max(m.shape[1] for m in masks)
        self.width = min(-(-width // LANES) * LANES, full) if rounded else width
        self.picks: list[Tensor] = []
        self.places: list[Tensor] = []
        for mask, known in zip(masks, channels):
            used = mask.flatten().nonzero().flatten()
            rank = mask.cumsum(1) - 1 + torch.arange(heads).unsqueeze(1) * self.width
            self.picks.append(used if known is None else known.order[used])
            self.places.append(rank[mask])


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, fused: bool) -> Tensor:
    """Attention with ``heads`` blocks of channels: (N, tokens, channels) each, and so the result."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if fused:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        out = torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * scale, -1), v)
    return out.transpose(1, 2).flatten(2)

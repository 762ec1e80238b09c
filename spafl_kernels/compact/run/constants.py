"""The dropped channels of a value in the course of a program.

Either None, where they are 0, or a tensor of one of two shapes: ``(D,)``, a number per channel; or one that broadcasts
to the value itself, with ``D`` channels where that has its own, and 1 along what they do not vary over (samples,
positions).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["all_places", "chosen", "joined", "like_value", "summed", "typed"]


def like_value(c: Tensor, dim: int, ndim: int) -> Tensor:
    """Constants as a tensor that broadcasts to a value of ``ndim`` dimensions whose channels lie along ``dim``."""
    return c.view([-1 if d == dim else 1 for d in range(ndim)]) if c.dim() == 1 else c


def all_places(c: Tensor, value: Tensor | torch.Size | Sequence[int], dim: int) -> Tensor:
    """Constants at every position of the value, whose shape this is; still one sample if they are the same for all."""
    shape = list(value.shape if isinstance(value, Tensor) else value)
    c = like_value(c, dim, len(shape))
    shape[0], shape[dim] = c.shape[0], c.shape[dim]
    return c.expand(shape)


def chosen(c: Tensor, index: Tensor, dim: int) -> Tensor:
    """The channels ``index`` of constants."""
    return c.index_select(0 if c.dim() == 1 else dim, index)


def joined(parts: Sequence[tuple[Tensor | None, int]], dim: int, ndim: int, like: Tensor) -> Tensor | None:
    """Constants of tensors put together along their channels; each with their number."""
    known = [c for c, _ in parts if c is not None]
    if not known:
        return None
    if all(c.dim() == 1 for c in known):
        return torch.cat([like.new_zeros(count) if c is None else c for c, count in parts])
    maps = [like_value(like.new_zeros(count) if c is None else c, dim, ndim) for c, count in parts]
    shape = list(torch.broadcast_shapes(*(c.narrow(dim, 0, 0).shape for c in maps)))
    return torch.cat([c.expand([*shape[:dim], c.shape[dim], *shape[dim + 1 :]]) for c in maps], dim)


def summed(a: Tensor | None, b: Tensor | None, dim: int, ndim: int) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b if a.dim() == b.dim() else like_value(a, dim, ndim) + like_value(b, dim, ndim)


def typed(c: Tensor | None, y: Tensor) -> Tensor | None:
    """Constants in the type of what they stand beside, which under autocast is not that of the parameters."""
    return c if c is None or c.dtype == y.dtype else c.to(y.dtype)

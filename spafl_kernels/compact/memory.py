"""Tensors that are used again and again instead of being allocated."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

__all__ = ["Memory"]


class Memory:
    """Buffers by name that only ever grow.

    A large tensor that is freed goes back to the operating system; taking the next one then costs page faults, which
    was measured to be several times the work done in it.

    Args:
        like: a tensor whose dtype and device the buffers have.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor that is not initialised, and is overwritten by whoever takes the same name next."""
        size = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            self._buffers[name] = buffer = self._like.new_empty(size)
        return buffer[:size].view(tuple(shape))

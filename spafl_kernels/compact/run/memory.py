"""Tensors that are used again and again instead of being allocated."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

__all__ = ["Memory", "pages"]


def pages(size: int, like: Tensor) -> Tensor:
    """``(size,)`` zeros of the dtype and device of ``like``; on the CPU, pages of their own from the operating system.

    Only what is written to takes memory, and a tensor that stays for a whole training does not lie between the
    activations of a step. With ViT at density 1, 26 MB less were in use before the backward pass.
    """
    if not size or like.device.type != "cpu":
        return like.new_zeros(size)
    # Private: a process that is forked off must not write into this one's.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, size * like.element_size(), **flags), dtype=like.dtype)


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
            self._buffers[name] = buffer = pages(size, self._like)
        return buffer[:size].view(tuple(shape))

"""Sizes of a convolution, and the forms in which kernels take tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A convolution of ``channels`` by ``kernel`` over ``(height, width)``; a linear layer is the 1x1 case."""

    channels: int
    height: int = 1
    width: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the output."""
        high, wide = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                (self.height, self.width), self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return high, wide

    @property
    def shape(self) -> tuple[int, ...]:
        """Everything as one tuple, in the order in which kernels read it."""
        return (
            *(self.channels, self.height, self.width, *self.output, *self.kernel),
            *(*self.stride, *self.padding, *self.dilation),
        )

    @property
    def n_in(self) -> int:
        return self.channels * self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        """Every output position reads exactly the input position of the same number."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def step(self) -> tuple[int, int]:
        """Distance between the kernel taps that meet one residue class of input positions."""
        return (
            self.stride[0] // math.gcd(self.stride[0], self.dilation[0]),
            self.stride[1] // math.gcd(self.stride[1], self.dilation[1]),
        )


class Positions(NamedTuple):
    """How ``(clients, N, C, H, W)`` lies in memory whose channel stride is 1: distances in elements.

    ``line``: between consecutive positions, None if it varies. ``wide``: whether offsets inside one image need 64 bits.
    (The start of an image is always a 64-bit offset. Inside, 64-bit multiplications would be most of the address work.)
    """

    client: int
    image: int
    row: int
    column: int
    line: int | None
    wide: bool

    def step(self, pointwise: bool) -> int:
        """Distance that a kernel reads by: that of lines where it takes positions as one dimension."""
        if not pointwise:
            return self.column
        assert self.line is not None
        return self.line


def needs_copy(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether ``(clients, N, C, H, W)`` has to be copied for the kernels: its channels are not next to each other."""
    return strides[2] != 1 and shape[2] != 1


def client_step(clients: int, distance: int) -> int:
    """Distance in memory between clients, as kernels take it: 0 for a single client, whatever the size of its batch.

    Kernels are compiled for what divides a distance, and that of a single client is never used.
    """
    return 0 if clients == 1 else distance


def positions(shape: Sequence[int], strides: Sequence[int]) -> Positions:
    """Of a tensor with this shape and these strides, or of its copy if it needs one."""
    clients, n, c, high, wide = shape
    if needs_copy(shape, strides):
        strides = channels_last_strides(c, high, wide, n)
    last = (high - 1) * strides[3] + (wide - 1) * strides[4] + (c - 1) * strides[2]
    line = _line((wide, high, n), (strides[4], strides[3], strides[1]))
    return Positions(client_step(clients, strides[0]), strides[1], strides[3], strides[4], line, last >= 2**31)


def _line(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """Distance between consecutive elements of dimensions, innermost first; None if it varies."""
    step = span = None
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if step is None:
            step, span = stride, stride * size
        elif stride != span:
            return None
        else:
            span = stride * size
    return 0 if step is None else step


def channels_last(x: Tensor) -> Tensor:
    """A copy of ``([clients,] N, C, H, W)``, stored as ``([clients,] N, H, W, C)``."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def empty_channels_last(
    clients: int, n: int, c: int, size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Uninitialised ``(clients, n, c, *size)``, stored as ``(clients, n, *size, c)``."""
    return torch.empty(clients, n, *size, c, dtype=dtype, device=device).permute(0, 1, 4, 2, 3)


def row_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """``(inner, outer)`` of a row in memory when rows are dense, else None; ``shape``: ``(out, in[, kH, kW])``."""
    out, n_in, taps = shape[0], math.prod(shape[1:]), math.prod(shape[2:])

    def dense(order: Sequence[int]) -> bool:
        span = 1
        for i in order:
            if shape[i] != 1 and strides[i] != span:
                return False
            span *= shape[i]
        return out == 1 or strides[0] == n_in

    if dense(range(len(shape) - 1, 0, -1)):
        return (shape[1], taps) if taps > 1 else (n_in, 1)
    if len(shape) == 4 and dense((1, 3, 2)):
        return (n_in, 1)
    return None


def channels_last_strides(c: int, high: int, wide: int, n: int) -> tuple[int, int, int, int, int]:
    """Of ``(clients, n, c, high, wide)``, stored as ``(clients, n, high, wide, c)``."""
    return n * high * wide * c, high * wide * c, 1, wide * c, c


def dense_rows(weight: Tensor) -> Tensor:
    """``weight`` itself if the rows of every client lie dense in memory, else a contiguous copy."""
    return weight if row_order(weight.shape[1:], weight.stride()[1:]) is not None else weight.contiguous()


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of contiguous memory."""
    found, span = [], 1
    for size in reversed(shape):
        found.append(span)
        span *= size
    return tuple(reversed(found))


class Memory(NamedTuple):
    """What is allocated for a tensor. (``torch.empty_strided`` of sizes and strides is the fastest way to it.)"""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def dense(size: tuple[int, ...], dtype: torch.dtype) -> Memory:
        """Contiguous."""
        return Memory(size, dense_strides(size), dtype)

    @property
    def bytes(self) -> int:
        """Of contiguous memory."""
        return math.prod(self.size) * self.dtype.itemsize

    def part(self, kept: slice) -> Memory:
        """Without the other dimensions, whose sizes are 1."""
        return Memory(self.size[kept], self.strides[kept], self.dtype)


def lies_alike(size: Sequence[int], strides: Sequence[int], others: Sequence[int]) -> bool:
    """Whether tensors of these strides lie in memory alike; those of dimensions of size 1 mean nothing."""
    return all(n == 1 or a == b for n, a, b in zip(size, strides, others, strict=True))


def strides_like_rows(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Of dense memory for ``(clients, out, in[, kH, kW])``; rows channels last if those of these strides are."""
    n_in = math.prod(shape[2:])
    if len(shape) == 5 and row_order(shape[1:], strides[1:]) == (n_in, 1):
        out, c, high, wide = shape[1:]
        return channels_last_strides(c, high, wide, out)
    return dense_strides(shape)


def like_rows(weight: Tensor) -> Tensor:
    """Uninitialised, shape of ``weight`` (clients first), contiguous; rows channels last if those of ``weight`` are."""
    strides = strides_like_rows(weight.shape, weight.stride())
    return torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)

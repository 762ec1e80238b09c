"""Sizes of a convolution, and the forms in which kernels take tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

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


def channels_last(x: Tensor) -> Tensor:
    """``(clients, N, C, H, W)`` as ``(clients, N, H, W, C)`` whose last stride is 1; a copy only where it must be."""
    x = x.permute(0, 1, 3, 4, 2)
    return x if x.stride(4) == 1 or x.shape[4] == 1 else x.contiguous()


def empty_channels_last(
    clients: int, n: int, c: int, size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Uninitialised ``(clients, n, c, *size)``, stored as ``(clients, n, *size, c)``."""
    return torch.empty(clients, n, *size, c, dtype=dtype, device=device).permute(0, 1, 4, 2, 3)


def client_step(t: Tensor) -> int:
    """Distance in memory between clients, as kernels take it: 0 for a single client, whatever the size of its batch.

    Kernels are compiled for what divides a distance, and that of a single client is never used.
    """
    return 0 if t.shape[0] == 1 else t.stride(0)


def row_step(x: Tensor) -> int | None:
    """Distance in memory between consecutive positions of ``(clients, N, H, W, C)``, None if it varies."""
    step = span = None
    for size, stride in zip(x.shape[3:0:-1], x.stride()[3:0:-1], strict=True):
        if size == 1:
            continue
        if step is None:
            step, span = stride, stride * size
        elif stride != span:
            return None
        else:
            span = stride * size
    return 0 if step is None else step


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


def dense_rows(weight: Tensor) -> Tensor:
    """``weight`` itself if the rows of every client lie dense in memory, else a contiguous copy."""
    return weight if row_order(weight.shape[1:], weight.stride()[1:]) is not None else weight.contiguous()


def like_rows(weight: Tensor) -> Tensor:
    """Uninitialised, shape of ``weight`` (clients first), contiguous; rows channels last if those of ``weight`` are."""
    n_in = math.prod(weight.shape[2:])
    if weight.dim() == 5 and row_order(weight.shape[1:], weight.stride()[1:]) == (n_in, 1):
        clients, out, c, high, wide = weight.shape
        return weight.new_empty(clients, out, high, wide, c).permute(0, 1, 4, 2, 3)
    return weight.new_empty(weight.shape)

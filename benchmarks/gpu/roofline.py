"""Floors and ceilings: what no kernel can beat on a machine of given constants. Arithmetic, not measurement."""

from __future__ import annotations

import dataclasses

import torch

from .shapes import Layer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Machine:
    """FLOP/s of a dense product by dtype, bytes/s of memory, and where the figures come from."""

    peak: dict[str, float]
    bandwidth: float
    source: str


_HOPPER = {"bf16": 790e12, "fp16": 790e12, "tf32": 395e12, "fp32": 60e12}
# By a part of the device's name. What a large product and a large copy reach, not the data sheet's marketing peak.
MACHINES = {
    "H200": Machine(_HOPPER, 4.3e12, "H200: 790 TFLOP/s bf16, 4.3 TB/s"),
    "H100": Machine(_HOPPER, 3.0e12, "H100 80GB HBM3: 790 TFLOP/s bf16, 3.0 TB/s"),
}
PRODUCTS = {"forward": 1, "dgrad": 1, "wgrad": 1, "whole": 3, "module": 3}


def machine(device_name: str) -> Machine | None:
    """Constants of a device, None if they are not known: its rows then have no floor."""
    return next((m for part, m in MACHINES.items() if part in device_name), None)


def floor_us(m: Machine, layer: Layer, n: int, dtype: str, mode: str, density: float, compact: bool = False) -> float:
    """Least microseconds of a layer at a density.

    Each product reads two of input, weights and output and writes the third, once; inputs and outputs are dense, pruned
    channels included, unless ``compact``: then outputs have active channels only.

    Args:
        n: images, or rows of a linear layer.
        mode: ``forward``, ``dgrad``, ``wgrad``, or ``whole`` or ``module`` for all three.
        density: share of active filters.
    """
    g = layer.geometry
    positions, size = n * g.output[0] * g.output[1], torch.finfo(DTYPES[dtype]).bits // 8
    flop = 2.0 * positions * layer.out * g.n_in * density
    x = n * g.channels * g.height * g.width * size
    y = positions * layer.out * size * (density if compact else 1.0)
    w = layer.out * g.n_in * size * density
    return 1e6 * PRODUCTS[mode] * max(flop / m.peak[dtype], (x + y + w) / m.bandwidth)


def ceiling(m: Machine, layer: Layer, n: int, dtype: str, mode: str, density: float, compact: bool = False) -> float:
    """Greatest possible speed-up over dense at density 1: the ratio of the floors."""
    dense = floor_us(m, layer, n, dtype, mode, 1.0)
    return dense / floor_us(m, layer, n, dtype, mode, density, compact)


def tile_density(count: int, out: int, filters: int) -> float:
    """Share of ``out`` filters that tiles of ``filters`` multiply when ``count`` are active.

    The last tile shrinks to 16 or the least double of it that holds what is left.
    """
    whole, left = divmod(count, filters)
    last = 0 if left == 0 else max(16, 1 << (left - 1).bit_length())
    return min(1.0, (filters * whole + min(filters, last)) / out)

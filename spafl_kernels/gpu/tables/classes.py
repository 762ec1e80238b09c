"""Layers that share their times, and densities that are measured."""

from __future__ import annotations

from collections.abc import Sequence

# Densities that are measured. What the host knows of a density is rounded up to one of them, so that a compiled model
# is traced for few values.
DENSITIES = (0.1, 0.25, 0.5, 0.75, 1.0)


def density_step(density: float) -> int:
    """The place in :data:`DENSITIES` of the smallest that is not below ``density``; the last one above 1."""
    for step, measured in enumerate(DENSITIES):
        if density <= measured:
            return step
    return len(DENSITIES) - 1


def power_up(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    power = 1
    while power < n:
        power *= 2
    return power


def power_down(n: int) -> int:
    """The largest power of two that is at most ``n``; 1 below 1."""
    power = 1
    while 2 * power <= n:
        power *= 2
    return power


def exact(n: int) -> int:
    """``n``, at least 1, as a number even where it was symbolic; for small numbers."""
    number = 1
    while number < n:
        number += 1
    return number


def shape_class(kernel: Sequence[int], stride: Sequence[int], channels: int, out: int, positions: int) -> str:
    """The class of a layer: its times are taken to hold for all layers of the class.

    Channels are rounded up to a power of two, as tiles are filled up; output positions (batch times height times width,
    or rows of a linear layer) down.
    """
    step = f"/{stride[0]}" if stride[0] == stride[1] else f"/{stride[0]}x{stride[1]}"
    sizes = f"in{power_up(channels)} out{power_up(out)} positions{power_down(positions)}"
    return f"conv{kernel[0]}x{kernel[1]}{step} {sizes}"

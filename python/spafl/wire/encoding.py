"""Encodings of a floating-point tensor: as it is, or as small numbers times one scale.

* ``fp32``: the bytes of the tensor (named for what all shipped models hold; float64 stays float64).
* ``fp16``: ``x / scale`` in half precision, to the nearest, with ``scale = max |x|``: the largest error is
  ``2 ** -12`` of the largest entry, and nothing can overflow.
* ``int8``: ``round(127 x / scale)`` as int8, rounded up or down at random so that its expectation is exact (QSGD,
  Alistarh et al., NeurIPS 2017).

A tensor with an entry that is not finite gets the scale NaN and decodes to NaN throughout: the encoding passes on that
something is wrong, and the receiver judges it.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Encoding = Literal["fp32", "fp16", "int8"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
"""Names by code. Codes are part of the format: append, never renumber."""

CODES = {"fp16": torch.float16, "int8": torch.int8}
"""What an encoding with a scale stores per entry."""

SCALE_BYTES = 4

_LEVELS = 127  # int8, symmetric: -128 is not used


def quantise(x: Tensor, encoding: Encoding, stream: np.random.Generator | None) -> tuple[float, Tensor]:
    """``(scale, codes)`` of a floating-point tensor.

    Args:
        x: any shape, on the CPU.
        encoding: ``"fp16"`` or ``"int8"``.
        stream: random numbers for ``int8``; one is drawn per entry.

    Returns:
        the scale, representable in float32, and the codes in the shape of ``x``.

    Raises:
        ValueError: ``int8`` without a stream.
    """
    codes = CODES[encoding]
    wide = x.double()
    largest = wide.abs().max().item() if x.numel() else 0.0
    scale = float(np.float32(largest)) if largest <= np.finfo(np.float32).max else math.nan
    if math.isnan(scale):
        return scale, torch.zeros(x.shape, dtype=codes)
    if scale == 0.0:  # also where the largest entry is below the smallest float32: error feedback keeps it
        _draw(x, encoding, stream)
        return 0.0, torch.zeros(x.shape, dtype=codes)
    if encoding == "fp16":
        return scale, (wide / scale).clamp(-1, 1).to(codes)
    draws = _draw(x, encoding, stream)
    assert draws is not None
    return scale, (wide * (_LEVELS / scale) + draws).floor().clamp(-_LEVELS, _LEVELS).to(codes)


def _draw(x: Tensor, encoding: Encoding, stream: np.random.Generator | None) -> Tensor | None:
    """Uniform numbers in [0, 1): always one per entry, so that a stream's position never depends on values."""
    if encoding != "int8":
        return None
    if stream is None:
        raise ValueError("encoding int8 rounds at random: it needs a stream of random numbers")
    return torch.from_numpy(stream.random(x.numel())).view(x.shape)


def dequantise(scale: float, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor that ``(scale, codes)`` stand for; the same bits on every machine."""
    factor = scale / _LEVELS if codes.dtype is torch.int8 else scale
    return (codes.double() * factor).to(dtype)

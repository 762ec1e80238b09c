"""How a server makes one tensor of its clients': the mean, or one that a few hostile clients cannot move far.

Coordinate-wise median and trimmed mean after Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018. Both take
every client alike: sample counts are the clients' own word.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import BaseOptions

Aggregation = Literal["mean", "median", "trimmed-mean"]


class AggregationOptions(BaseOptions):
    """Settings of methods whose server averages what clients send."""

    aggregation: Aggregation = "mean"
    """``median`` and ``trimmed-mean`` work entry by entry and ignore sample counts."""
    trim: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the clients, rounded up, that ``trimmed-mean`` leaves out at either end."""


def trimmed_count(clients: int, trim: float) -> int:
    """How many values are left out at either end: ``ceil(trim * clients)``, but at least one of all is kept."""
    # The share is a decimal: 0.1 * 30 is a little more than 3, and must not become 4.
    return min(math.ceil(round(trim * clients, 9)), (clients - 1) // 2)


def robust_mean(values: Tensor, aggregation: Aggregation, trim: float) -> Tensor:
    """One tensor of several that a minority cannot move beyond the range of the others.

    Args:
        values: ``(clients, *shape)``, floating point and finite.
        aggregation: ``"median"`` (of an even number: the mean of the middle two) or ``"trimmed-mean"``.
        trim: see :class:`AggregationOptions`.

    Returns:
        ``(*shape)``, in the dtype of ``values``.
    """
    clients = values.shape[0]
    cut = (clients - 1) // 2 if aggregation == "median" else trimmed_count(clients, trim)
    return torch.sort(values, dim=0).values[cut : clients - cut].mean(dim=0)

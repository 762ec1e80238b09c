"""Which filters of a layer are active, as one int32 tensor on the device: the selection every kernel reads.

A selection of a layer with ``out`` filters holds, for every client, ``2 + 3 * out`` numbers:

========================  ==========================================================================================
``[0]``                   count of listed filters
``[1]``                   1 if the mask differs from the one the selection held before, else 0
``[2 : 2 + out]``         listed filters, ascending; -1 behind the last one
``[2 + out : 2 + 2 out]`` position of a filter in that list, or -1 if it is not listed
``[2 + 2 out :]``         bit 0: active; bit 1: the estimator lets the gradient through (``h_i``); bit 2: flipped;
                          bit 3: spoiled
========================  ==========================================================================================

Listed are the active filters, and the spoiled ones: pruned filters with a NaN among their weights, which the definition
multiplies by 0 and which stay NaN. (An infinite weight makes an infinite score, and the filter active.)

Packed weights hold the masked rows of the listed filters in that order, filled up with zero rows to ``capacity(out)``
and with zero columns to a multiple of 16, so that kernels read whole, aligned tiles and need no bound on the filters.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

HEADER = 2
ACTIVE, PASSES, FLIPPED, SPOILED = 1, 2, 4, 8
# Packed rows come in multiples of it, or in 16 or 32. A tile over filters that is wider shrinks where fewer are left.
WIDEST = 64


def capacity(out: int) -> int:
    """Rows of the packed weights of a layer with ``out`` filters: 16, 32 or a multiple of 64."""
    for size in (16, 32):
        if out <= size:
            return size
    return -(-out // WIDEST) * WIDEST


def row_stride(n_in: int) -> int:
    """Columns of the packed weights: ``n_in`` rounded up to 16, which keeps every row 16-byte aligned."""
    return -(-n_in // 16) * 16


def selection_size(out: int) -> int:
    """Numbers in the selection of one layer of one client."""
    return HEADER + 3 * out


@dataclasses.dataclass(frozen=True)
class Selection:
    """Views into a selection tensor of shape ``(clients, selection_size(out))``; nothing is copied or read."""

    data: Tensor
    out: int

    def _part(self, number: int) -> Tensor:
        return self.data[:, HEADER + number * self.out : HEADER + (number + 1) * self.out]

    @property
    def count(self) -> Tensor:
        """Listed filters per client, int32 ``(clients,)``, on the device."""
        return self.data[:, 0]

    @property
    def changed(self) -> Tensor:
        """1 where the last threshold pass changed the mask, int32 ``(clients,)``, on the device."""
        return self.data[:, 1]

    @property
    def index(self) -> Tensor:
        """Listed filters in ascending order, then -1: int32 ``(clients, out)``."""
        return self._part(0)

    @property
    def inverse(self) -> Tensor:
        """Position of every filter in :attr:`index`, -1 if it is not there: int32 ``(clients, out)``."""
        return self._part(1)

    @property
    def flags(self) -> Tensor:
        """``ACTIVE``, ``PASSES``, ``FLIPPED`` and ``SPOILED`` bits of every filter: int32 ``(clients, out)``."""
        return self._part(2)

    @property
    def mask(self) -> Tensor:
        """Which filters are active: bool ``(clients, out)``."""
        return (self.flags & ACTIVE).bool()

    @staticmethod
    def empty(clients: int, out: int, device: torch.device | str) -> Selection:
        """A selection that holds no mask yet: the first pass reports a change."""
        return Selection(torch.full((clients, selection_size(out)), -1, dtype=torch.int32, device=device), out)

"""Multiply-accumulates that threshold layers execute, counted where they run; nothing waits for the device.

How many filters a kernel computes is known on the device only. An operator therefore notes the tensor that holds the
number, and what one filter costs; :meth:`Executed.counting` adds the notes of a step up on the device, in two launches,
which a CUDA graph captures with the step. Products only: no padding of tiles, no threshold pass, no sums over a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Executed", "counting", "note", "note_number", "note_skipped", "uncounted"]

# The counter of the step that is running. The backward pass of a GPU runs in a thread of its own: not thread-local.
_open: Executed | None = None


def counting() -> bool:
    """Whether anybody counts now, for what costs something to find out."""
    return _open is not None


def note(filters: Tensor, macs: int, channels: int | Tensor) -> None:
    """A product over some filters runs now.

    Args:
        filters: int32 ``(clients,)``, how many it computes; not changed until the step is over.
        macs: what one of them costs by input channel.
        channels: input channels; a list of active ones has their number on the device, int32 ``(clients,)``.
    """
    if _open is None:
        return
    if isinstance(channels, Tensor):
        filters, channels = filters * channels, 1
    _open._notes.append((filters, macs * channels))


def note_number(macs: int) -> None:
    """Products that PyTorch's own operators run now for a threshold layer, with sizes that change from step to step."""
    if _open is not None:
        _open.numbers += macs


def note_skipped(macs: int) -> None:
    """Products that a threshold layer does not compute now, for whoever has counted it with all its filters."""
    if _open is not None:
        _open.numbers -= macs


@contextlib.contextmanager
def _counted_by(counter: Executed | None) -> Iterator[None]:
    """What runs in this context is noted with ``counter``, and with no other."""
    global _open
    before, _open = _open, counter
    try:
        yield
    finally:
        _open = before


def uncounted() -> contextlib.AbstractContextManager[None]:
    """Nothing that runs in this context is counted: it is no part of the step that is running."""
    return _counted_by(None)


class Executed:
    """A sum of MACs over many steps. Only one counter counts at a time in a process.

    Attributes:
        numbers: those given to :func:`note_number`, less those given to :func:`note_skipped`.
    """

    def __init__(self) -> None:
        self.numbers = 0
        self._notes: list[tuple[Tensor, int]] = []
        # By the costs of a step's notes: those costs and the filters' sums, int64, on the device. Written in place.
        self._sums: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def reset(self) -> None:
        """Begin at 0."""
        self.numbers = 0
        if self._sums:
            torch._foreach_zero_(self.sums())

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs in this context: one step. If it raises, its notes are dropped."""
        try:
            with _counted_by(self):
                yield
                self._settle()
        finally:
            self._notes.clear()

    def _settle(self) -> None:
        if not self._notes:
            return
        costs = tuple(macs for filters, macs in self._notes for _ in range(len(filters)))
        counts = torch.cat([filters for filters, _ in self._notes])
        key = counts.device, costs
        if key not in self._sums:
            cost = torch.tensor(costs, dtype=torch.int64, device=counts.device)
            self._sums[key] = cost, torch.zeros_like(cost)
        cost, total = self._sums[key]
        total.addcmul_(counts, cost)

    def sums(self) -> list[Tensor]:
        """What is counted on the device; written in place."""
        return [total for _, total in self._sums.values()]

    def total(self) -> int:
        """The sum; waits for the device."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for total in self.sums():
            by_device.setdefault(total.device, []).append(total)
        return self.numbers + sum(int(torch.cat(totals).sum()) for totals in by_device.values())

"""Channels of a list side by side: what makes the inner loops of the products read whole, aligned rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import Memory, client_step
from ..packing import HEADER, WIDEST, Selection, capacity
from .bounds import within
from .launch import REMEMBERED, Launch, current_stream

STEP = 32  # positions that are read at once
COLUMNS = 64  # channels that a program reads at most
LEAST = 128  # positions per program, at least
# Programs at most, four for each multiprocessor of a large GPU: each leaves sums of its channels, which are added up.
PROGRAMS = 528
GROUP = 16  # channels that a program of the launch behind adds up


def row_blocks(total: int, programs: int) -> tuple[int, int]:
    """``(blocks of rows, steps of STEP positions in each)``; ``programs``: of a block of rows, for all clients."""
    steps = triton.cdiv(total, STEP)
    each = max(LEAST // STEP, triton.cdiv(steps, max(1, PROGRAMS // programs)))
    return triton.cdiv(steps, each), each


def column_blocks(out: int) -> int:
    """Programs that share the channels of a block of rows: a serial walk over 1536 of them was most of the time of a
    whole backward pass (ViT's projection, measured on an H200)."""
    return triton.cdiv(capacity(out), COLUMNS)


@triton.jit
def _padded(n, CAP: tl.constexpr, WIDEST: tl.constexpr):
    """How many columns kernels may read when ``n`` are listed: whole tiles of WIDEST, but not more than there are."""
    return tl.minimum((n + WIDEST - 1) // WIDEST * WIDEST, CAP)


@triton.jit
def _places(row, total, g_n, g_h, g_w, P: tl.constexpr, Q: tl.constexpr):
    """Which positions exist, and where they lie in dL/dy: those that do not at the first one."""
    live = row < total
    place = within(row, live)
    at = (place // (P * Q)).to(tl.int64) * g_n + (place // Q % P).to(tl.int64) * g_h
    return live, at + (place % Q).to(tl.int64) * g_w


@triton.jit(do_not_specialize=["total", "steps"])
def threshold_collect(
    grad, collected, partial, words, selection, extended, grad_client, collected_client, partial_client,
    selection_client, extended_client, total, steps, out, number, g_n, g_h, g_w, g_c,
    HEADER: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, EXTRA: tl.constexpr, STATISTICS: tl.constexpr,
    CAP: tl.constexpr, WIDEST: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Listed channels of dL/dy side by side; sums and "not all zero" of every channel; grid (row blocks, column blocks,
    clients).

    ``words``: ``number`` of them become 0, for the next launch.
    """
    client = tl.program_id(2).to(tl.int64)
    selection += client * selection_client
    count = tl.load(selection)
    if EXTRA:
        extended += client * extended_client
        lo = count
        hi = tl.load(extended)
        index = extended + 1
        if hi == lo:
            return
    else:
        lo = 0
        hi = count
        index = selection + HEADER
    grad += client * grad_client
    collected += client * collected_client
    limit = _padded(hi, CAP, WIDEST)
    lo_row = tl.program_id(0) * steps * STEP
    first = tl.program_id(1) * COLUMNS
    c = first + tl.arange(0, COLUMNS)
    if (first < limit) & (first + COLUMNS > lo):
        listed = (c >= lo) & (c < hi)
        channel = tl.load(index + tl.where(listed, c, lo), mask=listed, other=0).to(tl.int64)
        for i in range(0, steps):
            row = lo_row + i * STEP + tl.arange(0, STEP)
            live, at = _places(row, total, g_n, g_h, g_w, P, Q)
            to = collected + row.to(tl.int64)[:, None] * CAP
            part = tl.load(grad + at[:, None] + channel[None, :] * g_c, mask=live[:, None] & listed[None, :], other=0.0)
            tl.store(to + c[None, :], part, mask=live[:, None] & ((c >= lo) & (c < limit))[None, :])
    if STATISTICS:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
            for begin in range(0, number, COLUMNS):
                word = begin + tl.arange(0, COLUMNS)
                tl.store(words + word, 0, mask=word < number)
        partial += client * partial_client + tl.program_id(0).to(tl.int64) * 2 * out
        channel = within(c, c < out).to(tl.int64)
        total_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
        nonzero = tl.zeros((COLUMNS,), dtype=tl.int32)
        for i in range(0, steps):
            live, at = _places(lo_row + i * STEP + tl.arange(0, STEP), total, g_n, g_h, g_w, P, Q)
            part = tl.load(
                grad + at[:, None] + channel[None, :] * g_c, mask=live[:, None] & (c < out)[None, :], other=0.0
            ).to(tl.float32)
            total_sum += tl.sum(part, 0)
            nonzero = tl.maximum(nonzero, tl.max((part != 0.0).to(tl.int32), 0))
        tl.store(partial + c, total_sum, mask=c < out)
        tl.store(partial + out + c, nonzero.to(tl.float32), mask=c < out)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What collecting leaves behind about every channel, not yet added up.

    ``partial``: float32 ``(clients, blocks of rows, 2, out)``: sums, and 1 where not all zero. ``words``: int32 zeros
    for the look-back of the launch that adds up, a word for each of its groups of GROUP channels and one for tickets.
    """

    clients: int
    blocks: int
    out: int

    @staticmethod
    def of(shape: Sequence[int]) -> Statistics:
        """Those of ``(clients, N, out, H, W)``."""
        clients, n, out, high, wide = shape
        return Statistics(clients, row_blocks(n * high * wide, clients * column_blocks(out))[0], out)

    @property
    def groups(self) -> int:
        """Programs that add up the channels of a client."""
        return triton.cdiv(self.out, GROUP)

    @property
    def partial(self) -> Memory:
        return Memory.dense((self.clients, self.blocks, 2, self.out), torch.float32)

    @property
    def words(self) -> Memory:
        return Memory.dense((self.clients * self.groups + 1,), torch.int32)

    @property
    def client(self) -> int:
        """Distance between clients in ``partial``."""
        return client_step(self.clients, self.blocks * 2 * self.out)


def collecting(
    shape: Sequence[int], strides: Sequence[int], selection_client: int, extended_client: int | None = None,
    statistics: Statistics | None = None,
) -> Launch:  # fmt: skip
    """The launch over ``(x, collected, partial, words, selection, extended)``; see :func:`collect_channels`.

    Args:
        shape, strides: of ``x``.
        selection_client, extended_client: distance between the clients of a selection, and of ``extended``; None where
            there is none, and the selection stands for it.
        statistics: what is left behind; None: nothing, and the selection stands for ``partial`` and ``words``.
    """
    clients, n, out, high, wide = shape
    total, cap = n * high * wide, capacity(out)
    columns = column_blocks(out)
    blocks, steps = row_blocks(total, clients * columns)
    partial, words = (0, 0) if statistics is None else (statistics.client, statistics.words.size[0])
    return Launch(
        threshold_collect,
        (blocks, columns, clients),
        (
            client_step(clients, strides[0]), client_step(clients, total * cap),
            partial, selection_client, selection_client if extended_client is None else extended_client, total, steps,
            out, words, strides[1], strides[3], strides[4], strides[2],
        ),
        {
            "HEADER": HEADER, "P": high, "Q": wide, "EXTRA": extended_client is not None,
            "STATISTICS": statistics is not None, "CAP": cap, "WIDEST": WIDEST, "STEP": STEP,
            "COLUMNS": min(COLUMNS, cap), "num_warps": 4,
        },
    )  # fmt: skip


@functools.lru_cache(REMEMBERED)
def _prepare(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    selection: int,
) -> Launch:
    """By everything that the launch depends on: of ``x``, its dtype and that of the selection, and its clients."""
    return collecting(shape, strides, selection)


def collect_channels(x: Tensor, selection: Selection) -> Tensor:
    """The channels of ``x`` that a selection lists, next to each other.

    Args:
        x: ``(clients, N, selection.out, H, W)``, any strides.
        selection: whose active filters are the list.

    Returns:
        ``(clients, N * H * W, capacity(selection.out))``; zeros behind the list up to a whole tile, the rest unwritten.
    """
    clients, n, out, high, wide = x.shape
    into = x.new_empty(clients, n * high * wide, capacity(out))
    data = selection.data
    launch = _prepare(x.shape, x.stride(), (x.dtype, data.dtype), x.device, data.stride(0))
    launch(current_stream(x.get_device()), x, into, data, data, data, data)
    return into

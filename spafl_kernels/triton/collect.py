"""Channels of a list side by side: what makes the inner loops of the products read whole, aligned rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bounds import within
from .geometry import client_step
from .launch import REMEMBERED, Launch, current_stream
from .plan import HEADER, WIDEST, Plan, capacity

COLLECT_ROWS = 128  # positions per program


@triton.jit
def _padded(n, CAP: tl.constexpr, WIDEST: tl.constexpr):
    """How many columns kernels may read when ``n`` are listed: whole tiles of WIDEST, but not more than there are."""
    return tl.minimum((n + WIDEST - 1) // WIDEST * WIDEST, CAP)


@triton.jit(do_not_specialize=["total"])
def threshold_collect(
    grad, collected, partial, plan, extended, grad_client, collected_client, partial_client, plan_client,
    extended_client, total, out, g_n, g_h, g_w, g_c,
    HEADER: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, EXTRA: tl.constexpr, STATISTICS: tl.constexpr,
    CAP: tl.constexpr, WIDEST: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Listed channels of dL/dy side by side; sums and "not all zero" of every channel; grid (row blocks, clients)."""
    client = tl.program_id(1).to(tl.int64)
    plan += client * plan_client
    count = tl.load(plan)
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
        index = plan + HEADER
    grad += client * grad_client
    collected += client * collected_client
    limit = _padded(hi, CAP, WIDEST)
    for r0 in range(0, ROWS, STEP):
        row = tl.program_id(0) * ROWS + r0 + tl.arange(0, STEP)
        live = row < total
        place = within(row, live)
        at = (
            (place // (P * Q)).to(tl.int64) * g_n + (place // Q % P).to(tl.int64) * g_h + (place % Q).to(tl.int64) * g_w
        )
        to = collected + row.to(tl.int64)[:, None] * CAP
        for c0 in range(lo, limit, COLUMNS):
            c = c0 + tl.arange(0, COLUMNS)
            channel = tl.load(index + tl.where(c < hi, c, 0), mask=c < hi, other=0).to(tl.int64)
            part = tl.load(
                grad + at[:, None] + channel[None, :] * g_c, mask=live[:, None] & (c < hi)[None, :], other=0.0
            )
            tl.store(to + c[None, :], part, mask=live[:, None] & (c < limit)[None, :])
    if STATISTICS:
        partial += client * partial_client + tl.program_id(0).to(tl.int64) * 2 * out
        for c0 in range(0, out, COLUMNS):
            c = c0 + tl.arange(0, COLUMNS)
            channel = within(c, c < out)
            total_sum = tl.zeros((COLUMNS,), dtype=tl.float32)
            nonzero = tl.zeros((COLUMNS,), dtype=tl.int32)
            for r0 in range(0, ROWS, STEP):
                row = tl.program_id(0) * ROWS + r0 + tl.arange(0, STEP)
                live = row < total
                row = within(row, live)
                at = (row // (P * Q)).to(tl.int64) * g_n + (row // Q % P).to(tl.int64) * g_h
                at += (row % Q).to(tl.int64) * g_w
                part = tl.load(
                    grad + at[:, None] + channel.to(tl.int64)[None, :] * g_c,
                    mask=live[:, None] & (c < out)[None, :], other=0.0,
                ).to(tl.float32)  # fmt: skip
                total_sum += tl.sum(part, 0)
                nonzero = tl.maximum(nonzero, tl.max((part != 0.0).to(tl.int32), 0))
            tl.store(partial + c, total_sum, mask=c < out)
            tl.store(partial + out + c, nonzero.to(tl.float32), mask=c < out)


def collecting(
    shape: Sequence[int], strides: Sequence[int], plan_client: int, extended_client: int | None = None,
    partial_client: int | None = None,
) -> Launch:  # fmt: skip
    """The launch over ``(x, collected, partial, plan, extended)``; see :func:`collect_channels`.

    Args:
        shape, strides: of ``x``.
        plan_client, extended_client, partial_client: distance between the clients of a plan, and of ``extended`` and
            ``partial``; None where there is none, and the plan stands for it.
    """
    clients, n, out, high, wide = shape
    total, cap = n * high * wide, capacity(out)
    return Launch(
        threshold_collect,
        (triton.cdiv(total, COLLECT_ROWS), clients),
        (
            client_step(clients, strides[0]), client_step(clients, total * cap),
            client_step(clients, partial_client or 0), plan_client,
            plan_client if extended_client is None else extended_client, total, out, strides[1], strides[3],
            strides[4], strides[2],
        ),
        {
            "HEADER": HEADER, "P": high, "Q": wide, "EXTRA": extended_client is not None,
            "STATISTICS": partial_client is not None, "CAP": cap, "WIDEST": WIDEST, "ROWS": COLLECT_ROWS, "STEP": 32,
            "COLUMNS": min(64, cap), "num_warps": 4,
        },
    )  # fmt: skip


@functools.lru_cache(REMEMBERED)
def _prepare(
    shape: tuple[int, ...], strides: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device, plan: int
) -> Launch:
    """By everything that the launch depends on: of ``x``, its dtype and that of the plan, and the plan's clients."""
    return collecting(shape, strides, plan)


def collect_channels(x: Tensor, plan: Plan) -> Tensor:
    """The channels of ``x`` that a plan lists, next to each other.

    Args:
        x: ``(clients, N, plan.out, H, W)``, any strides.
        plan: whose active filters are the list.

    Returns:
        ``(clients, N * H * W, capacity(plan.out))``; zeros behind the list up to a whole tile, the rest unwritten.
    """
    clients, n, out, high, wide = x.shape
    into = x.new_empty(clients, n * high * wide, capacity(out))
    data = plan.data
    launch = _prepare(x.shape, x.stride(), (x.dtype, data.dtype), x.device, data.stride(0))
    launch(current_stream(x.get_device()), x, into, data, data, data)
    return into

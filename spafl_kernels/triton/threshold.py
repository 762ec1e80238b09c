"""The threshold pass: scores, masks, active lists, counts and packed weights of all layers, without the host.

The rank of a filter among the active ones depends on every filter before it, and programs of one launch cannot wait
for each other (a grid-wide barrier hangs when not all programs are resident). So there are two schedules of the same
code: *two launches* (score all rows in parallel; then pack all rows in parallel, every program counting the flags
before its rows), and *one launch* with one program per layer and client, for models whose layers are all small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Estimator, check_estimator
from .geometry import dense_rows, row_order
from .kinds import DTYPES
from .plan import HEADER, Plan, capacity, plan_size, row_stride

ROWS = 16  # rows of a program
STEP = 256  # numbers of a row that are read at once
# Largest weight, in numbers, for which one program per layer does both halves. Chosen by arithmetic (a single program
# streams about 100 GB/s, a launch costs about 2 us, so about 50,000 four-byte numbers break even); not measured.
ONE_LAUNCH_NUMEL = 32768
FIELDS = 12  # numbers per layer in the table of a model


@triton.jit
def _score(
    weight, threshold, flags, scores, first, out, n_in,
    WINDOW: tl.constexpr, COMPARE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Flags and scores of rows [first, first + ROWS). The sum runs in float32, as PyTorch's mean does."""
    row = first + tl.arange(0, ROWS)
    live = row < out
    total = tl.zeros((ROWS, STEP), dtype=tl.float32)
    start = weight + row.to(tl.int64)[:, None] * n_in
    for k0 in range(0, n_in, STEP):
        k = k0 + tl.arange(0, STEP)
        part = tl.load(start + k[None, :], mask=live[:, None] & (k < n_in)[None, :], other=0.0)
        total += tl.abs(part.to(tl.float32))
    kind: tl.constexpr = weight.dtype.element_ty
    # Rounded to the dtype of the weight before it is compared, as the definition compares.
    score = (tl.sum(total, 1) / n_in).to(kind).to(tl.float32)
    tau = tl.load(threshold + row, mask=live, other=0.0).to(tl.float32)
    flag = (score > tau).to(tl.int32)
    if WINDOW:
        margin = (score - tau).to(kind).to(tl.float32)
        flag += tl.where(tl.abs(margin) > 1.0, 2, 0)
    else:
        flag += 2
    if COMPARE:
        before = tl.load(flags + row, mask=live, other=0)
    else:
        before = tl.full((ROWS,), -1, tl.int32)
    flag += tl.where((before < 0) | ((before & 1) != (flag & 1)), 4, 0)
    tl.store(flags + row, flag, mask=live)
    tl.store(scores + row, score, mask=live)


@triton.jit
def _count_active(flags, limit, out, STEP: tl.constexpr):
    """How many of the first ``limit`` filters are active."""
    total = tl.zeros((STEP,), dtype=tl.int32)
    for i0 in range(0, limit, STEP):
        i = i0 + tl.arange(0, STEP)
        total += tl.load(flags + i, mask=i < tl.minimum(limit, out), other=0) & 1
    return tl.sum(total, 0)


@triton.jit
def _pack(
    weight, flags, index, inverse, packed, first, out, n_in, inner, outer, cap, stride,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """List entries and packed rows of filters [first, first + ROWS), and the zero rows among packed rows of that range.

    A row of the weight lies in memory as ``(inner, outer)`` and is packed as ``(outer, inner)``: channels first to
    channels last. ``outer = 1`` copies it as it is.
    """
    rank = _count_active(flags, first, out, STEP)
    count = _count_active(flags, out, out, STEP)
    row = first + tl.arange(0, ROWS)
    live = row < out
    active = tl.load(flags + row, mask=live, other=0) & 1
    position = rank + tl.cumsum(active, 0) - active
    keep = live & (active > 0)
    tl.store(inverse + row, tl.where(active > 0, position, -1), mask=live)
    tl.store(index + position, row, mask=keep)
    tl.store(index + row, tl.full((ROWS,), -1, tl.int32), mask=live & (row >= count))
    empty = (row < cap) & (row >= count)
    for k0 in range(0, stride, STEP):
        k = k0 + tl.arange(0, STEP)
        source = (k % inner) * outer + k // inner
        part = tl.load(
            weight + row.to(tl.int64)[:, None] * n_in + source[None, :],
            mask=keep[:, None] & (k < n_in)[None, :],
            other=0.0,
        )
        part = part.to(packed.dtype.element_ty)
        wide = (k < stride)[None, :]
        tl.store(packed + position.to(tl.int64)[:, None] * stride + k[None, :], part, mask=keep[:, None] & wide)
        zero = tl.zeros((ROWS, STEP), dtype=packed.dtype.element_ty)
        tl.store(packed + row.to(tl.int64)[:, None] * stride + k[None, :], zero, mask=empty[:, None] & wide)


@triton.jit
def _finish(plan, flags, out, STEP: tl.constexpr):
    """Count and changed flag of a layer, once all its flags are known."""
    flipped = tl.zeros((STEP,), dtype=tl.int32)
    for i0 in range(0, out, STEP):
        i = i0 + tl.arange(0, STEP)
        flipped = tl.maximum(flipped, tl.load(flags + i, mask=i < out, other=0) & 4)
    tl.store(plan, _count_active(flags, out, out, STEP))
    tl.store(plan + 1, tl.max(flipped, 0) // 4)


@triton.jit
def _layer(
    weight, threshold, plan, scores, packed, block, out, n_in, inner, outer, cap, stride,
    SCORE: tl.constexpr, PACK: tl.constexpr, WINDOW: tl.constexpr, COMPARE: tl.constexpr, HEADER: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One block of rows of one half of the pass, or all blocks of both halves when one program has the layer."""
    index = plan + HEADER
    inverse = index + out
    flags = inverse + out
    if SCORE and PACK:
        for first in range(0, out, ROWS):
            _score(weight, threshold, flags, scores, first, out, n_in, WINDOW, COMPARE, ROWS, STEP)
        tl.debug_barrier()  # the flags are read by other threads of this program
        for first in range(0, cap, ROWS):
            _pack(weight, flags, index, inverse, packed, first, out, n_in, inner, outer, cap, stride, ROWS, STEP)
        _finish(plan, flags, out, STEP)
    elif SCORE:
        if block * ROWS < out:
            _score(weight, threshold, flags, scores, block * ROWS, out, n_in, WINDOW, COMPARE, ROWS, STEP)
    else:
        if block * ROWS < cap:
            _pack(weight, flags, index, inverse, packed, block * ROWS, out, n_in, inner, outer, cap, stride, ROWS, STEP)
            if block == 0:
                _finish(plan, flags, out, STEP)


@triton.jit
def threshold_pass_layer(
    weight, threshold, plan, scores, packed, weight_client, threshold_client, plan_client, packed_client,
    out, n_in, inner, outer, cap, stride,
    SCORE: tl.constexpr, PACK: tl.constexpr, WINDOW: tl.constexpr, COMPARE: tl.constexpr, HEADER: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The pass for one layer of every client: grid (row blocks, clients)."""
    client = tl.program_id(1).to(tl.int64)
    _layer(
        weight + client * weight_client, threshold + client * threshold_client, plan + client * plan_client,
        scores + client * out, packed + client * packed_client, tl.program_id(0), out, n_in, inner, outer, cap, stride,
        SCORE, PACK, WINDOW, COMPARE, HEADER, ROWS, STEP,
    )  # fmt: skip


@triton.jit
def threshold_pass_model(
    table, plans, scores, packed,
    DTYPE: tl.constexpr, SCORE: tl.constexpr, PACK: tl.constexpr, WINDOW: tl.constexpr, COMPARE: tl.constexpr,
    HEADER: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The pass for all layers of a model: grid (row blocks of the largest layer, layers); addresses from a table."""
    entry = table + tl.program_id(1) * FIELDS
    weight = tl.load(entry).to(tl.pointer_type(DTYPE))
    threshold = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    plan_at, scores_at, packed_at = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    out, n_in = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    inner, outer = tl.load(entry + 7).to(tl.int32), tl.load(entry + 8).to(tl.int32)
    cap, stride = tl.load(entry + 9).to(tl.int32), tl.load(entry + 10).to(tl.int32)
    _layer(
        weight, threshold, plans + plan_at, scores + scores_at, packed + packed_at, tl.program_id(0),
        out, n_in, inner, outer, cap, stride, SCORE, PACK, WINDOW, COMPARE, HEADER, ROWS, STEP,
    )  # fmt: skip


def plan_layer(
    weight: Tensor, threshold: Tensor, estimator: Estimator, dtype: torch.dtype | None = None, plan: Plan | None = None
) -> tuple[Plan, Tensor, Tensor]:
    """Plan, packed weights and scores of one layer of every client.

    Args:
        weight: ``(clients, out, in)`` or ``(clients, out, in, kH, kW)``, float32, float16 or bfloat16.
        threshold: ``(clients, out)``, dtype of ``weight``.
        estimator: ``"identity"`` or ``"window"``.
        dtype: of the packed weights; that of ``weight`` by default.
        plan: overwritten in place if given, and compared with, for :attr:`Plan.changed`.

    Returns:
        ``(plan, packed, scores)``; packed ``(clients, capacity(out), row_stride(n_in))`` with every row in
        ``(kH, kW, in)`` order; scores float32 ``(clients, out)``.
    """
    clients, out = weight.shape[:2]
    weight, threshold = dense_rows(weight), threshold.contiguous()
    n_in = math.prod(weight.shape[2:])
    order = row_order(weight.shape[1:], weight.stride()[1:])
    assert order is not None
    compare = plan is not None
    if plan is None:
        plan = Plan(torch.empty(clients, plan_size(out), dtype=torch.int32, device=weight.device), out)
    cap, stride = capacity(out), row_stride(n_in)
    packed = torch.empty(clients, cap, stride, dtype=dtype or weight.dtype, device=weight.device)
    scores = torch.empty(clients, out, dtype=torch.float32, device=weight.device)
    blocks = triton.cdiv(cap, ROWS)
    halves = [(True, True, 1)] if out * n_in <= ONE_LAUNCH_NUMEL else [(True, False, blocks), (False, True, blocks)]
    for score, pack, programs in halves:
        threshold_pass_layer[(programs, clients)](
            weight, threshold, plan.data, scores, packed,
            weight.stride(0), threshold.stride(0), plan.data.stride(0), packed.stride(0),
            out, n_in, order[0], order[1], cap, stride,
            SCORE=score, PACK=pack, WINDOW=estimator == "window", COMPARE=compare, HEADER=HEADER, ROWS=ROWS,
            STEP=STEP, num_warps=4,
        )  # fmt: skip
    return plan, packed, scores


class ModelPass:
    """The threshold pass of all layers of a model, in one or two launches per call; results stay on the device.

    Args:
        weights: one ``(out, in)`` or ``(out, in, kH, kW)`` tensor per layer, all of one dtype and device, rows dense in
            memory. They are read in place at every call, so they must be updated in place (as optimisers do).
        thresholds: one ``(out,)`` tensor per layer, contiguous, same dtype and device.
        estimator: ``"identity"`` or ``"window"``.
        dtype: of the packed weights; that of the weights by default.

    Raises:
        ValueError: no layer, mixed dtypes or devices, a wrong shape, or a weight whose rows are not dense.

    Attributes:
        plans: one :class:`Plan` (of one client) per layer, rewritten by every call.
        packed: one ``(capacity(out), row_stride(n_in))`` tensor per layer.
        scores: one float32 ``(out,)`` tensor per layer.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        thresholds: Sequence[Tensor],
        estimator: Estimator = "identity",
        dtype: torch.dtype | None = None,
    ) -> None:
        check_estimator(estimator)
        if not weights or len(weights) != len(thresholds):
            raise ValueError(
                f"weights and thresholds must be lists of the same length, at least 1; got {len(weights)} and "
                f"{len(thresholds)}"
            )
        kind, device = weights[0].dtype, weights[0].device
        if kind not in DTYPES:
            raise ValueError(f"weights must be float32, float16 or bfloat16; got {kind}")
        orders = []
        for i, (w, t) in enumerate(zip(weights, thresholds, strict=True)):
            if {w.dtype, t.dtype} != {kind} or {w.device, t.device} != {device}:
                raise ValueError(
                    f"all weights and thresholds must be {kind} on {device}; layer {i} has weight {w.dtype} on "
                    f"{w.device} and threshold {t.dtype} on {t.device}"
                )
            if w.dim() not in (2, 4) or not w.numel() or t.shape != w.shape[:1] or not t.is_contiguous():
                raise ValueError(
                    f"layer {i}: weight must be (out, in) or (out, in, kH, kW) and not empty, threshold contiguous "
                    f"(out,); got {tuple(w.shape)} and {tuple(t.shape)}"
                )
            orders.append(row_order(w.shape, w.stride()))
            if orders[-1] is None:
                raise ValueError(
                    f"layer {i}: the rows of the weight must lie dense in memory; got strides {w.stride()}"
                )
        self.weights, self.thresholds, self.estimator, self._orders = list(weights), list(thresholds), estimator, orders
        outs, n_ins = [w.shape[0] for w in weights], [math.prod(w.shape[1:]) for w in weights]
        sizes = [capacity(o) * row_stride(n) for o, n in zip(outs, n_ins, strict=True)]
        self._plans = torch.full((sum(map(plan_size, outs)),), -1, dtype=torch.int32, device=device)
        self._packed = torch.empty(sum(sizes), dtype=dtype or kind, device=device)
        self._scores = torch.empty(sum(outs), dtype=torch.float32, device=device)
        self.plans = [
            Plan(part.unsqueeze(0), o)
            for part, o in zip(self._plans.split([plan_size(o) for o in outs]), outs, strict=True)
        ]
        self.packed = [
            part.view(capacity(o), row_stride(n))
            for part, o, n in zip(self._packed.split(sizes), outs, n_ins, strict=True)
        ]
        self.scores = list(self._scores.split(outs))
        self._one_launch = max(o * n for o, n in zip(outs, n_ins, strict=True)) <= ONE_LAUNCH_NUMEL
        self._blocks = triton.cdiv(max(map(capacity, outs)), ROWS)
        self._dtype = DTYPES[kind]
        self._addresses = self._current_addresses()
        self._table = self._make_table()

    def _current_addresses(self) -> list[tuple[int, int]]:
        return [(w.data_ptr(), t.data_ptr()) for w, t in zip(self.weights, self.thresholds, strict=True)]

    def _make_table(self) -> Tensor:
        rows, plan_at, scores_at, packed_at = [], 0, 0, 0
        for (w_at, t_at), w, order in zip(self._addresses, self.weights, self._orders, strict=True):
            assert order is not None
            out, n_in = w.shape[0], math.prod(w.shape[1:])
            cap, stride = capacity(out), row_stride(n_in)
            rows.append([w_at, t_at, plan_at, scores_at, packed_at, out, n_in, *order, cap, stride, 0])
            plan_at, scores_at, packed_at = plan_at + plan_size(out), scores_at + out, packed_at + cap * stride
        return torch.tensor(rows, dtype=torch.int64, device=self._plans.device)

    def __call__(self) -> list[Plan]:
        """Run the pass and return :attr:`plans`. No host synchronisation unless a weight was moved to new memory."""
        if (addresses := self._current_addresses()) != self._addresses:
            self._addresses = addresses
            self._table = self._make_table()
        halves = [(True, True, 1)] if self._one_launch else [(True, False, self._blocks), (False, True, self._blocks)]
        for score, pack, programs in halves:
            threshold_pass_model[(programs, len(self.weights))](
                self._table, self._plans, self._scores, self._packed,
                DTYPE=self._dtype, SCORE=score, PACK=pack, WINDOW=self.estimator == "window", COMPARE=True,
                HEADER=HEADER, FIELDS=FIELDS, ROWS=ROWS, STEP=STEP, num_warps=4,
            )  # fmt: skip
        return self.plans

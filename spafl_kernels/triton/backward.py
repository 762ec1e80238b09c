"""Backward of linear and convolution layers, over the filters that can have a gradient and over nothing else.

Steps, each a launch without the host:

1. *collect*: read ``dL/dy`` once, in any layout; write the channels of active filters next to each other (both products
   below would otherwise gather channels in their inner loop, which forbids wide loads); per block of rows, sum every
   channel (bias gradient) and note whether it holds anything but zeros.
2. *extend*: add up those partial results in a fixed order, and append to the list of active filters the pruned ones
   whose gradient is needed: the estimator passes, and ``dL/dy`` of the channel is not all zero. With a ReLU behind the
   layer there are none, and they cost nothing. Each one there is costs its row of the weight gradient, as a dense
   layer would pay: the exact ``r_i`` of a pruned filter needs all of it.
3. *collect extra*: the channels of those filters; programs return at once when there are none.
4. *dgrad*: ``dL/dx``, reduced over active filters; positions are split by their residue modulo the stride, so that no
   kernel tap is visited in vain.
5. *wgrad*: rows ``G_i`` of the listed filters, float32, split over the batch into slabs.
6. *finish*: add the slabs in a fixed order; ``r_i = sum_j G_ij w_ij``; ``dL/dw`` and ``dL/dtau`` of every filter, zeros
   for those that are not listed.

Nothing is accumulated atomically, so results are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .collect import COLLECT_ROWS, collect_channels
from .forward import restrict, spread
from .geometry import Geometry, channels_last, dense_rows, empty_channels_last, like_rows, row_order, row_step
from .kinds import is_wide
from .plan import HEADER, Plan, capacity, row_stride
from .tiles import Tile, arithmetic, choose, power_of_two, precision

FINISH_STEP = 1024
# Programs that the split of wgrad aims at (a few waves of a large GPU), and the most memory its slabs may take.
WGRAD_PROGRAMS = 528
SLAB_BYTES = 64 << 20


@triton.jit
def threshold_extend(
    partial, sums, plan, extended, partial_client, sums_client, plan_client, extended_client, blocks, out,
    HEADER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Channel sums, and the list of filters whose row of the weight gradient is needed; grid (1, clients).

    ``extended``: count, the extra filters at their positions in the list, and the position of every filter or -1.
    """
    client = tl.program_id(1).to(tl.int64)
    partial += client * partial_client
    plan += client * plan_client
    extended += client * extended_client
    flags = plan + HEADER + 2 * out
    inverse = plan + HEADER + out
    position = tl.load(plan)
    for c0 in range(0, out, COLUMNS):
        c = c0 + tl.arange(0, COLUMNS)
        live = c < out
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        nonzero = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for b0 in range(0, blocks, ROWS):
            b = b0 + tl.arange(0, ROWS)
            mask = (b < blocks)[:, None] & live[None, :]
            at = partial + b.to(tl.int64)[:, None] * 2 * out + c[None, :]
            total += tl.load(at, mask=mask, other=0.0)
            nonzero = tl.maximum(nonzero, tl.load(at + out, mask=mask, other=0.0))
        tl.store(sums + client * sums_client + c, tl.sum(total, 0), mask=live)
        flag = tl.load(flags + c, mask=live, other=0)
        extra = (live & ((flag & 1) == 0) & ((flag & 2) != 0) & (tl.max(nonzero, 0) > 0)).to(tl.int32)
        at = position + tl.cumsum(extra, 0) - extra
        tl.store(extended + 1 + at, c, mask=extra > 0)
        where = tl.where(extra > 0, at, tl.load(inverse + c, mask=live, other=-1))
        tl.store(extended + 1 + out + c, where, mask=live)
        position += tl.sum(extra, 0)
    tl.store(extended, position)


@triton.jit
def threshold_dgrad(
    collected, packed, dx, plan, inputs, collected_client, packed_client, dx_client, plan_client, inputs_client,
    total, stride, channels, row_tiles,
    HEADER: tl.constexpr, LISTED: tl.constexpr, GROUP: tl.constexpr, SHAPE: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dL/dx; grid (row tiles * channel tiles, residue classes of positions, clients)."""
    C: tl.constexpr = SHAPE[0]
    H: tl.constexpr = SHAPE[1]
    W: tl.constexpr = SHAPE[2]
    P: tl.constexpr = SHAPE[3]
    Q: tl.constexpr = SHAPE[4]
    R: tl.constexpr = SHAPE[5]
    S: tl.constexpr = SHAPE[6]
    SH: tl.constexpr = SHAPE[7]
    SW: tl.constexpr = SHAPE[8]
    PH: tl.constexpr = SHAPE[9]
    PW: tl.constexpr = SHAPE[10]
    DH: tl.constexpr = SHAPE[11]
    DW: tl.constexpr = SHAPE[12]
    HIGH: tl.constexpr = (H + SH - 1) // SH  # positions of a class, at most
    WIDE: tl.constexpr = (W + SW - 1) // SW
    client = tl.program_id(2).to(tl.int64)
    count = tl.load(plan + client * plan_client)
    collected += client * collected_client
    packed += client * packed_client
    dx += client * dx_client
    first_c = tl.program_id(0) // row_tiles * TILE
    if LISTED:
        inputs += client * inputs_client
        listed = tl.load(inputs)
        if (first_c >= listed) & (first_c > 0):
            return
    class_h = tl.program_id(1) // SW
    class_w = tl.program_id(1) % SW
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    c = first_c + tl.arange(0, TILE)
    image = row // (HIGH * WIDE)
    h = row // WIDE % HIGH * SH + class_h
    w = row % WIDE * SW + class_w
    live = (row < total) & (h < H) & (w < W)
    # Taps that meet this class: r = first_r, first_r + STEP_H, ... ; the same for s.
    first_r = class_h * 0 + R
    for i in tl.static_range(STEP_H):
        first_r = tl.where((class_h + PH - i * DH) % SH == 0, i, first_r)
    first_s = class_w * 0 + S
    for i in tl.static_range(STEP_W):
        first_s = tl.where((class_w + PW - i * DW) % SW == 0, i, first_s)
    taps_r = tl.maximum((R - first_r + STEP_H - 1) // STEP_H, 0)
    taps_s = tl.maximum((S - first_s + STEP_W - 1) // STEP_W, 0)
    parts = (count + DEPTH - 1) // DEPTH
    OFFSET: tl.constexpr = tl.int64 if P * Q * CAP >= 2**31 else tl.int32
    base = tl.where(live, image, 0).to(tl.int64) * (P * Q * CAP)
    lane = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, TILE), dtype=tl.float32)
    for step in range(0, taps_r * taps_s * parts):
        tap = step // parts
        k0 = step % parts * DEPTH
        r = first_r + tap // taps_s * STEP_H
        s = first_s + tap % taps_s * STEP_W
        p = (h + PH - r * DH) // SH  # exact within the class
        q = (w + PW - s * DW) // SW
        ok = live & (h + PH - r * DH >= 0) & (p < P) & (w + PW - s * DW >= 0) & (q < Q)
        at = tl.where(ok, base + (p * Q + q).to(OFFSET) * CAP, 0)
        a = tl.load((collected + k0) + at[:, None] + lane[None, :], mask=ok[:, None], other=0.0)
        b = (packed + (tl.cast(k0, tl.int64) * stride + (r * S + s) * C)) + (lane[:, None] * stride + c[None, :])
        if C % TILE == 0:
            b = tl.load(b)
        else:
            b = tl.load(b, mask=(c < C)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    position = (image.to(tl.int64) * H + h) * W + w
    if LISTED:
        # As in the forward pass: the tile owns the channels from its first one to the first one of the next tile.
        index = inputs + HEADER
        start = tl.where(first_c > 0, tl.load(index + first_c), 0)
        more = first_c + TILE < listed
        end = tl.where(more, tl.load(index + tl.where(more, first_c + TILE, 0)), channels)
        spread(
            acc,
            dx,
            dx,
            index + channels,
            first_c,
            start,
            end,
            position,
            live,
            channels,
            False,
            False,
            TILE,
            GROUP,
            ROWS,
        )
    else:
        at = dx + position[:, None] * C + c[None, :]
        tl.store(at, acc.to(dx.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


@triton.jit
def _wgrad_tile(
    x, collected, slab, first, column_tile, lo, hi, stride, x_n, x_h, x_w,
    SHAPE: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    CAP: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """COLUMNS weights of TILE listed filters, summed over output positions [lo, hi)."""
    C: tl.constexpr = SHAPE[0]
    H: tl.constexpr = SHAPE[1]
    W: tl.constexpr = SHAPE[2]
    P: tl.constexpr = SHAPE[3]
    Q: tl.constexpr = SHAPE[4]
    S: tl.constexpr = SHAPE[6]
    N_IN: tl.constexpr = C * SHAPE[5] * S
    OFFSET: tl.constexpr = tl.int64 if MODE[0] else tl.int32
    POINTWISE: tl.constexpr = MODE[1]
    FLAT: tl.constexpr = MODE[2]
    PARTS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    if FLAT:
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < N_IN
        c = column % C
        down = (column // (S * C) * SHAPE[11])[None, :]
        right = (column // C % S * SHAPE[12])[None, :]
    else:
        tap = column_tile // PARTS
        c = column_tile % PARTS * COLUMNS + tl.arange(0, COLUMNS)
        inside = c < C
        column = tap * C + c
        down = tap // S * SHAPE[11]
        right = tap % S * SHAPE[12]
    filters = first + tl.arange(0, TILE)
    lane = tl.arange(0, DEPTH)
    acc = tl.zeros((COLUMNS, TILE), dtype=tl.float32)
    for m0 in range(lo, hi, DEPTH):
        m = m0 + lane
        live = m < hi
        m = tl.where(live, m, 0)
        if POINTWISE:
            ok = live[:, None]
            at = m.to(tl.int64)[:, None] * x_w
        else:
            h = (m // Q % P * SHAPE[7] - SHAPE[9])[:, None] + down
            w = (m % Q * SHAPE[8] - SHAPE[10])[:, None] + right
            ok = live[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            image = (m // (P * Q)).to(tl.int64)[:, None] * x_n
            at = tl.where(ok, image + h.to(OFFSET) * x_h + w.to(OFFSET) * x_w, 0)
        if FLAT or C % COLUMNS != 0:
            ok = ok & inside[None, :]
        a = tl.load(x + at + c[None, :], mask=ok, other=0.0)
        g = (collected + tl.cast(m0, tl.int64) * CAP) + (lane[:, None] * CAP + filters[None, :])
        g = tl.load(g, mask=live[:, None], other=0.0)
        acc = tl.dot(tl.trans(a), g, acc, input_precision=PRECISION)
    tl.store(slab + filters.to(tl.int64)[None, :] * stride + column[:, None], acc, mask=inside[:, None])


@triton.jit
def threshold_wgrad(
    x, collected, slabs, extended, inputs, x_client, collected_client, slabs_client, extended_client, inputs_client,
    total, chunk, stride, x_n, x_h, x_w, column_tiles,
    SHAPE: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    CAP: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows of G of the listed filters, one slab per part of the batch; grid (tiles, parts, clients)."""
    client = tl.program_id(2).to(tl.int64)
    count = tl.load(extended + client * extended_client)
    first = tl.program_id(0) // column_tiles * TILE
    if first >= count:
        return
    column_tile = tl.program_id(0) % column_tiles
    if MODE[3]:
        channels = tl.load(inputs + client * inputs_client)
        if column_tile % (SHAPE[0] // COLUMNS) * COLUMNS >= channels:
            return
    x += client * x_client
    collected += client * collected_client
    slab = slabs + client * slabs_client + tl.program_id(1).to(tl.int64) * CAP * stride
    lo = tl.program_id(1) * chunk
    hi = tl.minimum(lo + chunk, total)
    left = count - first
    if TILE == 64:
        if left <= 16:
            _wgrad_tile(x, collected, slab, first, column_tile, lo, hi, stride, x_n, x_h, x_w,
                        SHAPE, MODE, PRECISION, CAP, COLUMNS, 16, DEPTH)  # fmt: skip
        elif left <= 32:
            _wgrad_tile(x, collected, slab, first, column_tile, lo, hi, stride, x_n, x_h, x_w,
                        SHAPE, MODE, PRECISION, CAP, COLUMNS, 32, DEPTH)  # fmt: skip
        else:
            _wgrad_tile(x, collected, slab, first, column_tile, lo, hi, stride, x_n, x_h, x_w,
                        SHAPE, MODE, PRECISION, CAP, COLUMNS, 64, DEPTH)  # fmt: skip
    elif TILE == 32:
        if left <= 16:
            _wgrad_tile(x, collected, slab, first, column_tile, lo, hi, stride, x_n, x_h, x_w,
                        SHAPE, MODE, PRECISION, CAP, COLUMNS, 16, DEPTH)  # fmt: skip
        else:
            _wgrad_tile(x, collected, slab, first, column_tile, lo, hi, stride, x_n, x_h, x_w,
                        SHAPE, MODE, PRECISION, CAP, COLUMNS, 32, DEPTH)  # fmt: skip
    else:
        _wgrad_tile(x, collected, slab, first, column_tile, lo, hi, stride, x_n, x_h, x_w,
                    SHAPE, MODE, PRECISION, CAP, COLUMNS, TILE, DEPTH)  # fmt: skip


@triton.jit
def threshold_finish(
    weight, bias, slabs, sums, plan, extended, inputs, dw, dtau, dbias,
    weight_client, bias_client, slabs_client, plan_client, extended_client, inputs_client,
    out, n_in, inner, outer, channels, stride,
    HEADER: tl.constexpr, LISTED: tl.constexpr, INPUT_CAP: tl.constexpr, PARTS: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr, MASK_BIAS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of one filter from its row of G, if it has one; grid (filters, clients)."""
    row = tl.program_id(0)
    client = tl.program_id(1).to(tl.int64)
    plan += client * plan_client
    flag = tl.load(plan + HEADER + 2 * out + row)
    position = tl.load(extended + client * extended_client + 1 + out + row)
    listed = position >= 0
    slabs += client * slabs_client + tl.where(listed, position, 0).to(tl.int64) * stride
    weight += client * weight_client + row.to(tl.int64) * n_in
    dw += (client * out + row) * n_in
    inverse = inputs + client * inputs_client + HEADER + channels
    dots = tl.zeros((STEP,), dtype=tl.float32)
    for k0 in range(0, n_in, STEP):
        k = k0 + tl.arange(0, STEP)
        mask = listed & (k < n_in)
        column = k
        if LISTED:
            place = tl.load(inverse + k % channels, mask=mask, other=-1)
            mask = mask & (place >= 0)
            column = k // channels * INPUT_CAP + place
        g = tl.zeros((STEP,), dtype=tl.float32)
        for part in range(0, PARTS):
            g += tl.load(slabs + tl.cast(part, tl.int64) * CAP * stride + column, mask=mask, other=0.0)
        if PARTS > 1:
            tl.store(slabs + column, g, mask=mask)
        w = tl.load(weight + (k % inner) * outer + k // inner, mask=mask, other=0.0).to(tl.float32)
        dots += g * w
    r = tl.sum(dots, 0)
    active = (flag & 1) != 0
    if HAS_BIAS:
        db = tl.load(sums + client * out + row)
        if MASK_BIAS:
            # The mask multiplies the bias too, so the bias is one more weight of the filter. (A filter that is not
            # listed has only zeros in its channel, or an estimator that blocks.)
            r += tl.where(listed, db * tl.load(bias + client * bias_client + row).to(tl.float32), 0.0)
            db = tl.where(active, db, 0.0)
        tl.store(dbias + client * out + row, db.to(dbias.dtype.element_ty))
    r = tl.where((flag & 2) != 0, r, 0.0)
    tl.store(dtau + client * out + row, (0.0 - r).to(dtau.dtype.element_ty))
    tl.debug_barrier()  # the added slabs are read back
    for k0 in range(0, n_in, STEP):
        k = k0 + tl.arange(0, STEP)
        mask = listed & (k < n_in)
        source = (k % inner) * outer + k // inner
        column = k
        there = mask & active
        if LISTED:
            place = tl.load(inverse + k % channels, mask=there, other=-1)
            there = there & (place >= 0)
            column = k // channels * INPUT_CAP + place
        g = tl.load(slabs + column, mask=there, other=0.0)
        w = tl.load(weight + source, mask=mask, other=0.0).to(tl.float32)
        sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
        tl.store(dw + source, (g + r * sign / n_in).to(dw.dtype.element_ty), mask=k < n_in)


def split(total: int, depth: int, tiles: int, slab_bytes: int) -> tuple[int, int]:
    """``(parts, rows per part)`` into which wgrad cuts the batch: enough programs, bounded memory, whole steps."""
    steps = triton.cdiv(total, depth)
    parts = max(1, min(WGRAD_PROGRAMS // max(1, tiles), SLAB_BYTES // max(1, slab_bytes), triton.cdiv(steps, 4)))
    chunk = triton.cdiv(steps, parts) * depth
    return triton.cdiv(total, chunk), chunk


def layer_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    plan: Plan,
    bias: Tensor | None,
    geometry: Geometry,
    mask_bias: bool = False,
    tf32: bool = False,
    need_input: bool = True,
    need_weight: bool = True,
    tile: Tile | None = None,
    input_plan: Plan | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`~spafl_kernels.triton.forward.layer_forward` through the mask, as the definition gives them.

    Args:
        grad: ``dL/dy``, ``(clients, N, out, H', W')``, dtype of ``x``, any strides (also expanded).
        x, packed, plan, bias, geometry, mask_bias, tf32: as in the forward pass.
        weight: ``(clients, out, in[, kH, kW])``, the unmasked weight.
        need_input: whether ``dL/dx`` is wanted.
        need_weight: whether ``dL/dw``, ``dL/dtau`` and ``dL/db`` are wanted.
        tile: for both products, instead of those from the table.
        input_plan: as in the forward pass; ``dx`` and the columns of ``G`` of channels that are not listed are 0.

    Returns:
        ``(dx, dw, dtau, dbias)``: ``(clients, N, C, H, W)`` channels last in the dtype of ``x``; shape, dtype and
        memory order of ``weight``; ``(clients, out)`` in its dtype; ``(clients, out)`` in the dtype of ``bias``. None
        where not wanted (dbias: or no bias).
    """
    clients, n = x.shape[:2]
    g, out, cap = geometry, plan.out, capacity(plan.out)
    high, wide = g.output
    total = n * high * wide
    dx = dw = dtau = dbias = None
    weight = dense_rows(weight)
    if need_input:
        dx = empty_channels_last(clients, n, g.channels, (g.height, g.width), x.dtype, x.device)
    if need_weight:
        dw = like_rows(weight)
        dtau = weight.new_empty(clients, out)
        dbias = None if bias is None else bias.new_empty(clients, out)
    if total == 0 or clients == 0:
        for result in (dx, dw, dtau, dbias):
            if result is not None:
                result.zero_()
        return dx, dw, dtau, dbias
    full, inputs = g, plan.data if input_plan is None else input_plan.data
    if input_plan is not None:
        x, packed, g = restrict(x, packed, input_plan, g)
    else:
        x = channels_last(x)
    kind = arithmetic(x.dtype, tf32)
    blocks = triton.cdiv(total, COLLECT_ROWS)
    partial = sums = extended = plan.data
    if need_weight:
        partial = x.new_empty(clients, blocks, 2, out, dtype=torch.float32)
        sums = x.new_empty(clients, out, dtype=torch.float32)
        extended = x.new_empty(clients, 1 + 2 * out, dtype=torch.int32)

    collected = collect_channels(grad, plan, partial=partial if need_weight else None)
    if need_input:
        assert dx is not None
        t = tile or choose("dgrad", kind, total)
        columns = min(t.filters, max(16, power_of_two(g.channels)))
        positions = n * triton.cdiv(g.height, g.stride[0]) * triton.cdiv(g.width, g.stride[1])
        row_tiles = triton.cdiv(positions, t.rows)
        threshold_dgrad[
            (row_tiles * triton.cdiv(g.channels, columns), g.stride[0] * g.stride[1], clients)
        ](
            collected, packed, dx, plan.data, inputs, collected.stride(0), packed.stride(0), dx.stride(0),
            plan.data.stride(0), inputs.stride(0), positions, row_stride(g.n_in), full.channels, row_tiles,
            HEADER=HEADER, LISTED=input_plan is not None, GROUP=min(64, max(16, power_of_two(full.channels))),
            SHAPE=g.shape, STEP_H=g.step[0], STEP_W=g.step[1], PRECISION=precision(kind), CAP=cap, ROWS=t.rows,
            TILE=columns, DEPTH=min(t.depth, cap), num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    if need_weight:
        assert dw is not None and dtau is not None
        order = row_order(weight.shape[1:], weight.stride()[1:])
        assert order is not None
        threshold_extend[(1, clients)](
            partial, sums, plan.data, extended, partial.stride(0), sums.stride(0), plan.data.stride(0),
            extended.stride(0), blocks, out, HEADER=HEADER, ROWS=32, COLUMNS=min(64, cap), num_warps=4,
        )  # fmt: skip
        collect_channels(grad, plan, extended, into=collected)
        line = row_step(x)
        pointwise = g.pointwise and line is not None
        taps, stride = g.kernel[0] * g.kernel[1], row_stride(g.n_in)
        t = tile or choose("wgrad", kind, g.n_in)
        columns = min(t.rows, max(16, power_of_two(g.n_in) if input_plan is None else g.channels))
        filters = min(t.filters, cap)
        per_tap = taps * triton.cdiv(g.channels, columns)
        flat = input_plan is None and taps > 1 and 2 * triton.cdiv(g.n_in, columns) <= per_tap
        column_tiles = triton.cdiv(g.n_in, columns) if flat else per_tap
        tiles = column_tiles * triton.cdiv(out, filters)
        parts, chunk = split(total, t.depth, tiles * clients, clients * cap * stride * 4)
        slabs = x.new_empty(clients, parts, cap, stride, dtype=torch.float32)
        threshold_wgrad[(tiles, parts, clients)](
            x, collected, slabs, extended, inputs, x.stride(0), collected.stride(0), slabs.stride(0),
            extended.stride(0), inputs.stride(0), total, chunk, stride, x.stride(1), x.stride(2), line if pointwise else x.stride(3), column_tiles,
            SHAPE=g.shape, MODE=(is_wide(x), pointwise, flat, input_plan is not None), PRECISION=precision(kind), CAP=cap,
            COLUMNS=columns, TILE=filters, DEPTH=t.depth, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        threshold_finish[(out, clients)](
            weight, weight if bias is None else bias, slabs, sums, plan.data, extended, inputs, dw, dtau,
            dtau if dbias is None else dbias,
            weight.stride(0), 0 if bias is None else bias.stride(0), slabs.stride(0), plan.data.stride(0),
            extended.stride(0), inputs.stride(0), out, full.n_in, order[0], order[1], full.channels, stride,
            HEADER=HEADER, LISTED=input_plan is not None, INPUT_CAP=capacity(full.channels), PARTS=parts, CAP=cap, HAS_BIAS=bias is not None, MASK_BIAS=mask_bias,
            STEP=min(FINISH_STEP, max(16, power_of_two(full.n_in))), num_warps=4,
        )  # fmt: skip
    return dx, dw, dtau, dbias

"""Gradients of weights, thresholds and biases, from rows of ``G = dL/dW~`` of the filters that need one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..geometry import Geometry, Memory, Positions, client_step, row_order
from ..packing import HEADER, capacity, row_stride
from .bounds import within
from .collect import GROUP, Statistics, collecting
from .launch import Launch
from .lookback import LANES, WARPS, look_back
from .narrowest import narrowest
from .tiles import Tile, arithmetic, choose, filters_of, power_of_two, precision

EXTEND_ROWS = 256  # blocks of rows that are added up at once
FINISH_STEP = 1024  # columns of slabs that are added at once, at most
# Programs that the split of the batch aims at (four for each multiprocessor of a large GPU, so that slabs stay below 35
# MB), and the steps that each takes at least: fewer would cost more in adding up their slabs than they save.
PROGRAMS, LEAST_STEPS = 528, 8


@triton.jit(do_not_specialize=["blocks"])
def threshold_extend(
    partial, sums, words, selection, extended, partial_client, sums_client, selection_client, extended_client,
    blocks, out, groups,
    HEADER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Channel sums, and the list of filters whose row of the weight gradient is needed; grid (groups * clients).

    ``extended``: count, the extra filters at their positions in the list, and the position of every filter or -1.
    Each program has COLUMNS channels. ``words``: see :class:`~.collect.Statistics`; the last one counts tickets.
    """
    ticket = tl.atomic_add(words + tl.num_programs(0), 1, sem="relaxed")
    client = (ticket // groups).to(tl.int64)
    group = ticket % groups
    partial += client * partial_client
    selection += client * selection_client
    extended += client * extended_client
    flags = selection + HEADER + 2 * out
    inverse = selection + HEADER + out
    c = group * COLUMNS + tl.arange(0, COLUMNS)
    live = c < out
    column = within(c, live)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    nonzero = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, blocks, ROWS):
        b = first + tl.arange(0, ROWS)
        mask = (b < blocks)[:, None] & live[None, :]
        at = partial + tl.where(b < blocks, b, 0).to(tl.int64)[:, None] * 2 * out + column[None, :]
        total += tl.load(at, mask=mask, other=0.0)
        nonzero = tl.maximum(nonzero, tl.load(at + out, mask=mask, other=0.0))
    tl.store(sums + client * sums_client + c, tl.sum(total, 0), mask=live)
    flag = tl.load(flags + column, mask=live, other=0)
    position = tl.load(inverse + column, mask=live, other=-1)
    extra = (live & (position < 0) & ((flag & 2) != 0) & (tl.max(nonzero, 0) > 0)).to(tl.int32)
    count = tl.sum(extra, 0)
    before, _ = look_back(words + client * groups, group, count, (count > 0).to(tl.int32), LANES)
    before += tl.load(selection)
    at = before + tl.cumsum(extra, 0) - extra
    tl.store(extended + 1 + at, c, mask=extra > 0)
    where = tl.where(extra > 0, at, position)
    tl.store(extended + 1 + out + c, where, mask=live)
    if group == groups - 1:
        tl.store(extended, before + count)


@triton.jit
def _wgrad_tile(
    x, collected, slab, first, column_tile, lo, hi, stride, x_n, x_h, x_w,
    CAP: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SHAPE: tl.constexpr, MODE: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr,
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
    if FLAT or C % COLUMNS == 0:
        inner = c
    else:
        inner = within(c, inside)
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
        a = tl.load(x + at + inner[None, :], mask=ok, other=0.0)
        row = tl.where(live, lane, 0)
        g = (collected + tl.minimum(m0, hi - 1).to(tl.int64) * CAP) + (row[:, None] * CAP + filters[None, :])
        g = tl.load(g, mask=live[:, None], other=0.0)
        acc = tl.dot(tl.trans(a), g, acc, input_precision=PRECISION)
    tl.store(slab + filters.to(tl.int64)[None, :] * stride + column[:, None], acc, mask=inside[:, None])


@triton.jit(do_not_specialize=["total", "steps"])
def threshold_wgrad(
    x, collected, slabs, extended, inputs, x_client, collected_client, slabs_client, extended_client, inputs_client,
    total, steps, stride, x_n, x_h, x_w, column_tiles,
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
    lo = tl.program_id(1) * steps * DEPTH
    hi = tl.minimum(lo + steps * DEPTH, total)
    args = x, collected, slab, first, column_tile, lo, hi, stride, x_n, x_h, x_w
    narrowest(_wgrad_tile, args, count - first, CAP, COLUMNS, DEPTH, SHAPE, MODE, PRECISION, TILE)


@triton.jit(do_not_specialize=["parts"])
def threshold_finish(
    weight, bias, slabs, sums, selection, extended, inputs, dw, dtau, dbias,
    weight_client, bias_client, slabs_client, selection_client, extended_client, inputs_client,
    out, n_in, inner, outer, channels, stride, parts,
    HEADER: tl.constexpr, LISTED: tl.constexpr, INPUT_CAP: tl.constexpr, CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK_BIAS: tl.constexpr, STEP: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Gradients of one filter from its row of G, if it has one; grid (filters, clients)."""
    row = tl.program_id(0)
    client = tl.program_id(1).to(tl.int64)
    selection += client * selection_client
    flag = tl.load(selection + HEADER + 2 * out + row)
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
        k = within(k, k < n_in)
        column = k
        if LISTED:
            place = tl.load(inverse + k % channels, mask=mask, other=-1)
            mask = mask & (place >= 0)
            column = k // channels * INPUT_CAP + tl.maximum(place, 0)
        if parts == 1:
            g = tl.load(slabs + column, mask=mask, other=0.0)
        else:
            total = tl.zeros((DEEP, STEP), dtype=tl.float32)
            for first in range(0, parts, DEEP):
                part = first + tl.arange(0, DEEP)
                there = part < parts
                at = slabs + tl.where(there, part, 0).to(tl.int64)[:, None] * (CAP * stride) + column[None, :]
                total += tl.load(at, mask=there[:, None] & mask[None, :], other=0.0)
            g = tl.sum(total, 0)
            tl.store(slabs + column, g, mask=mask)
        w = tl.load(weight + (k % inner) * outer + k // inner, mask=mask, other=0.0).to(tl.float32)
        dots += g * w
    r = tl.sum(dots, 0)
    active = (flag & 1) != 0
    if HAS_BIAS:
        db = tl.load(sums + client * out + row)
        if MASK_BIAS:
            # The mask multiplies the bias too, so the bias is one more weight of the filter.
            r += db * tl.load(bias + client * bias_client + row).to(tl.float32)
            db *= active.to(tl.float32)
        tl.store(dbias + client * out + row, db.to(dbias.dtype.element_ty))
    r = tl.where((flag & 2) != 0, r, r * 0.0)  # NaN stays NaN
    tl.store(dtau + client * out + row, (0.0 - r).to(dtau.dtype.element_ty))
    tl.debug_barrier()  # the added slabs are read back
    for k0 in range(0, n_in, STEP):
        k = k0 + tl.arange(0, STEP)
        exists = k < n_in
        mask = listed & exists
        k = within(k, exists)
        source = (k % inner) * outer + k // inner
        column = k
        there = mask & active
        if LISTED:
            place = tl.load(inverse + k % channels, mask=there, other=-1)
            there = there & (place >= 0)
            column = k // channels * INPUT_CAP + tl.maximum(place, 0)
        g = tl.load(slabs + column, mask=there, other=0.0)
        w = tl.load(weight + source, mask=mask, other=0.0).to(tl.float32)
        sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
        tl.store(dw + source, (g + r * sign / n_in).to(dw.dtype.element_ty), mask=exists)


def split(total: int, depth: int, tiles: int) -> tuple[int, int]:
    """``(parts, steps per part)`` into which wgrad cuts the batch: enough programs, whole steps of ``depth`` rows."""
    steps = triton.cdiv(total, depth)
    parts = max(1, min(PROGRAMS // max(1, tiles), triton.cdiv(steps, LEAST_STEPS)))
    each = triton.cdiv(steps, parts)
    return triton.cdiv(steps, each), each


class Scratch(NamedTuple):
    """Memory that the launches pass on."""

    partial: Memory
    words: Memory
    sums: Memory
    slabs: Memory


class WeightGradients(NamedTuple):
    """The launches behind collecting ``dL/dy``.

    ========  ==========================================================================
    extend    ``(partial, sums, words, selection, extended)``
    extra     as for collecting, with ``extended``
    product   ``(x, collected, slabs, extended, inputs)``
    finish    ``(weight, bias, slabs, sums, selection, extended, inputs, dw, dtau, dbias)``
    ========  ==========================================================================
    """

    scratch: Scratch
    extend: Launch
    extra: Launch
    product: Launch
    finish: Launch


def weight_gradients(
    grad: tuple[Sequence[int], Sequence[int]], statistics: Statistics, x: Positions,
    weight: tuple[Sequence[int], Sequence[int]], dtype: torch.dtype, bias: int | None, geometry: Geometry,
    channels: int, mask_bias: bool, tf32: bool, tile: Tile | None, device: torch.device, selection: int,
    inputs: int | None,
) -> WeightGradients:  # fmt: skip
    """The launches for ``dw``, ``dtau`` and ``dbias``.

    Args:
        grad: shape and strides of ``dL/dy``.
        statistics: what collecting leaves behind.
        x: where its positions lie; with a selection of the input, x and geometry are those of its list.
        weight: shape and strides; rows are dense.
        dtype, device: of ``x``.
        bias, selection, inputs: distances between clients in the bias, the selection, and the selection of the input.
        channels: of the input, listed or not.
    """
    shape, strides = weight
    order = row_order(shape[1:], strides[1:])
    assert order is not None
    g, listed, (clients, n, out, high, wide) = geometry, inputs is not None, grad[0]
    cap, taps, stride, n_in = capacity(out), g.kernel[0] * g.kernel[1], row_stride(g.n_in), math.prod(shape[2:])
    total, listing, inputs = n * high * wide, 1 + 2 * out, selection if inputs is None else inputs
    extend = Launch(
        threshold_extend,
        (statistics.groups * clients,),
        (statistics.client, out, selection, listing, statistics.blocks, out, statistics.groups),
        {"HEADER": HEADER, "ROWS": EXTEND_ROWS, "COLUMNS": GROUP, "LANES": LANES, "num_warps": WARPS},
    )

    kind, pointwise = arithmetic(dtype, tf32), g.pointwise and x.line is not None
    tile = tile or choose("wgrad", kind, g, out, n, device, listed=listed)
    columns = min(tile.rows, max(16, g.channels if listed else power_of_two(g.n_in)))
    filters = filters_of(tile, cap)
    narrow = min(columns, 64)  # addresses of single channels cost the registers of a wider tile
    flat = not listed and taps > 1 and 2 * triton.cdiv(g.n_in, narrow) <= taps * triton.cdiv(g.channels, narrow)
    columns = narrow if flat else columns
    column_tiles = triton.cdiv(g.n_in, columns) if flat else taps * triton.cdiv(g.channels, columns)
    tiles = column_tiles * triton.cdiv(out, filters)
    parts, steps = split(total, tile.depth, tiles * clients)
    slabs = (clients, parts, cap, stride)
    product = Launch(
        threshold_wgrad,
        (tiles, parts, clients),
        (
            x.client, client_step(clients, total * cap), client_step(clients, math.prod(slabs[1:])), listing, inputs,
            total, steps, stride, x.image, x.row, x.step(pointwise), column_tiles,
        ),
        {
            "SHAPE": g.shape, "MODE": (x.wide, pointwise, flat, listed), "PRECISION": precision(kind), "CAP": cap,
            "COLUMNS": columns, "TILE": filters, "DEPTH": tile.depth, "num_warps": tile.warps,
            "num_stages": tile.stages,
        },
    )  # fmt: skip
    step = min(FINISH_STEP, max(16, power_of_two(n_in)))
    # Many slabs of long rows are worth 16 warps; where there are few for any batch, smaller programs fill the device.
    warps = 16 if step > 512 and PROGRAMS // (tiles * clients) > 4 else 8
    finish = Launch(
        threshold_finish,
        (out, clients),
        (
            strides[0], 0 if bias is None else bias, client_step(clients, math.prod(slabs[1:])), selection, listing,
            inputs, out, n_in, *order, channels, stride, parts,
        ),
        {
            "HEADER": HEADER, "LISTED": listed, "INPUT_CAP": capacity(channels), "CAP": cap,
            "HAS_BIAS": bias is not None, "MASK_BIAS": mask_bias,
            "STEP": step, "DEEP": 512 * warps // step, "num_warps": warps,
        },
    )  # fmt: skip
    extra = collecting(*grad, selection, extended_client=listing)
    scratch = Scratch(
        statistics.partial,
        statistics.words,
        Memory.dense((clients, out), torch.float32),
        Memory.dense(slabs, torch.float32),
    )
    return WeightGradients(scratch, extend, extra, product, finish)

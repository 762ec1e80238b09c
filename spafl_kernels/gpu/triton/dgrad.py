"""dL/dx: a product reduced over active filters only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..geometry import Geometry, client_step
from ..packing import HEADER, capacity, row_stride
from .bounds import last_of, within
from .forward import spread
from .launch import Launch
from .tiles import Tile, arithmetic, choose, power_of_two, precision, rows_of


@triton.jit(do_not_specialize=["total", "row_tiles"])
def threshold_dgrad(
    collected, packed, dx, selection, inputs, collected_client, packed_client, dx_client, selection_client,
    inputs_client, total, stride, channels, row_tiles,
    HEADER: tl.constexpr, LISTED: tl.constexpr, GROUP: tl.constexpr, SHAPE: tl.constexpr, STEP_H: tl.constexpr,
    STEP_W: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr, PIECE: tl.constexpr, FAR: tl.constexpr,
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
    count = tl.load(selection + client * selection_client)
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
    down = row // WIDE % HIGH  # within the class
    right = row % WIDE
    h = down * SH + class_h
    w = right * SW + class_w
    live = row < total
    if H % SH != 0:  # not every class has the last of its positions
        live = live & (h < H)
    if W % SW != 0:
        live = live & (w < W)
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
    steps = taps_r * taps_s * parts
    # Where there are no steps, too, these divide and make an address.
    parts, taps_s = tl.maximum(parts, 1), tl.maximum(taps_s, 1)
    first_r, first_s = tl.minimum(first_r, R - 1), tl.minimum(first_s, S - 1)
    OFFSET: tl.constexpr = tl.int64 if FAR else tl.int32  # of rows: registers are scarce here
    base = tl.where(live, image, 0).to(OFFSET) * (P * Q * CAP)
    lane = tl.arange(0, DEPTH)
    column = c if C % TILE == 0 else within(c, c < C)
    acc = tl.zeros((ROWS, TILE), dtype=tl.float32)
    for i in range(0, steps):
        step = last_of(i, steps)
        tap = step // parts
        k0 = step % parts * DEPTH
        r = first_r + tap // taps_s * STEP_H
        s = first_s + tap % taps_s * STEP_W
        p = down + (class_h + PH - r * DH) // SH  # exact within the class
        q = right + (class_w + PW - s * DW) // SW
        ok = live & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        at = tl.where(ok, base + (p * Q + q).to(OFFSET) * CAP, 0)
        a = (collected + k0) + at[:, None] + lane[None, :]
        if PIECE > 0:
            a = tl.max_contiguous(a, [1, PIECE])
        a = tl.load(a, mask=ok[:, None], other=0.0)
        b = (packed + (tl.cast(k0, tl.int64) * stride + (r * S + s) * C)) + (lane[:, None] * stride + column[None, :])
        if C % TILE == 0:
            b = tl.load(b)
        else:
            b = tl.load(b, mask=(c < C)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if SH == 1 and SW == 1:
        position = row.to(tl.int64)  # one class of all positions: as they are counted
    else:
        position = ((image.to(OFFSET) * H + h) * W + w).to(tl.int64)
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


def input_gradient(
    clients: int, n: int, out: int, geometry: Geometry, channels: int, dtype: torch.dtype, tf32: bool,
    tile: Tile | None, device: torch.device, packed: int, selection: int, inputs: int | None,
) -> Launch:  # fmt: skip
    """The launch over ``(collected, packed, dx, selection, inputs)`` that writes ``dL/dx``, stored channels last.

    ``collected`` holds dL/dy of the active filters. With a selection of the input, packed and geometry are those of its
    list, and channels that are not listed get 0.

    Args:
        clients, n: of the batch; the launch is for ``dx`` of ``(clients, n, channels, H, W)``.
        dtype, device: of ``dx``.
        packed, selection, inputs: distances between clients in the packed weights, the selection, and the selection of
            the input.
    """
    g, cap, listed = geometry, capacity(out), inputs is not None
    kind = arithmetic(dtype, tf32)
    rows = rows_of("dgrad", g, n)
    tile = tile or choose("dgrad", kind, g, out, n, device, listed=listed)
    # With a list the epilogue spreads the tile: 128 columns of it took all registers and spilled.
    columns = min(tile.filters, max(16, power_of_two(g.channels)), 64 if listed else 256)
    row_tiles = triton.cdiv(rows, tile.rows)
    high, wide = g.output
    return Launch(
        threshold_dgrad,
        (row_tiles * triton.cdiv(g.channels, columns), g.stride[0] * g.stride[1], clients),
        (
            client_step(clients, n * high * wide * cap), packed,
            client_step(clients, n * channels * g.height * g.width), selection, selection if inputs is None else inputs,
            rows, row_stride(g.n_in), channels, row_tiles,
        ),
        {
            "HEADER": HEADER, "LISTED": listed, "GROUP": min(64, max(16, power_of_two(channels))), "SHAPE": g.shape,
            "STEP_H": g.step[0], "STEP_W": g.step[1], "PRECISION": precision(kind), "CAP": cap, "ROWS": tile.rows,
            "TILE": columns, "DEPTH": min(tile.depth, cap), "PIECE": tile.piece(dtype),
            # Half of what an int32 holds: lanes that are masked off are up to an image further.
            "FAR": n * max(high * wide * cap, g.height * g.width) >= 2**30, "num_warps": tile.warps,
            "num_stages": tile.stages,
        },
    )  # fmt: skip

"""Forward of linear and convolution layers: a matrix product over the packed active filters only.

The grid covers all filters, for its size may not depend on a count that lives on the device; programs behind the count
return at once. Packed filters are in ascending order, so a tile of them owns a range of output channels: from its first
filter to the first filter of the next tile. The epilogue spreads the tile over that range and writes zeros (or the
bias) between, which makes every output element written exactly once, without a scatter and without a memset.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...executed import counting, note
from ..geometry import Geometry, Memory, channels_last, channels_last_strides, client_step, needs_copy, positions
from ..packing import HEADER, Selection, capacity, row_stride
from ..tables import tiles as measured
from .bounds import last_of, within
from .collect import collect_channels
from .device import on_device_of_first
from .launch import REMEMBERED, Launch, current_stream
from .narrowest import narrowest
from .tiles import Tile, arithmetic, choose, filters_of, power_of_two, precision


@triton.jit
def spread(
    acc, y, bias, inverse, first, start, end, rows, live, out,
    HAS_BIAS: tl.constexpr, MASK_BIAS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write output channels [start, end): column ``inverse - first`` of ``acc``, zero if there is none, plus the bias.

    With a masked bias the flags of a selection lie behind ``inverse``.
    """
    target = y + rows.to(tl.int64)[:, None] * out
    for c0 in range(start // GROUP * GROUP, end, GROUP):
        c = c0 + tl.arange(0, GROUP)
        at = within(c, c < out)
        position = tl.load(inverse + at, mask=c < out, other=-1)
        column = position - first
        kept = (column >= 0) & (column < TILE)
        column = tl.where(kept, column, 0)
        value = tl.gather(acc, tl.broadcast_to(column[None, :], (ROWS, GROUP)), axis=1)
        value = tl.where(kept[None, :], value, 0.0)
        if HAS_BIAS:
            b = tl.load(bias + at, mask=c < out, other=0.0).to(tl.float32)
            if MASK_BIAS:  # a product, for 0 * NaN is NaN in the definition
                b *= (tl.load(inverse + out + at, mask=c < out, other=0) & 1).to(tl.float32)
            value += b[None, :]
        value = value.to(y.dtype.element_ty)
        # Two stores, because a bound on single channels would forbid wide stores for the common whole group.
        if (c0 >= start) & (c0 + GROUP <= end):
            tl.store(target + c[None, :], value, mask=live[:, None])
        else:
            tl.store(target + c[None, :], value, mask=live[:, None] & ((c >= start) & (c < end))[None, :])


@triton.jit
def _forward_tile(
    x, packed, bias, y, inverse, first, count, channels, start, end, rows, total, out, stride, x_n, x_h, x_w,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, SHAPE: tl.constexpr, MODE: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE packed filters from ``first`` on, for ROWS output positions."""
    C: tl.constexpr = SHAPE[0]
    H: tl.constexpr = SHAPE[1]
    W: tl.constexpr = SHAPE[2]
    P: tl.constexpr = SHAPE[3]
    Q: tl.constexpr = SHAPE[4]
    R: tl.constexpr = SHAPE[5]
    S: tl.constexpr = SHAPE[6]
    OFFSET: tl.constexpr = tl.int64 if MODE[0] else tl.int32
    POINTWISE: tl.constexpr = MODE[1]
    FLAT: tl.constexpr = MODE[2]
    LISTED: tl.constexpr = MODE[5]
    PIECE: tl.constexpr = MODE[6]
    live = rows < total
    position = tl.where(live, rows, 0)
    if POINTWISE:
        base = position.to(tl.int64) * x_w
    else:
        base = (position // (P * Q)).to(tl.int64) * x_n
    high = position // Q % P * SHAPE[7] - SHAPE[9]
    wide = position % Q * SHAPE[8] - SHAPE[10]
    filters = tl.arange(0, TILE)
    lane = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, TILE), dtype=tl.float32)
    PARTS: tl.constexpr = (C + DEPTH - 1) // DEPTH  # steps per kernel tap
    if FLAT:
        parts = 1
        steps = tl.cdiv(C * R * S, DEPTH)
    elif LISTED:
        steps = R * S * tl.cdiv(channels, DEPTH)
        parts = tl.maximum(tl.cdiv(channels, DEPTH), 1)  # it divides
    else:
        parts = PARTS
        steps = R * S * PARTS
    for i in range(0, tl.where(count > 0, steps, 0)):
        if FLAT:
            k = i * DEPTH + tl.arange(0, DEPTH)
            h = high[:, None] + (k // (S * C) * SHAPE[11])[None, :]
            w = wide[:, None] + (k // C % S * SHAPE[12])[None, :]
            ok = live[:, None] & (k < C * R * S)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = tl.where(ok, base[:, None] + h.to(OFFSET) * x_h + w.to(OFFSET) * x_w + (k % C)[None, :], 0)
            a = tl.load(x + at, mask=ok, other=0.0)
            b = packed + first.to(tl.int64) * stride + filters[:, None] * stride
            b = tl.load(b + within(k, k < stride)[None, :], mask=(k < stride)[None, :], other=0.0)
        else:
            step = last_of(i, steps)
            tap = step // parts
            c0 = step % parts * DEPTH
            if POINTWISE:
                ok = live
                at = base
            else:
                h = high + tap // S * SHAPE[11]
                w = wide + tap % S * SHAPE[12]
                ok = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                at = tl.where(ok, base + (h.to(OFFSET) * x_h + w.to(OFFSET) * x_w), 0)
            # Scalars are added to the pointer first: they stay out of the per-element address arithmetic.
            if C % DEPTH == 0:
                c = lane
            else:
                c = within(lane, c0 + lane < C)
            a = (x + c0) + at[:, None] + c[None, :]
            if PIECE > 0:
                a = tl.max_contiguous(a, [1, PIECE])
            b = (packed + (first.to(tl.int64) * stride + tap * C + c0)) + filters[:, None] * stride + c[None, :]
            if C % DEPTH == 0:
                a = tl.load(a, mask=ok[:, None], other=0.0)
                b = tl.load(b)
            else:
                a = tl.load(a, mask=ok[:, None] & (c0 + lane < C)[None, :], other=0.0)
                b = tl.load(b, mask=(c0 + lane < C)[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    spread(acc, y, bias, inverse, first, start, end, rows, live, out, MODE[3], MODE[4], TILE, GROUP, ROWS)


@triton.jit(do_not_specialize=["total", "row_tiles"])
def threshold_forward(
    x, packed, bias, y, selection, inputs, x_client, packed_client, bias_client, y_client, selection_client,
    inputs_client, total, out, stride, x_n, x_h, x_w, row_tiles,
    HEADER: tl.constexpr, SHAPE: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``y = conv(x, packed) + bias`` in dense layout; grid (row tiles * filter tiles, clients)."""
    client = tl.program_id(1).to(tl.int64)
    selection += client * selection_client
    count = tl.load(selection)
    # Filter tiles vary slowest: all programs with work come first, those behind the count last.
    first = tl.program_id(0) // row_tiles * TILE
    if (first >= count) & (first > 0):
        return
    x += client * x_client
    packed += client * packed_client
    bias += client * bias_client
    y += client * y_client
    channels = SHAPE[0]
    if MODE[5]:
        channels = tl.load(inputs + client * inputs_client)
    index = selection + HEADER
    inverse = index + out
    rows = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    start = tl.where(first > 0, tl.load(index + first), 0)
    more = first + TILE < count
    end = tl.where(more, tl.load(index + tl.where(more, first + TILE, 0)), out)
    args = x, packed, bias, y, inverse, first, count, channels, start, end, rows, total, out, stride, x_n, x_h, x_w
    narrowest(_forward_tile, args, count - first, ROWS, DEPTH, GROUP, SHAPE, MODE, PRECISION, TILE)


@triton.jit
def threshold_pack_columns(
    packed, narrow, inputs, packed_client, narrow_client, inputs_client, stride, channels, taps,
    HEADER: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One packed row with the columns of listed input channels only, side by side per tap; grid (rows, clients)."""
    client = tl.program_id(1).to(tl.int64)
    inputs += client * inputs_client
    count = tl.load(inputs)
    packed += client * packed_client + tl.program_id(0).to(tl.int64) * stride
    narrow += client * narrow_client + tl.program_id(0).to(tl.int64) * taps * CAP
    lane = tl.arange(0, CAP if CAP < 64 else 64)
    for c0 in range(0, CAP, CAP if CAP < 64 else 64):
        listed = c0 + lane < count
        channel = tl.load(inputs + HEADER + tl.where(listed, c0 + lane, 0), mask=listed, other=0)
        for tap in range(0, taps):
            part = tl.load(packed + tap * channels + channel, mask=listed, other=0.0)
            tl.store(narrow + tap * CAP + c0 + lane, part)


def restrict(
    x: Tensor, packed: Tensor, input_selection: Selection, geometry: Geometry
) -> tuple[Tensor, Tensor, Geometry]:
    """Input and packed weights with the listed input channels side by side, so that products stop behind them.

    A copy of the listed channels is the price: one read of ``x`` (whole memory sectors) and one write of the listed
    part, where the product reads ``x`` once per kernel tap and tile of filters. Gathering inside the product would cost
    the wide loads of its inner loop.

    Returns:
        ``(clients, N, capacity(C), H, W)``, channels last (zeros behind the list up to a whole tile, the rest
        unwritten), the weights
        ``(clients, capacity(out), kH * kW * capacity(C))``, and the geometry with ``capacity(C)`` channels.
    """
    clients, n, channels, high, wide = x.shape
    if input_selection.out != channels or input_selection.data.shape[0] != clients:
        raise ValueError(
            f"input_selection must be over {channels} channels of {clients} clients; it is over "
            f"{input_selection.out} of {input_selection.data.shape[0]}"
        )
    cap, taps, data = capacity(channels), geometry.kernel[0] * geometry.kernel[1], input_selection.data
    listed = collect_channels(x, input_selection).view(clients, n, high, wide, cap).permute(0, 1, 4, 2, 3)
    narrow = packed.new_empty(clients, packed.shape[1], taps * cap)
    threshold_pack_columns[(packed.shape[1], clients)](
        packed, narrow, data, packed.stride(0), narrow.stride(0), data.stride(0), packed.shape[2], channels, taps,
        HEADER=HEADER, CAP=cap, num_warps=4,
    )  # fmt: skip
    return listed, narrow, dataclasses.replace(geometry, channels=cap)


def flat_is_better(channels: int, taps: int, depth: int) -> bool:
    """Whether to walk taps and channels as one dimension: wider loads are lost, but fewer padded steps are made."""
    per_tap = taps * -(-channels // depth)
    return taps > 1 and 2 * -(-taps * channels // depth) <= per_tap


@dataclasses.dataclass(frozen=True)
class Forward:
    """The forward pass of given sizes, see :func:`layer_forward`."""

    y: Memory
    device: torch.device
    # None: there is nothing to compute.
    launch: Launch | None
    copy: bool
    # Multiply-accumulates of a filter and input channel; how many channels there are, None where a list says it.
    cost: int
    channels: int | None
    # Keeps the table of tiles alive whose identity is one of the facts.
    table: Any

    def of_one_client(self, linear: bool) -> Forward:
        """The same with tensors that lack the client dimension; linear: input and result are matrices."""
        return dataclasses.replace(self, y=self.y.part(slice(1, 3 if linear else None)))

    def run(
        self, stream: int | None, x: Tensor, packed: Tensor, bias: Tensor | None, selection: Tensor, inputs: Tensor
    ) -> Tensor:
        """The output; ``inputs``: the selection of the input, or the selection again."""
        size, strides, dtype = self.y
        y = torch.empty_strided(size, strides, dtype=dtype, device=self.device)
        if self.launch is not None:
            if counting():
                listed = inputs[..., 0].reshape(-1)
                note(selection[..., 0].reshape(-1), self.cost, listed if self.channels is None else self.channels)
            x = channels_last(x) if self.copy else x
            self.launch(stream, x, packed, x if bias is None else bias, y, selection, inputs)
        return y


@functools.lru_cache(REMEMBERED)
def prepare(
    shape: tuple[int, ...], strides: tuple[int, ...], dtypes: tuple[torch.dtype, ...], packed: int, selection: int,
    inputs: int | None,
    bias: tuple[torch.dtype, int] | None, out: int, geometry: Geometry, mask_bias: bool, tf32: bool, tile: Tile | None,
    device: torch.device, table: int,
) -> Forward:  # fmt: skip
    """The pass by everything that its launch depends on.

    Args:
        shape, strides, device: of x.
        dtypes: of x, the packed weights and the selection.
        packed, selection, inputs: distances between clients in the packed weights, the selection, and the selection of
            the input.
        bias: its dtype and the distance between clients.
        table: identity of the table of measured tiles.
    """
    clients, n, g, at, dtype = shape[0], shape[1], geometry, positions(shape, strides), dtypes[0]
    high, wide = g.output
    size, memory = (clients, n, out, high, wide), channels_last_strides(out, high, wide, n)
    total = n * high * wide
    if total == 0 or clients == 0:
        return Forward(Memory(size, memory, dtype), device, None, False, 0, None, None)
    if max(total, n * g.height * g.width) >= 2**31:
        raise ValueError(f"x must have fewer than 2**31 positions per client; got N={n}, {(g.height, g.width)} pixels")
    listed = inputs is not None
    kind = arithmetic(dtype, tf32)
    tile = tile or choose("forward", kind, g, out, n, device, listed=listed)
    filters = filters_of(tile, capacity(out))
    depth = max(16, min(tile.depth, g.channels if listed else power_of_two(g.n_in)))
    flat = not listed and flat_is_better(g.channels, g.kernel[0] * g.kernel[1], depth)
    depth = min(depth, 32) if flat else depth
    pointwise = g.pointwise and at.line is not None
    # Masks and addresses of single channels cost registers: with 128 rows LeNet-5's second layer spilled in tf32, and
    # so did strided 1x1 convolutions of sm_80, whose few steps are unrolled.
    unrolled = kind == "tf32" and g.kernel == (1, 1) and not pointwise
    rows = min(tile.rows, 64) if flat or unrolled or g.channels % depth else tile.rows
    row_tiles = triton.cdiv(total, rows)
    launch = Launch(
        threshold_forward,
        (row_tiles * triton.cdiv(out, filters), clients),
        (
            at.client, packed, 0 if bias is None else bias[1], client_step(clients, memory[0]), selection,
            selection if inputs is None else inputs, total, out, row_stride(g.n_in), at.image, at.row,
            at.step(pointwise), row_tiles,
        ),
        {
            "HEADER": HEADER, "SHAPE": g.shape,
            "MODE": (at.wide, pointwise, flat, bias is not None, mask_bias, listed, tile.piece(dtype)),
            "PRECISION": precision(kind), "ROWS": rows, "TILE": filters, "DEPTH": depth,
            "GROUP": min(64, max(16, power_of_two(out))), "num_warps": tile.warps, "num_stages": tile.stages,
        },
    )  # fmt: skip
    return Forward(
        Memory(size, memory, dtype), device, launch, needs_copy(shape, strides), total * math.prod(g.kernel),
        None if listed else g.channels, measured.of(device),
    )  # fmt: skip


@on_device_of_first
def layer_forward(
    x: Tensor,
    packed: Tensor,
    selection: Selection,
    bias: Tensor | None,
    geometry: Geometry,
    mask_bias: bool = False,
    tf32: bool = False,
    tile: Tile | None = None,
    input_selection: Selection | None = None,
) -> Tensor:
    """Convolution of every client's input by that client's active filters; pruned outputs are 0 (plus bias).

    Args:
        x: ``(clients, N, C, H, W)``, float32, float16 or bfloat16; read in place if the channel stride is 1.
        packed: ``(clients, capacity(out), row_stride(n_in))``, dtype of ``x``.
        selection: of the same layer.
        bias: ``(clients, out)`` of any floating dtype, or None.
        geometry: sizes of the layer.
        mask_bias: leave out the bias of pruned filters.
        tf32: round float32 operands of the product to tf32.
        tile: instead of the measured one, or that of the rule.
        input_selection: selection over the ``C`` input channels, usually that of the layer before: only its active
            channels are read and multiplied, the others count as 0. That is the same function where they are 0 (a ReLU
            or nothing between the layers, no bias of pruned filters); see :func:`restrict` for its price.

    Returns:
        ``(clients, N, out, H', W')`` in channels-last order, dtype of ``x``.
    """
    inputs, device, data = None, x.device, selection.data
    bias = None if bias is None else bias.contiguous()
    if input_selection is not None and x.numel() > 0:
        x, packed, geometry = restrict(x, packed, input_selection, geometry)
        inputs = input_selection.data
    made = prepare(
        x.shape, x.stride(), (x.dtype, packed.dtype, data.dtype), packed.stride(0), data.stride(0),
        None if inputs is None else inputs.stride(0), None if bias is None else (bias.dtype, bias.stride(0)),
        selection.out, geometry, mask_bias, tf32, tile, device, id(measured.of(device)),
    )  # fmt: skip
    return made.run(current_stream(x.get_device()), x, packed, bias, data, data if inputs is None else inputs)

"""Backward of linear and convolution layers, over the filters that can have a gradient and over nothing else.

Steps, each a launch without the host:

1. *collect*: read ``dL/dy`` once, in any layout; write the channels of active filters next to each other (both products
   below would otherwise gather channels in their inner loop, which forbids wide loads); per block of rows, sum every
   channel (bias gradient) and note whether it holds anything but zeros.
2. *extend*: add up those partial results in a fixed order, 16 channels a program, and append to the list of active
   filters the pruned ones whose gradient is needed: the estimator passes, and ``dL/dy`` of the channel is not all zero.
   With a ReLU behind the layer there are none, and they cost nothing. Each one there is costs its row of the weight
   gradient, as a dense layer would pay: the exact ``r_i`` of a pruned filter needs all of it.
3. *collect extra*: the channels of those filters; programs return at once when there are none.
4. *dgrad*: ``dL/dx``, reduced over active filters; positions are split by their residue modulo the stride, so that no
   kernel tap is visited in vain.
5. *wgrad*: rows ``G_i`` of the listed filters, float32, split over the batch into slabs.
6. *finish*: add the slabs in a fixed order; ``r_i = sum_j G_ij w_ij``; ``dL/dw`` and ``dL/dtau`` of every filter, zeros
   for those that are not listed.

Nothing is accumulated atomically, so results are the same in every run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...executed import counting, note
from ..geometry import (
    Geometry,
    Memory,
    channels_last,
    channels_last_strides,
    dense_rows,
    empty_channels_last,
    lies_alike,
    like_rows,
    needs_copy,
    positions,
    strides_like_rows,
)
from ..packing import Selection, capacity
from ..tables import tiles as measured
from .collect import Statistics, collecting
from .device import on_device_of_first
from .dgrad import input_gradient
from .forward import restrict
from .launch import REMEMBERED, Launch, Program, current_stream
from .tiles import Tile
from .wgrad import weight_gradients

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


# Places of tensors in the program; those from EXTENDED on are scratch memory.
GRAD, X, WEIGHT, PACKED, BIAS, SELECTION, INPUTS, DX, DW, DTAU, DBIAS = range(11)
EXTENDED, COLLECTED, PARTIAL, WORDS, SUMS, SLABS = range(11, 17)


@dataclasses.dataclass(frozen=True)
class Backward:
    """The backward pass of given sizes, see :func:`layer_backward`."""

    copy: bool
    need_input: bool
    need_weight: bool
    # Of the results; ``row``: of dtau and dbias.
    dx: Memory
    dw: Memory
    row: Memory
    # Whether they lie as x and the weight do, which is faster to allocate.
    like_x: bool
    like_weight: bool
    device: torch.device
    program: Program
    # Multiply-accumulates of a filter and input channel; how many channels there are, None where a list says it.
    cost: int
    channels: int | None
    # Keeps the table of tiles alive whose identity is one of the facts.
    table: Any

    def of_one_client(self, linear: bool) -> Backward:
        """The same with tensors that lack the client dimension; linear: input and gradient are matrices."""
        dx = self.dx.part(slice(1, 3 if linear else None))
        return dataclasses.replace(self, dx=dx, dw=self.dw.part(slice(1, None)), row=self.row.part(slice(1, None)))

    def run(
        self, stream: int | None, grad: Tensor, x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None,
        selection: Tensor, inputs: Tensor,
    ) -> Gradients:  # fmt: skip
        """The gradients; ``inputs``: the selection of the input, or the selection again."""
        device, empty, dx = self.device, torch.empty_strided, None
        if self.need_input:
            size, strides, dtype = self.dx
            dx = torch.empty_like(x) if self.like_x else empty(size, strides, dtype=dtype, device=device)
        # A tensor that no launch takes has the selection in its place.
        product = selection if dx is None else dx
        if not self.need_weight:
            self._launch(
                stream, grad, x, weight, packed, selection, selection, inputs, product, selection, selection, selection
            )
            return dx, None, None, None
        x = channels_last(x) if self.copy else x
        size, strides, dtype = self.dw
        dw = torch.empty_like(weight) if self.like_weight else empty(size, strides, dtype=dtype, device=device)
        size, strides, dtype = self.row
        dtau = empty(size, strides, dtype=dtype, device=device)
        if bias is None:
            self._launch(stream, grad, x, weight, packed, weight, selection, inputs, product, dw, dtau, dtau)
            return dx, dw, dtau, None
        dbias = empty(size, strides, dtype=bias.dtype, device=device)
        self._launch(stream, grad, x, weight, packed, bias, selection, inputs, product, dw, dtau, dbias)
        return dx, dw, dtau, dbias

    def _launch(self, stream: int | None, *tensors: Tensor) -> None:
        if not counting():
            self.program(stream, *tensors)
            return
        extended = self.program.apart(stream, *tensors)[0]
        channels = self.channels if self.channels is not None else _counts(tensors[INPUTS])
        if self.need_input:
            note(_counts(tensors[SELECTION]), self.cost, channels)
        if self.need_weight:  # the active filters, and the pruned ones whose row is needed
            note(_counts(extended), self.cost, channels)


def _counts(selections: Tensor) -> Tensor:
    """How many filters selections list, ``(clients,)``; their client dimension may be missing."""
    return selections[..., 0].reshape(-1)


@functools.lru_cache(REMEMBERED)
def prepare(
    grad: tuple[tuple[int, ...], tuple[int, ...]], x: tuple[tuple[int, ...], tuple[int, ...]],
    weight: tuple[tuple[int, ...], tuple[int, ...]], dtypes: tuple[torch.dtype, ...], packed: int, selection: int,
    inputs: tuple[int, int] | None, bias: tuple[torch.dtype, int] | None, geometry: Geometry, mask_bias: bool,
    tf32: bool, need_input: bool, need_weight: bool, tile: Tile | None, device: torch.device, table: int,
) -> Backward:  # fmt: skip
    """The pass by everything that its launches depend on.

    Args:
        grad, x, weight: shapes and strides.
        dtypes: of these three, the packed weights and the selection.
        packed, selection: distances between clients in the packed weights and the selection.
        inputs: the same of the selection of the input, and its channels.
        bias: its dtype and the distance between clients.
        device: of all.
        table: identity of the table of measured tiles.
    """
    (clients, n, out, high, wide), g = grad[0], geometry
    channels, listed = (g.channels, None) if inputs is None else (inputs[1], inputs[0])
    statistics = Statistics.of(grad[0]) if need_weight else None
    left = (SELECTION, SELECTION) if statistics is None else (PARTIAL, WORDS)
    stages: list[tuple[Launch, tuple[int, ...]]] = []
    stages.append((collecting(*grad, selection, statistics=statistics), (GRAD, COLLECTED, *left, SELECTION, SELECTION)))
    scratch = [Memory.dense((clients, 1 + 2 * out), torch.int32)]  # whose rows are computed
    scratch.append(Memory.dense((clients, n * high * wide, capacity(out)), dtypes[0]))
    if need_input:
        product = input_gradient(clients, n, out, g, channels, dtypes[1], tf32, tile, device, packed, selection, listed)
        stages.append((product, (COLLECTED, PACKED, DX, SELECTION, INPUTS)))
    if statistics is not None:
        weights = weight_gradients(
            grad, statistics, positions(*x), weight, dtypes[1], None if bias is None else bias[1], g, channels,
            mask_bias, tf32, tile, device, selection, listed,
        )  # fmt: skip
        scratch += weights.scratch
        stages += [
            (weights.extend, (PARTIAL, SUMS, WORDS, SELECTION, EXTENDED)),
            (weights.extra, (GRAD, COLLECTED, SELECTION, SELECTION, SELECTION, EXTENDED)),
            (weights.product, (X, COLLECTED, SLABS, EXTENDED, INPUTS)),
            (weights.finish, (WEIGHT, BIAS, SLABS, SUMS, SELECTION, EXTENDED, INPUTS, DW, DTAU, DBIAS)),
        ]
    size, (shape, strides) = (channels, g.height, g.width), weight
    dx = Memory((clients, n, *size), channels_last_strides(*size, n), dtypes[1])
    dw = Memory(tuple(shape), strides_like_rows(shape, strides), dtypes[2])
    return Backward(
        copy=needs_copy(*x),
        need_input=need_input,
        need_weight=need_weight,
        dx=dx,
        dw=dw,
        row=Memory.dense((clients, out), dtypes[2]),
        like_x=dx.size == tuple(x[0]) and lies_alike(*dx[:2], x[1]),
        like_weight=lies_alike(*dw[:2], strides),
        device=device,
        program=Program(stages, scratch, device),
        cost=n * high * wide * math.prod(geometry.kernel),
        channels=geometry.channels if inputs is None else None,
        table=measured.of(device),
    )


@on_device_of_first
def layer_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    selection: Selection,
    bias: Tensor | None,
    geometry: Geometry,
    mask_bias: bool = False,
    tf32: bool = False,
    need_input: bool = True,
    need_weight: bool = True,
    tile: Tile | None = None,
    input_selection: Selection | None = None,
) -> Gradients:
    """Gradients of :func:`~.forward.layer_forward` through the mask, as the definition gives them.

    Args:
        grad: ``dL/dy``, ``(clients, N, out, H', W')``, dtype of ``x``, any strides (also expanded).
        x, packed, selection, bias, geometry, mask_bias, tf32: as in the forward pass.
        weight: ``(clients, out, in[, kH, kW])``, the unmasked weight.
        need_input: whether ``dL/dx`` is wanted.
        need_weight: whether ``dL/dw``, ``dL/dtau`` and ``dL/db`` are wanted.
        tile: for both products, instead of the measured ones, or those of the rule.
        input_selection: as in the forward pass; ``dx`` and the columns of ``G`` of channels that are not listed are 0.

    Returns:
        ``(dx, dw, dtau, dbias)``: ``(clients, N, C, H, W)`` channels last in the dtype of ``x``; shape, dtype and
        memory order of ``weight``; ``(clients, out)`` in its dtype; ``(clients, out)`` in the dtype of ``bias``. None
        where not wanted (dbias: or no bias).
    """
    weight = dense_rows(weight)
    bias = None if bias is None else bias.contiguous()
    if grad.numel() == 0:
        return _nothing(x, weight, bias, need_input, need_weight)
    data, device, inputs = selection.data, x.device, None
    if input_selection is not None:
        x, packed, geometry = restrict(x, packed, input_selection, geometry)
        inputs = input_selection.data
    made = prepare(
        (grad.shape, grad.stride()), (x.shape, x.stride()), (weight.shape, weight.stride()),
        (grad.dtype, x.dtype, weight.dtype, packed.dtype, data.dtype), packed.stride(0), data.stride(0),
        None if inputs is None or input_selection is None else (inputs.stride(0), input_selection.out),
        None if bias is None else (bias.dtype, bias.stride(0)), geometry, mask_bias, tf32, need_input, need_weight,
        tile, device, id(measured.of(device)),
    )  # fmt: skip
    stream = current_stream(x.get_device())
    return made.run(stream, grad, x, weight, packed, bias, data, data if inputs is None else inputs)


def _nothing(x: Tensor, weight: Tensor, bias: Tensor | None, need_input: bool, need_weight: bool) -> Gradients:
    """The gradients of an empty batch: zeros."""
    clients, n, channels, high, wide = x.shape
    dx = empty_channels_last(clients, n, channels, (high, wide), x.dtype, x.device).zero_() if need_input else None
    if not need_weight:
        return dx, None, None, None
    dtau = weight.new_zeros(weight.shape[:2])
    return dx, like_rows(weight).zero_(), dtau, None if bias is None else bias.new_zeros(bias.shape)

"""The arena: one flat tensor of parameters, one of momenta and one of gradients, laid out for a plan.

A tensor of the model has a *share* in it, which is one or two pieces: the kept channels, and what is dropped but
stored. Pieces lie in regions, so that autograd sees the leading ones as leaves, scores read one range, and an SGD step
is three calls for the whole model. Thresholds lie behind all regions. A weight of which nothing is dropped can be
*borrowed*: the model's own tensor is trained, and only its momentum lies in the arena, behind everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod

import torch
from torch import Tensor

from ..graph.flow import Flow
from ..plan.plan import Channels
from ..plan.state import LayerState, NormState, put_rows, take_rows, take_weight
from ..run.memory import Memory

__all__ = ["Arena", "Parts", "Piece", "Region", "Share", "VectorShare", "WeightShare", "attach", "shares_of"]

Key = tuple[str, str]


class Region(IntEnum):
    """Where a piece lies; in this order."""

    VECTORS = 0  # vectors and plain weights
    WEIGHTS = 1  # kept weights of threshold layers
    CONSTANTS = 2  # their dropped input columns where these read constants
    COLUMNS = 3  # dropped columns whose input is 0
    STILL = 4  # parameters without a gradient


LAST_LEAF = Region.CONSTANTS

# Of dropped columns, by whether the layer has thresholds and whether the columns read constants.
_COLUMNS = {
    (True, True): Region.CONSTANTS, (True, False): Region.COLUMNS,
    (False, True): Region.VECTORS, (False, False): Region.STILL,
}  # fmt: skip


@dataclass
class Piece:
    """One tensor in the arena; ``at`` is set when the arena is laid out.

    ``borrowed``: the model's tensor that takes its place among the parameters. ``last``: weights of a convolution whose
    input channels lie last in memory.
    """

    shape: tuple[int, ...]
    region: Region
    borrowed: Tensor | None = None
    last: bool = False
    at: int = 0
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = prod(self.shape)

    def span(self, flat: Tensor) -> Tensor:
        return flat[self.at : self.at + self.size]

    def of(self, flat: Tensor) -> Tensor:
        if self.last:
            rows, columns, height, width = self.shape
            return self.span(flat).view(rows, height, width, columns).permute(0, 3, 1, 2)
        return self.span(flat).view(self.shape)

    def columns(self, flat: Tensor) -> Tensor:
        """``(rows, columns, kernel)`` of a weight."""
        rows, columns = self.shape[:2]
        if self.last:
            return self.span(flat).view(rows, -1, columns).transpose(1, 2)
        return self.span(flat).view(rows, columns, -1)

    def span_of(self, tensor: Tensor) -> Tensor:
        """A tensor of this shape as :meth:`span` has it; a copy unless it lies in that order."""
        return tensor.permute(0, 2, 3, 1).reshape(-1) if self.last else tensor.reshape(-1)


@dataclass
class Share:
    """What the arena holds of one tensor of the model: the kept part and, where it is stored, the dropped one."""

    kept: Piece
    dropped: Piece | None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (self.kept,) if self.dropped is None else (self.kept, self.dropped)

    def load(self, full: Tensor, flat: Tensor, memory: Memory) -> None:
        """Read the model's tensor."""
        raise NotImplementedError

    def store(self, full: Tensor, flat: Tensor, memory: Memory) -> None:
        """Write into the model's tensor what the arena holds of it."""
        raise NotImplementedError


@dataclass
class WeightShare(Share):
    """A layer's weight, ``(filters, inputs, kernel)``: kept rows, their kept columns and their dropped ones apart.

    Dropped rows are not stored.
    """

    rows: Channels
    columns: Channels

    def load(self, full: Tensor, flat: Tensor, memory: Memory) -> None:
        rows, dropped = self.rows, None if self.dropped is None else self.dropped.columns(flat)
        scratch = memory.take("rows", (len(rows.kept), *full.shape[1:])) if len(rows.dropped) else None
        take_weight(full, rows, self.columns, self.kept.columns(flat), dropped, scratch)

    def store(self, full: Tensor, flat: Tensor, memory: Memory) -> None:
        rows, columns = self.rows, self.columns
        count = len(rows.kept)
        part = self.kept.columns(flat)[:count, : len(columns.kept)]
        if self.dropped is not None:
            dropped = self.dropped.columns(flat)[:count]
            # One gather of the two side by side takes half the time of two scatters.
            shape = (count, columns.width, full.shape[2])
            both = torch.cat([part, dropped], 1, out=memory.take("rows", shape))
            part = torch.index_select(both, 1, columns.order, out=memory.take("whole rows", shape))
        put_rows(full, rows, part)


@dataclass
class VectorShare(Share):
    """One number per channel: those of kept channels, then zeros; those of dropped channels."""

    channels: Channels

    def load(self, full: Tensor, flat: Tensor, memory: Memory) -> None:
        take_rows(full, self.channels, self.kept.span(flat))
        if self.dropped is not None:
            torch.index_select(full, 0, self.channels.dropped, out=self.dropped.span(flat))

    def store(self, full: Tensor, flat: Tensor, memory: Memory) -> None:
        put_rows(full, self.channels, self.kept.span(flat)[: len(self.channels.kept)])
        if self.dropped is not None:
            full[self.channels.dropped] = self.dropped.span(flat)


def shares_of(
    flow: Flow, layers: Iterable[LayerState], norms: Iterable[NormState], borrow: bool = False, last: bool = False
) -> dict[Key, Share]:
    """The shares of all tensors under the channels that the layers and norms have now.

    ``borrow``: weights of threshold layers are borrowed where they are whole. ``last``: weights of convolutions lie in
    channels-last order, which is what the product of channels-last images copies them to otherwise.
    """
    shares: dict[Key, Share] = {}

    def vector(key: Key, channels: Channels, where: Region) -> None:
        dropped = Piece((len(channels.dropped),), where) if len(channels.dropped) else None
        shares[key] = VectorShare(Piece((channels.stored,), Region.VECTORS), dropped, channels)

    for layer in layers:
        op, rows, columns = flow.layers[layer.name], layer.row_channels, layer.column_channels
        assert rows is not None and columns is not None
        kernel = tuple(layer.module.weight.shape[2:])
        kept = Piece((rows.stored, columns.stored, *kernel), Region.WEIGHTS if layer.is_threshold else Region.VECTORS)
        kept.last = last and len(kernel) == 2 and op.dense
        dropped = None
        whole = rows.full and columns.full and layer.weight.is_contiguous()
        if borrow and whole and layer.is_threshold and not layer.mask_bias:
            kept.borrowed = layer.weight.view(kept.shape)
        if len(columns.dropped):
            where = _COLUMNS[layer.is_threshold, bool(flow.source(op).const)]
            dropped = Piece((rows.stored, len(columns.dropped), *kernel), where)
        shares[layer.name, "w"] = WeightShare(kept, dropped, rows, columns)
        if layer.bias is not None:
            vector((layer.name, "b"), rows, Region.STILL if layer.mask_bias else Region.VECTORS)
    for norm in norms:
        assert norm.channels is not None
        if norm.module.weight is not None:
            vector((norm.name, "ng"), norm.channels, Region.STILL)
        if norm.module.bias is not None:
            vector((norm.name, "nb"), norm.channels, Region.VECTORS)
    return shares


@dataclass(frozen=True)
class Parts:
    """Ranges of the arena's tensors, in this order, one behind the other.

    Args:
        vectors: vectors and plain weights.
        weights: weights of threshold layers that autograd sees: kept columns, and dropped ones that read constants.
        columns: their dropped columns that read 0.
        still: parameters without a gradient.
        thresholds: those of all filters.
    """

    vectors: slice
    weights: slice
    columns: slice
    still: slice
    thresholds: slice

    @property
    def leaves(self) -> slice:
        """What autograd sees."""
        return slice(self.vectors.start, self.weights.stop)

    @property
    def scored(self) -> slice:
        """The weights of threshold layers, all columns."""
        return slice(self.weights.start, self.columns.stop)

    @property
    def behind_leaves(self) -> slice:
        return slice(self.columns.start, self.thresholds.stop)

    @property
    def behind_scored(self) -> slice:
        return slice(self.still.start, self.thresholds.stop)


class Arena:
    """Memory for ``shares`` and ``thresholds`` numbers behind them.

    Args:
        memory, name: whose buffers ``name + ...`` are used.
        with_momentum: False leaves ``velocity`` empty.
        align: pieces begin at multiples of so many elements. Kernels of cuDNN were seen to fail on weights that begin
            elsewhere than at a multiple of 16 bytes.

    Attributes:
        flat, velocity, grad: the three tensors, not initialised; only ``velocity`` has room for borrowed pieces.
        tau, tau_momentum, tau_grad: views of their thresholds.
        parts: the ranges of the three tensors.
        leaves, leaf_pieces: views of the pieces that have a gradient, in order; autograd's leaves.
        vectors: how many of these are no weights of threshold layers.
        gaps: ``(start, size)`` of what no piece has, because of ``align``; zeros in all three tensors.
    """

    def __init__(
        self, shares: Mapping[Key, Share], thresholds: int, memory: Memory, name: str, with_momentum: bool,
        align: int = 1,
    ) -> None:  # fmt: skip
        self.shares, self.name = shares, name
        pieces = sorted((piece for share in shares.values() for piece in share.pieces), key=lambda p: p.region)
        own = [piece for piece in pieces if piece.borrowed is None]
        self.gaps: list[tuple[int, int]] = []

        def aligned(end: int) -> int:
            at = -(-end // align) * align
            if at > end:
                self.gaps.append((end, at - end))
            return at

        end = 0
        for piece in own:
            piece.at = aligned(end)
            end = piece.at + piece.size
        end = aligned(end)
        total = behind = end + thresholds
        inner = len(self.gaps)
        for piece in pieces:
            if piece.borrowed is not None:
                piece.at = aligned(behind)
                behind = piece.at + piece.size
        borrowed_gaps, self.gaps = self.gaps[inner:], self.gaps[:inner]
        self.flat = memory.take(name + " parameters", (total,))
        self.velocity = memory.take(name + " momentum", (behind if with_momentum else 0,))
        self.grad = memory.take(name + " gradient", (total,))
        for tensor in (self.flat, self.grad):
            for at, size in self.gaps:
                tensor[at : at + size].zero_()
        if with_momentum:
            for at, size in (*self.gaps, *borrowed_gaps):
                self.velocity[at : at + size].zero_()
        starts = [next((piece.at for piece in own if piece.region >= region), end) for region in Region]
        weights, columns, still = (starts[r] for r in (Region.WEIGHTS, Region.COLUMNS, Region.STILL))
        bounds = (0, weights, columns, still, end, total)
        self.parts = parts = Parts(*map(slice, bounds, bounds[1:]))
        self.tau, self.tau_grad = self.flat[parts.thresholds], self.grad[parts.thresholds]
        self.tau_momentum = self.velocity[parts.thresholds]
        self.vectors = sum(piece.region == Region.VECTORS for piece in pieces)
        self._tensors: dict[int, Tensor] = {}
        self.leaves: list[Tensor] = []
        self.leaf_pieces = [piece for piece in pieces if piece.region <= LAST_LEAF]
        for piece in pieces:
            tensor = self.parameter(piece)
            if piece.region <= LAST_LEAF:
                tensor = tensor.detach().requires_grad_()
                self.leaves.append(tensor)
            self._tensors[id(piece)] = tensor

    def parameter(self, piece: Piece) -> Tensor:
        """The piece's parameters."""
        return piece.of(self.flat) if piece.borrowed is None else piece.borrowed

    def load(self, key: Key, full: Tensor, memory: Memory) -> None:
        """Read a parameter of the model; a borrowed one is there."""
        share = self.shares[key]
        if share.kept.borrowed is None:
            share.load(full, self.flat, memory)

    def store(self, key: Key, full: Tensor, memory: Memory) -> None:
        """Write a parameter of the model; a borrowed one is there."""
        share = self.shares[key]
        if share.kept.borrowed is None:
            share.store(full, self.flat, memory)

    def pair(self, key: Key) -> tuple[Tensor | None, Tensor | None]:
        """The kept and the dropped part of a share as the forward pass reads them; None where there is none."""
        share = self.shares.get(key)
        if share is None:
            return None, None
        return self._tensors[id(share.kept)], None if share.dropped is None else self._tensors[id(share.dropped)]

    def take_over(self, key: Key, old: Arena) -> None:
        """Copy a share of the same shape from another arena."""
        for piece, was in zip(self.shares[key].pieces, old.shares[key].pieces, strict=True):
            if piece.borrowed is None:
                piece.span(self.flat).copy_(was.span(old.flat))
            if len(self.velocity):
                piece.span(self.velocity).copy_(was.span(old.velocity))


def attach(arena: Arena, layers: Iterable[LayerState], norms: Iterable[NormState]) -> None:
    """Let the forward pass read the arena."""
    for layer in layers:
        layer.slot.weight, layer.slot.weight_dropped = arena.pair((layer.name, "w"))
        layer.slot.bias, layer.slot.bias_dropped = arena.pair((layer.name, "b"))
    for norm in norms:
        slot = norm.slot
        slot.weight, slot.weight_dropped = arena.pair((norm.name, "ng"))
        slot.bias, slot.bias_dropped = arena.pair((norm.name, "nb"))
        if slot.bias_dropped is None and slot.mean_dropped is not None:
            slot.bias_dropped = torch.zeros_like(slot.mean_dropped)

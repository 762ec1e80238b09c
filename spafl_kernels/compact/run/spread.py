"""Channels put in their places among more (full width, the channels of a sum), and taken from there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ...cpu.channels import DirectCollectChannels, DirectExpandChannels, is_channels_last
from ..plan.plan import Channels
from .constants import chosen

if TYPE_CHECKING:
    from ..kinds.base import Op
    from .scope import Scope, Values

__all__ = ["Pick", "Spread", "Summand", "packed", "pixels", "zero_pads"]


def zero_pads(function: Callable[[Tensor], Tensor], x: Tensor, channels: Channels, dim: int) -> Tensor:
    """``function``, which does not make 0 of 0, on the kept channels; zeros behind them stay zeros.

    What reads them has weights of 0 there, whose gradient would not be 0 otherwise.
    """
    if not channels.pads:
        return function(x)
    y = function(x.narrow(dim, 0, len(channels.kept)))
    return F.pad(y, [0, 0] * (y.dim() - 1 - dim) + [0, channels.pads])


class Spread:
    """Puts channels in their places among more.

    Args:
        place: ``(K,)``, int64, on the CPU, ascending: which channel of the result each of the first ``K`` channels is.
        width: number of channels of the result.
        dim: the channel dimension.
        native: take the compiled kernel.
        device: where the channels are.
    """

    def __init__(self, place: Tensor, width: int, dim: int, native: bool, device: torch.device) -> None:
        self.place, self.width, self.dim, self.native = place.to(device, non_blocking=True), width, dim, native
        self._host = place
        self._others: Tensor | None = None
        if not native:  # now, as it would be in the way of a step
            self.others()
        self._matrix: Tensor | None = None

    def __call__(self, x: Tensor, constants: Tensor | None, stream: Tensor | None) -> Tensor:
        """``x`` in its places and ``constants`` (None: 0) in the others, onto ``stream`` if there is one."""
        if constants is not None and constants.dim() > 1:
            shape = list(constants.shape)
            shape[self.dim] = self.width
            dropped = constants.new_zeros(shape).index_copy(self.dim, self.others(), constants)
            return self(x, None, stream) + dropped
        if self.native:
            return DirectExpandChannels.apply(x, self.place, self.width, self.dim, constants, stream)
        if constants is not None:
            row = constants.new_zeros(self.width).index_copy(0, self.others(), constants)
            row = row.view([-1 if d == self.dim else 1 for d in range(x.dim())])
            stream = row if stream is None else stream + row
        if not is_channels_last(x):
            return self._moved(x, stream, self.dim)
        flat, wide = pixels(x), None if stream is None else pixels(stream)
        if x.device.type != "cpu":  # where a product may round what is only to be moved, as tf32 does
            return _image(self._moved(flat, wide, 1), x)
        # A product with a 0/1 matrix costs one pass over the result; index_add costs one per channel.
        matrix = self.matrix(x)
        return _image(flat @ matrix if wide is None else torch.addmm(wide, flat, matrix), x)

    def others(self) -> Tensor:
        """The channels of the result that are not in ``place``."""
        if self._others is None:
            free = torch.ones(self.width, dtype=torch.bool).index_fill_(0, self._host, False)
            self._others = free.nonzero().flatten().to(self.place.device, non_blocking=True)
        return self._others

    def _moved(self, x: Tensor, stream: Tensor | None, dim: int) -> Tensor:
        shape, there = list(x.shape), x.narrow(dim, 0, len(self.place))
        shape[dim] = self.width
        if stream is None:
            return x.new_zeros(shape).index_copy(dim, self.place, there)
        kind = torch.promote_types(stream.dtype, there.dtype)  # under autocast they may differ
        return stream.to(kind).expand(shape).index_add(dim, self.place, there.to(kind))

    def matrix(self, like: Tensor) -> Tensor:
        if self._matrix is None:
            self._matrix = like.new_zeros(like.shape[self.dim], self.width)
            self._matrix[torch.arange(len(self.place), device=like.device), self.place] = 1
        return self._matrix


class Pick:
    """Takes the channels ``kept`` (int64, on the CPU, ascending), then zeros up to ``stored`` channels (at least 1)."""

    def __init__(self, kept: Tensor, stored: int, dim: int, native: bool, device: torch.device) -> None:
        self.kept, self.stored, self.dim, self.native = kept.to(device, non_blocking=True), stored, dim, native

    def __call__(self, x: Tensor) -> Tensor:
        if self.native:
            return DirectCollectChannels.apply(x, self.kept, self.stored, self.dim)
        shape = list(x.shape)
        shape[self.dim] = self.stored - len(self.kept)
        return torch.cat([x.index_select(self.dim, self.kept), x.new_zeros(shape)], self.dim)


class Summand:
    """An operand of a sum of different channels."""

    def __init__(self, channels: Channels, after: Channels, dim: int, native: bool) -> None:
        device, (part, whole) = channels.kept.device, (channels.host, after.host)
        same = torch.equal(part.kept, whole.kept) and part.pads == whole.pads
        self.spread = None if same else Spread(whole.order[part.kept], whole.stored, dim, native, device)
        self._pads, self._dim = after.pads, dim
        stays = torch.isin(part.dropped, whole.kept)
        # Places, among the dropped channels, of those that the sum has and of those that it does not have.
        self._stay, self._leave = (mask.nonzero().flatten().to(device, non_blocking=True) for mask in (stays, ~stays))

    def __call__(self, x: Tensor, constants: Tensor | None, stream: Tensor | None) -> Tensor:
        """``x`` in the channels of the sum, onto ``stream`` if there is one."""
        if self.spread is None:
            return x if stream is None else stream + x
        if constants is not None:
            dim, ndim = (0, 1) if constants.dim() == 1 else (self.spread.dim, constants.dim())
            constants = F.pad(chosen(constants, self._stay, dim), [0, 0] * (ndim - 1 - dim) + [0, self._pads])
        return self.spread(x, constants, stream)

    def left(self, constants: Tensor | None) -> Tensor | None:
        """The constants of channels that the sum does not have either."""
        return None if constants is None else chosen(constants, self._leave, self._dim)


def pixels(x: Tensor) -> Tensor:
    """``(N, C, H, W)`` as a row of channels per pixel, ``(N H W, C)``; a view of channels-last images."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    n, _, h, w = like.shape
    return pixels.view(n, h, w, -1).permute(0, 3, 1, 2)


def packed(
    scope: Scope, source: Op, channels: Channels | None, pick: Tensor, place: Tensor, width: int, dim: int
) -> Callable[[Values], Tensor]:
    """Reads the stored channels ``pick`` of a value, in their places among ``width``; both ascending, on the CPU.

    ``channels``: those that the value has; None: read it at full width.
    """
    j, stored = scope.index[source.name], (source.shape or ())[dim] if channels is None else channels.stored
    read = scope.full(source.name) if channels is None else lambda env: env.kept[j]
    if len(pick) == width == stored:
        return read
    spread = Spread(place, width, dim, scope.native, scope.device)
    if len(pick) == (stored if channels is None else len(channels.kept)):
        return lambda env: spread(read(env), None, None)
    take = Pick(pick, max(len(pick), 1), dim, scope.native, scope.device)
    return lambda env: spread(take(read(env)), None, None)

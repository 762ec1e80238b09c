"""The plain SGD step with a fixed number of calls, whatever the number of layers: on a GPU a call costs a launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...training import SGDOptions
from ..plan.state import LayerState
from .arena import Arena
from .update import PlainUpdate

__all__ = ["FlatUpdate"]


class FlatUpdate(PlainUpdate):
    """Scores, ``r_i`` and sign terms of all layers at once, by sums over segments of the arena.

    A segment is a row of a piece: a filter has one of kept columns and, where some are dropped and stored, another one.
    All vectors over filters have one place more, for rows that are padding and for gaps of the arena.
    """

    def __init__(self, arena: Arena, layers: Sequence[LayerState], scores: Tensor, options: SGDOptions) -> None:
        super().__init__(arena, layers, scores, options)
        filters, device = len(scores), scores.device
        rows: list[tuple[int, list[int], int]] = []  # where a piece begins, the filters of its rows, their length
        for f in self._filters:
            channels, begin = f.channels.host, f.layer.begin
            owners = [*(channels.kept + begin).tolist(), *[filters] * channels.pads]
            rows += [(p.at, owners, p.size // len(owners)) for p in (f.piece, f.dropped_piece) if p is not None]
        start, end = arena.parts.scored.start, arena.parts.scored.stop
        rows += [(at, [filters], size) for at, size in arena.gaps if start <= at < end]
        rows.sort(key=lambda row: row[0])
        lengths = [length for _, owners, length in rows for _ in owners]
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        assert start + int(offsets[-1]) == end, "rows of threshold layers fill the scored range"
        self._offsets = offsets.to(device, non_blocking=True)
        owner = torch.tensor([filter for _, owners, _ in rows for filter in owners])
        self._owner = owner.to(device, non_blocking=True)
        # Columns that read 0 have no gradient from autograd; their segments are behind those that have.
        self._with_gradient = int((offsets[:-1] < arena.parts.weights.stop - start).sum())
        sizes, kept = torch.ones(filters + 1, dtype=scores.dtype), torch.zeros(filters, dtype=torch.bool)
        for f in self._filters:
            sizes[f.layer.part] = f.layer.size
        kept[owner[owner < filters]] = True
        self._sizes, self._kept = (t.to(device, non_blocking=True) for t in (sizes, kept))
        self._by_filter = scores.new_zeros(filters + 1)
        self._passes = scores.new_ones(filters + 1)
        # By element; it takes as much room as the weights, and only models with sign terms need it.
        self._element_owner: Tensor | None = None

    def _per_filter(self, elements: Tensor, segments: int) -> Tensor:
        """Sums over the first segments, by filter."""
        sums = torch.segment_reduce(elements, "sum", offsets=self._offsets[: segments + 1], unsafe=True)
        return self._by_filter.zero_().index_add_(0, self._owner[:segments], sums)

    def rescore(self) -> None:
        torch.abs(self.arena.flat[self.arena.parts.scored], out=self._absolute)
        sums = self._per_filter(self._absolute, len(self._owner)).div_(self._sizes)
        torch.where(self._kept, sums[:-1], self.scores, out=self.scores)

    def set_masks(self, active: Tensor) -> None:
        self._signed = any(f.layer.signed for f in self._filters)
        if not self._signed:
            return
        for f in self._filters:
            layer = f.layer
            passes = self._passes[layer.part]
            if not layer.window:
                continue
            if layer.far is None:
                passes.zero_()
            else:
                passes.copy_(layer.far)
        if self._element_owner is None:
            lengths, size = self._offsets.diff(), len(self._absolute)
            self._element_owner = torch.repeat_interleave(self._owner.int(), lengths, output_size=size)

    def _sign_terms(self, masks: dict[str, Tensor | None]) -> bool:
        arena, parts = self.arena, self.arena.parts
        arena.grad[parts.columns].zero_()
        if not self._signed:
            return False
        assert self._element_owner is not None
        weights, grads = arena.flat[parts.scored], arena.grad[parts.scored]
        products = torch.mul(arena.flat[parts.weights], arena.grad[parts.weights])
        r = self._per_filter(products, self._with_gradient)
        for f in self._filters:
            layer = f.layer
            if layer.signed and (layer.slot.mask is not None or (layer.mask_bias and layer.slot.bias is not None)):
                rows = self._row_dots(f, masks.get(layer.name))
                r.index_copy_(0, f.channels.kept + layer.begin, rows[: len(f.channels.kept)])
        r.mul_(self._passes)
        rho = (r / self._sizes).index_select(0, self._element_owner)
        grads.addcmul_(weights.sign(), rho)
        return True

    def _subtract_dots(self, tau_grad: Tensor) -> None:
        tau_grad.sub_(self._by_filter[:-1])

"""One SGD step on an arena: in plain PyTorch, or in one compiled call that also finds the new scores and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ...cpu.step import FilterRows, threshold_step
from ...training import SGDOptions
from ..plan.state import LayerState
from .arena import Arena, Piece, Region

__all__ = ["CompiledUpdate", "Filters", "Loose", "PlainUpdate", "Update"]


@dataclass(frozen=True)
class Loose:
    """Parameters that are used at full width, outside the arena: their values and, with momentum, their buffers.

    ``thresholds``: where thresholds are among them.
    """

    params: list[Tensor]
    momenta: list[Tensor]
    thresholds: frozenset[int] = frozenset()


class Update(Protocol):
    """What happens after the backward pass.

    Called with the gradients of the arena's leaves, of the loose parameters, and of the layers' masks by layer name
    (``r_i`` of layers that have a mask); None is 0.

    Attributes:
        flipped: False if the last step is known to have changed no mask.
    """

    flipped: bool

    def begin(self, loose: Loose, options: SGDOptions) -> None:
        """Another training on the same arena, with the same use of momentum."""
        ...

    def __call__(
        self, leaves: list[Tensor | None], loose: Sequence[Tensor | None], masks: dict[str, Tensor | None]
    ) -> None: ...

    def rescore(self) -> None:
        """Bring the scores of the kept rows up to date, unless the step has done so."""
        ...

    def set_masks(self, active: Tensor) -> None:
        """Take note of the masks of the next forward, bool over all filters."""
        ...


class Filters:
    """The stored rows of one threshold layer, as matrices that are views of the arena (made when first needed)."""

    def __init__(self, arena: Arena, layer: LayerState) -> None:
        self.arena, self.layer = arena, layer
        share = arena.shares[layer.name, "w"]
        assert layer.row_channels is not None
        self.channels = layer.row_channels
        self.piece, self.dropped_piece = share.kept, share.dropped
        # Dropped columns that read constants have a gradient from autograd.
        self.constant = share.dropped is not None and share.dropped.region == Region.CONSTANTS

    @cached_property
    def kept(self) -> Tensor:
        return self._rows(self.piece, self.arena.flat)

    @cached_property
    def kept_grad(self) -> Tensor:
        return self._rows(self.piece, self.arena.grad)

    @cached_property
    def dropped(self) -> Tensor | None:
        return None if self.dropped_piece is None else self._rows(self.dropped_piece, self.arena.flat)

    @cached_property
    def dropped_grad(self) -> Tensor | None:
        return None if self.dropped_piece is None else self._rows(self.dropped_piece, self.arena.grad)

    def _rows(self, piece: Piece, flat: Tensor) -> Tensor:
        return piece.span(flat).view(self.channels.stored, -1)

    def dots(self, kept_grad: Tensor, dropped_grad: Tensor | None) -> Tensor:
        """``r_i = sum_j G_ij w_ij`` of every row, with the bias where the mask covers it."""
        layer, arena = self.layer, self.arena
        r = (self.kept * kept_grad).sum(1)
        if self.constant:
            assert self.dropped is not None and dropped_grad is not None
            r += (self.dropped * dropped_grad).sum(1)
        if layer.mask_bias and layer.slot.bias is not None:
            piece = arena.shares[layer.name, "b"].kept
            r += piece.span(arena.flat) * piece.span(arena.grad)
        return r


def _collect(grads: Sequence[Tensor | None], pieces: Sequence[Piece], out: Tensor) -> None:
    """Gradients side by side, zeros where there is none and between pieces; ``out`` begins where the arena does."""
    parts, end = [], 0
    for g, piece in zip(grads, pieces):
        if piece.at > end:
            parts.append(out.new_zeros(piece.at - end))
        parts.append(out.new_zeros(piece.size) if g is None else piece.span_of(g))
        end = piece.at + piece.size
    if len(out) > end:
        parts.append(out.new_zeros(len(out) - end))
    if parts:
        torch.cat(parts, out=out)


def _or_zeros(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params)]


class PlainUpdate:
    """In PyTorch, three calls for the whole arena.

    Args:
        layers: the threshold layers.
        scores: of all filters; those of kept rows are written by :meth:`rescore`.
    """

    flipped = True

    def __init__(self, arena: Arena, layers: Sequence[LayerState], scores: Tensor, options: SGDOptions) -> None:
        self.arena, self.scores = arena, scores
        self._filters = [Filters(arena, layer) for layer in layers]
        self._absolute = torch.empty_like(arena.flat[arena.parts.scored])
        total = sum(f.channels.stored for f in self._filters)
        self._sums, self._dots = arena.flat.new_zeros(total), arena.flat.new_zeros(total)
        index, place, sizes, at = [], [], [], 0
        self._parts: list[slice] = []
        for f in self._filters:
            live = len(f.channels.kept)
            index.append(f.channels.kept + f.layer.begin)
            place.append(torch.arange(at, at + live, device=scores.device))
            sizes.append(torch.full((live,), f.layer.size, dtype=scores.dtype, device=scores.device))
            self._parts.append(slice(at, at + f.channels.stored))
            at += f.channels.stored
        self._index, self._place, self._row_size = torch.cat(index), torch.cat(place), torch.cat(sizes)

    def begin(self, loose: Loose, options: SGDOptions) -> None:
        self.loose, self.options = loose, options
        self.arena.grad[self.arena.parts.behind_leaves].zero_()

    def rescore(self) -> None:
        torch.abs(self.arena.flat[self.arena.parts.scored], out=self._absolute)
        for f, part in zip(self._filters, self._parts):
            out = self._sums[part]
            torch.sum(self._abs_rows(f, f.piece), 1, out=out)
            if f.dropped_piece is not None:
                out += self._abs_rows(f, f.dropped_piece).sum(1)
        self.scores.index_copy_(0, self._index, self._sums.index_select(0, self._place) / self._row_size)

    def _abs_rows(self, f: Filters, piece: Piece) -> Tensor:
        at = piece.at - self.arena.parts.scored.start
        return self._absolute[at : at + piece.size].view(f.channels.stored, -1)

    def set_masks(self, active: Tensor) -> None:
        pass

    def __call__(
        self, leaves: list[Tensor | None], loose: Sequence[Tensor | None], masks: dict[str, Tensor | None]
    ) -> None:
        arena, options = self.arena, self.options
        flat, grad, tau_grad, parts = arena.flat, arena.grad, arena.tau_grad, arena.parts
        params, momenta = self.loose.params, self.loose.momenta
        loose_grads = _or_zeros(loose, params)
        _collect(leaves, arena.leaf_pieces, grad[parts.leaves])
        signed = self._sign_terms(masks)
        if options.penalty:
            torch.neg(arena.tau, out=tau_grad)
            tau_grad.exp_().mul_(-options.penalty)
            if options.penalty_scales is not None:
                for f in self._filters:
                    own = tau_grad[f.layer.part]
                    if options.penalty_of(f.layer.name):
                        own.mul_(options.penalty_scales.get(f.layer.name, 1.0))
                    else:
                        own.zero_()  # exp(-tau) may be infinite
        else:
            tau_grad.zero_()
        if signed:
            self._subtract_dots(tau_grad)
        if options.max_grad_norm is not None:
            norm = torch.linalg.vector_norm(grad)
            if loose_grads:
                norm = torch.linalg.vector_norm(torch.stack([norm, *torch._foreach_norm(loose_grads)]))
            scale = (options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            grad.mul_(scale)
            if loose_grads:
                torch._foreach_mul_(loose_grads, scale)
        if options.weight_decay:
            grad.add_(flat, alpha=options.weight_decay)
            if loose_grads:
                torch._foreach_add_(loose_grads, params, alpha=options.weight_decay)
        if options.momentum:
            change = arena.velocity.mul_(options.momentum).add_(grad)
            if loose_grads:
                torch._foreach_mul_(momenta, options.momentum)
                torch._foreach_add_(momenta, loose_grads)
            if options.nesterov:
                change = grad.add_(change, alpha=options.momentum)
                if loose_grads:
                    torch._foreach_add_(loose_grads, momenta, alpha=options.momentum)
            else:
                loose_grads = momenta
        else:
            change = grad
        if options.threshold_lr is None:
            flat.add_(change, alpha=-options.lr)
            if loose_grads:
                torch._foreach_add_(params, loose_grads, alpha=-options.lr)
        else:
            rest = slice(0, parts.thresholds.start)
            flat[rest].add_(change[rest], alpha=-options.lr)
            arena.tau.add_(change[parts.thresholds], alpha=-options.threshold_lr)
            for i, (p, g) in enumerate(zip(params, loose_grads)):
                p.add_(g, alpha=-(options.threshold_lr if i in self.loose.thresholds else options.lr))
        if options.weight_decay or options.nesterov:
            # It was added in place; entries that no later gradient overwrites start at 0 again.
            grad[parts.behind_leaves].zero_()

    def _sign_terms(self, masks: dict[str, Tensor | None]) -> bool:
        """``r_i`` of every kept row found, and ``r_i sign(w_ij) / n_in`` added to the gradient; False if all are 0."""
        signed = any(f.layer.signed for f in self._filters)
        for f, part in zip(self._filters, self._parts):
            if f.layer.signed:
                self._sign_term(f, masks.get(f.layer.name), self._dots[part])
                continue
            if signed:
                self._dots[part].zero_()  # they are those of a step in which it was
            if f.dropped_grad is not None and not f.constant:
                f.dropped_grad.zero_()
        return signed

    def _subtract_dots(self, tau_grad: Tensor) -> None:
        """The thresholds' gradient: ``-r_i``."""
        tau_grad.index_add_(0, self._index, self._dots.index_select(0, self._place), alpha=-1)

    @staticmethod
    def _row_dots(f: Filters, mask_grad: Tensor | None) -> Tensor:
        """``r_i`` of the stored rows, whatever the estimator lets pass."""
        if f.layer.slot.mask is None:
            return f.dots(f.kept_grad, f.dropped_grad)
        return torch.zeros_like(f.layer.slot.mask) if mask_grad is None else mask_grad

    def _sign_term(self, f: Filters, mask_grad: Tensor | None, dots: Tensor) -> None:
        layer, r = f.layer, self._row_dots(f, mask_grad)
        if layer.far is not None:
            passes = torch.zeros_like(r)
            passes[: len(f.channels.kept)] = layer.far[f.channels.kept].to(r.dtype)
            r = r * passes
        dots.copy_(r)
        rho = (r / layer.size).unsqueeze(1)
        f.kept_grad.addcmul_(f.kept.sign(), rho)
        if f.dropped is not None and f.dropped_grad is not None:
            if f.constant:
                f.dropped_grad.addcmul_(f.dropped.sign(), rho)
            else:
                torch.mul(f.dropped.sign(), rho, out=f.dropped_grad)


class CompiledUpdate:
    """All of the update, and the scores and masks that follow, in one call.

    Args:
        layers: the threshold layers.
        scores: of all filters; those of kept rows are written by every step.
    """

    def __init__(self, arena: Arena, layers: Sequence[LayerState], scores: Tensor, options: SGDOptions) -> None:
        self.arena = arena
        self._filters = [Filters(arena, layer) for layer in layers]
        self._masks = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        with_momentum = bool(options.momentum)

        def filters(values: Tensor) -> list[Tensor]:
            return [values[layer.part] for layer in layers]

        def kept(values: Tensor) -> list[Tensor]:
            return [f.piece.of(values) for f in self._filters]

        def dropped(values: Tensor) -> list[Tensor]:
            pieces = [f.dropped_piece for f in self._filters]
            return [values.new_empty(0) if piece is None else piece.of(values) for piece in pieces]

        self._rows = FilterRows(
            weights=[arena.parameter(f.piece) for f in self._filters],
            thresholds=filters(arena.tau),
            scores=filters(scores),
            masks=filters(self._masks),
            n_in=[layer.size for layer in layers],
            index=[f.channels.kept for f in self._filters],
            dropped=dropped(arena.flat),
            estimators=["window" if layer.window else "identity" for layer in layers],
            weight_momenta=kept(arena.velocity) if with_momentum else [],
            dropped_momenta=dropped(arena.velocity) if with_momentum else [],
            threshold_momenta=filters(arena.tau_momentum) if with_momentum else [],
        )
        still = arena.parts.still
        others = [arena.parts.vectors, *([still] if still.start < still.stop else [])]
        self._params, self._grads = ([t[part] for part in others] for t in (arena.flat, arena.grad))
        self._momenta = [arena.velocity[part] for part in others] if with_momentum else []

    def begin(self, loose: Loose, options: SGDOptions) -> None:
        self.loose, self.options = loose, options
        self.flipped = False
        self.arena.grad[self.arena.parts.behind_scored].zero_()

    def rescore(self) -> None:
        pass

    def set_masks(self, active: Tensor) -> None:
        self._masks.copy_(active)

    def __call__(
        self, leaves: list[Tensor | None], loose: Sequence[Tensor | None], masks: dict[str, Tensor | None]
    ) -> None:
        arena, options, rows = self.arena, self.options, self._rows
        vectors, layers = arena.vectors, len(self._filters)
        _collect(leaves[:vectors], arena.leaf_pieces[:vectors], arena.grad[arena.parts.vectors])
        others = []
        for i, leaf in enumerate(arena.leaves[vectors:], vectors):
            # Where a gradient is copied into the order of the arena, the original goes at once.
            g, leaves[i] = leaves[i], None
            others.append(torch.zeros_like(leaf) if g is None else g.contiguous())
        weight_grads, constant_grads = others[:layers], iter(others[layers:])
        dropped_grads, dots, none = [], [], rows.none[0]
        for f, weight_grad in zip(self._filters, weight_grads):
            slot, dropped = f.layer.slot, next(constant_grads) if f.constant else none
            dot = none
            if slot.mask is not None:
                found = masks.get(f.layer.name)
                dot = torch.zeros_like(slot.mask) if found is None else found
            elif f.layer.mask_bias and slot.bias is not None:
                dot = f.dots(weight_grad.view(f.kept.shape), dropped.view(len(f.kept), -1) if f.constant else None)
            dropped_grads.append(dropped)
            dots.append(dot)
        _, flips = threshold_step(
            rows,
            weight_grads,
            self._params + self.loose.params,
            self._grads + _or_zeros(loose, self.loose.params),
            self._momenta + self.loose.momenta,
            [0] * (len(self._params) + len(self.loose.params)),
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            penalty=options.penalty,
            max_norm=options.max_grad_norm,
            dropped_grads=dropped_grads,
            dots=dots,
            check=False,
        )
        self.flipped = bool(flips.any())

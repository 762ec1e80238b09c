"""Rows that are dropped: they stay in the model's own tensors and make up for missed steps when somebody needs them.

Their loss gradient is exactly 0, so momentum and weight decay move them by a fixed linear map per step,
``(w, v) <- M (w, v)``; ``k`` steps are ``M^k``. Until they are applied, ``|a_k| mean|w| + |b_k| mean|v|`` bounds the
row's score from above, and only a row whose bound exceeds its threshold is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...reference import WINDOW, filter_scores
from ...training import SGDOptions
from ..plan.state import LayerState

__all__ = ["DroppedRows", "Powers"]


class Powers:
    """``M^k`` of the map that SGD without a gradient applies to ``(w, v)``: ``v <- mu v + wd w; w <- w - lr v``.

    Nesterov's subtracts ``lr (wd w + mu v)`` with the new ``v``.
    """

    def __init__(self, options: SGDOptions, dtype: torch.dtype, device: torch.device) -> None:
        self.options = options
        lr, mu, wd = options.lr, options.momentum, options.weight_decay
        of_weight, of_velocity = (wd * (1 + mu), mu * mu) if options.nesterov else (wd, mu)
        self._step = torch.tensor([[1 - lr * of_weight, -lr * of_velocity], [wd, mu]], dtype=torch.float64)
        self._rows = [torch.eye(2, dtype=torch.float64)]
        self._dtype, self._device = dtype, device
        self._table: Tensor | None = None

    def at(self, steps: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``a, b, c, d`` of ``w <- a w + b v; v <- c w + d v`` after ``steps`` (int64) steps, none above ``most``."""
        if self._table is None or most >= len(self._table):
            size = max(64, 2 * (most + 1))
            while len(self._rows) < size:
                self._rows.append(self._step @ self._rows[-1])
            self._table = torch.stack(self._rows).flatten(1).to(self._dtype).to(self._device)
        a, b, c, d = self._table[steps].unbind(1)
        return a, b, c, d


class DroppedRows:
    """The clock of every threshold filter; entries of kept filters mean nothing.

    Args:
        layers: threshold layers, in the order of their thresholds.
        scores: ``(filters,)``: scores of all filters; those of dropped rows are as of ``base`` and updated here.

    Attributes:
        clock: steps of this training so far.
        base: int64 ``(filters,)``: the step up to which a dropped row's tensors are complete.
        moving_mean: ``(filters,)``: ``mean|v|`` at that step.
        moving: some dropped row has missed steps that matter.
    """

    def __init__(self, layers: Sequence[LayerState], scores: Tensor) -> None:
        self.layers, self.scores = layers, scores
        self.base = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        self.moving_mean = torch.zeros_like(scores)
        self._powers = Powers(SGDOptions(lr=0.0), scores.dtype, scores.device)

    def begin(self, options: SGDOptions) -> None:
        """A new training; all rows are complete."""
        self.clock, self.moving, self._measured = 0, False, False
        self.base.zero_()
        self.moving_mean.zero_()
        self._decays = options.weight_decay > 0
        if self._powers.options != options:
            self._powers = Powers(options, self.scores.dtype, self.scores.device)

    def leave(self, gone: Tensor) -> None:
        """Rows ``gone`` (bool over all filters) are from now on the model's."""
        self.base[gone] = self.clock

    def measure(self, gone: Tensor) -> None:
        """Note the momentum with which rows leave."""
        for layer, index in self._by_layer(gone):
            assert layer.momentum is not None
            self._measured = True
            self.moving_mean[index + layer.begin] = layer.momentum[index].abs().mean((1, 2))

    def _by_layer(self, rows: Tensor) -> Iterator[tuple[LayerState, Tensor]]:
        """Indices of ``rows`` (bool over all filters) in every layer that has some; waits for the device once."""
        known = rows.cpu()
        for layer in self.layers:
            index = known[layer.part].nonzero().flatten()
            if len(index):
                yield layer, index.to(rows.device, non_blocking=True)

    def settle(self, dropped: Tensor) -> None:
        """Find out whether the rows ``dropped`` (bool over all filters) move."""
        self.moving = False
        if self._decays or self._measured:
            self.moving = bool(dropped.any()) and (self._decays or bool((self.moving_mean[dropped] > 0).any()))

    def look(self, tau: Tensor, dropped: Tensor, window: Tensor | None) -> bool:
        """Bring scores up to date where the bounds do not suffice; True if a dropped row is active.

        ``window``: filters of the window estimator (bool), whose large margins must be known exactly.
        """
        unsure = self.suspects(tau, dropped, window, self.clock, self.clock)
        if not bool(unsure.any()):
            return False
        self.catch_up(unsure)
        return bool(((self.scores > tau) & dropped).any())

    def suspects(self, tau: Tensor, dropped: Tensor, window: Tensor | None, clock: Tensor | int, most: int) -> Tensor:
        """Dropped rows whose bounds do not suffice, bool over all filters; see :meth:`look`.

        Nothing waits for the device. ``clock``: the step to judge; beyond ``most`` every dropped row is one.
        """
        unsure = (self._bounds(clock, most) > tau) & dropped
        if window is not None:
            unsure |= dropped & window & (tau > WINDOW)
        return unsure | (dropped & (clock > most)) if isinstance(clock, Tensor) else unsure

    def _bounds(self, clock: Tensor | int, most: int) -> Tensor:
        """Upper bounds of the dropped rows' scores (kept rows: anything)."""
        a, b, _, _ = self._powers.at((clock - self.base).clamp(max=most), most)
        slack = 1 + 8 * torch.finfo(self.scores.dtype).eps
        bound = (a.abs() * self.scores + b.abs() * self.moving_mean) * slack
        still = (self.moving_mean == 0) & (a == 1)
        return torch.where(still, self.scores, bound)

    def catch_up(self, rows: Tensor) -> None:
        """Apply the steps that dropped rows have missed; ``rows``: bool over all filters."""
        for layer, index in self._by_layer(rows):
            place = index + layer.begin
            a, b, c, d = (t.view(-1, 1, 1) for t in self._powers.at(self.clock - self.base[place], self.clock))
            w = layer.weight[index]
            if layer.momentum is None:
                w = a * w
            else:
                v = layer.momentum[index]
                w, v = a * w + b * v, c * w + d * v
                layer.momentum[index] = v
                self.moving_mean[place] = v.flatten(1).abs().mean(1)
            layer.weight[index] = w
            self.scores[place] = filter_scores(w)
            self.base[place] = self.clock

"""When the pruned rows of a layer must be computed although they are pruned, because their gradient may not be 0."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..graph.flow import Flow
from ..graph.layout import Layout
from .state import LayerState

__all__ = ["Condition", "Constants", "rows_in_words"]


class Constants(Protocol):
    """The constants of pruned filters, as the model's parameters are now."""

    def in_front(self, layer: LayerState, norm: str, layout: Layout | None, zero: bool = False) -> Tensor:
        """By filter: the constant a pruned filter has in front of ReLU; with ``zero``: 1 where it is 0, else 0.

        ``norm`` is the norm between layer and ReLU, or empty; ``layout`` that of its input.
        """
        ...


class Condition:
    """Of one threshold layer; :meth:`of` says whether it needs one."""

    def __init__(
        self, layer: LayerState, proof: tuple[tuple[str, Layout | None], ...] | None, noisy: list[Any]
    ) -> None:
        self.layer, self.proof, self.noisy = layer, proof, noisy
        # The answer cannot change while the masks stay.
        self.fixed = proof is None and not noisy

    @classmethod
    def of(cls, flow: Flow, layer: LayerState) -> Condition | None:
        proof = flow.proofs[layer.name]
        bias = layer.module.bias is not None and not layer.mask_bias
        noisy = []
        if bias:
            # BatchNorm of a constant c != 0 is beta up to rounding; at beta = 0 the sign of that rounding decides
            # whether ReLU passes a gradient, so such channels are computed as they are.
            noisy = [
                (name, layout)
                for name in flow.norms
                if (layout := flow.layout_in(name)) is not None and layer.name in layout.sources
            ]
        if proof is not None and not bias and all(not norm for norm, _ in proof):
            return None
        return cls(layer, proof, noisy)

    @property
    def reason(self) -> str:
        """Why rows may be computed although they are pruned."""
        if not self.layer.window or self.proof is None:
            where = "" if self.proof is not None else ": no ReLU behind the layer makes it 0"
            rule = (
                "where the threshold is far, " if self.layer.window else f"estimator {self.layer.module.estimator!r}, "
            )
            return f"{rule}the gradient of a pruned row may not be 0{where}"
        return "BatchNorm of a kept bias"

    def carry(self, constants: Constants, far: Tensor | None) -> Tensor | None:
        """Rows to keep though pruned (also set for active ones): bool ``(rows,)`` or None.

        ``far``, bool ``(rows,)``, says where the window lets gradients through; None: nowhere, or there is no window.
        """
        layer = self.layer
        device = layer.module.weight.device
        result: Tensor | None = None
        if not layer.window or far is not None:
            if self.proof is None:
                result = torch.ones(layer.rows, dtype=torch.bool, device=device)
            else:
                result = torch.zeros(layer.rows, dtype=torch.bool, device=device)
                for norm, layout in self.proof:
                    result |= constants.in_front(layer, norm, layout) > 0
            if far is not None and layer.window:
                result = result & far
        for norm, layout in self.noisy:
            zero = constants.in_front(layer, norm, layout, zero=True) > 0
            result = zero if result is None else result | zero
        return result


def rows_in_words(name: str, active: Tensor, kept: Tensor, reason: str) -> str:
    """How many rows of a layer are computed; ``active`` and ``kept`` are bool ``(rows,)``."""
    count, computed, rows = int(active.sum()), int((kept | active).sum()), len(active)
    text = f"{name}: {computed} of {rows} rows are computed, {count} are active"
    return f"{text}; {reason or 'others are needed'}" if computed > count else text

"""One threshold pass for all layers of a model, instead of one in every layer's forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backend
from .gpu import choice
from .gpu.geometry import row_order
from .threshold_layer import Selected, ThresholdLayer

if TYPE_CHECKING:
    from .gpu.triton import ModelPass

__all__ = ["SharedPass", "can_share", "share"]


def can_share(layers: Sequence[ThresholdLayer]) -> bool:
    """Whether these layers run the packed kernels on one GPU, in one dtype and estimator, rows dense in memory."""
    if not all(isinstance(layer, nn.Conv2d | nn.Linear) for layer in layers):  # others have no kernels of their own
        return False
    if not layers or backend.REQUESTED not in ("auto", "triton"):
        return False
    weights = [layer.weight for layer in layers]
    kinds = {(w.device, w.dtype, layer.estimator) for w, layer in zip(weights, layers, strict=True)}
    dense = all(row_order(w.shape, w.stride()) is not None for w in weights)
    # Groups concern the product, not the pass: a layer that falls back because of them ignores what was made for it.
    return len(kinds) == 1 and dense and weights[0].is_cuda and choice.unsupported(weights[0], weights[0]) is None


class SharedPass:
    """The pass of some layers, made in one launch; while it is open their forwards take its selections.

    Args:
        layers: for which :func:`can_share` holds. Weights and thresholds are read where they lie now, at each opening.
    """

    def __init__(self, layers: Sequence[ThresholdLayer]) -> None:
        self._layers = list(layers)
        self._passes: dict[torch.dtype, tuple[ModelPass, list[Selected]]] = {}

    def _of(self, dtype: torch.dtype) -> tuple[ModelPass, list[Selected]]:
        """The pass that packs weights in ``dtype``, and what it makes for every layer, rewritten by each run of it."""
        if dtype not in self._passes:
            from .gpu.triton import ModelPass

            weights = [layer.weight.detach() for layer in self._layers]
            thresholds = [layer.threshold.detach() for layer in self._layers]
            made = ModelPass(weights, thresholds, self._layers[0].estimator, dtype)
            selected = [
                Selected(selection.data[0], rows[0])
                for selection, rows in zip(made.selections, made.packed, strict=True)
            ]
            self._passes[dtype] = made, selected
        return self._passes[dtype]

    @contextlib.contextmanager
    def open(self, densities: Tensor) -> Iterator[None]:
        """Make the pass now, and lend it to the layers: for a forward, before anything changes.

        Weights are packed in the dtype of autocast, if it is on, as the layers will want them.

        Args:
            densities: float64 ``(layers,)``; gets the share of active filters of every layer.
        """
        first = self._layers[0].weight
        kind = first.device.type
        made, selected = self._of(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else first.dtype)
        made()
        made.densities(densities.unsqueeze(1))
        try:
            for layer, each in zip(self._layers, selected, strict=True):
                layer.selected = each
            yield
        finally:
            for layer in self._layers:
                layer.selected = None


def share(layers: Sequence[Any]) -> SharedPass | None:
    """A shared pass, or None where there can be none."""
    return SharedPass(layers) if can_share(layers) else None

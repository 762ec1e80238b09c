"""Which rows of the threshold layers are computed: for the trainer, the module, the export and the audit alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...layers import ThresholdLayer
from ...reference import WINDOW
from ..graph.flow import Flow
from ..graph.layout import Layout
from ..kinds.whole import Constant, Whole
from .conditions import Condition, Constants
from .state import LayerState, NormState, per_filter

__all__ = ["Chosen", "Rows", "layer_states", "norm_states"]


@dataclass(frozen=True)
class Chosen:
    """By threshold layer.

    Args:
        masks: which filters are active, bool.
        keep: which are computed, bool.
        passes: where the estimator lets a gradient through, as numbers; None: nowhere.
        windowed: some of that depends on the margins, not on the masks alone.
    """

    masks: dict[str, Tensor]
    keep: dict[str, Tensor]
    passes: dict[str, Tensor | None]
    windowed: bool = False

    @cached_property
    def _state(self) -> Tensor:
        return torch.cat([torch.empty(0, dtype=torch.bool), *self.masks.values(), *self.keep.values()])

    def serves(self, other: Chosen) -> bool:
        """Whether what was made for this choice is right for another one of the same model."""
        passing = all((p is None) == (q is None) for p, q in zip(self.passes.values(), other.passes.values()))
        return not other.windowed and passing and torch.equal(self._state, other._state)

    def reasoned(self, reasons: Mapping[str, str]) -> dict[str, tuple[Tensor, Tensor, str]]:
        """By layer: which filters are active, which are computed, and why more than these."""
        return {name: (self.masks[name], self.keep[name], reasons.get(name, "")) for name in self.masks}


def layer_states(flow: Flow) -> dict[str, LayerState]:
    """All layers, with the place that their filters have in vectors over the filters of all threshold layers."""
    states: dict[str, LayerState] = {}
    begin = 0
    for name, op in flow.layers.items():
        states[name] = layer = LayerState(name, op.module, begin, op.positions)
        begin += layer.rows if layer.is_threshold else 0
    return states


def norm_states(flow: Flow) -> dict[str, NormState]:
    return {name: NormState(name, op.module) for name, op in flow.norms.items()}


class Rows:
    """An active filter is computed. A pruned one is computed where its gradient may not be 0, and everywhere in a model
    that holds what is not finite: that is to spoil the result as in the masked model, where ``0 * NaN`` is NaN.

    Args:
        flow: of the model.
        layers: its layers; by default new ones.

    Attributes:
        layers: the threshold layers.
        conditions: when pruned rows have a gradient.
    """

    def __init__(self, flow: Flow, layers: Iterable[LayerState] | None = None) -> None:
        self.flow = flow
        every = list(layer_states(flow).values() if layers is None else layers)
        self.layers = [layer for layer in every if layer.is_threshold]
        self._factors = _factors(flow)
        self.conditions = [c for layer in self.layers if (c := Condition.of(flow, layer)) is not None]

    def kept(self, active: Tensor, constants: Constants, far: Mapping[str, Tensor], spoiled: bool) -> Tensor:
        """The rows to compute where there are gradients; ``active`` itself if these are all.

        Args:
            active: bool over all filters.
            constants: of pruned filters.
            far: by window layer, where the window lets gradients through; layers without any are left out.
            spoiled: something is not finite.
        """
        if spoiled:
            return torch.ones_like(active)
        keep = active
        for condition in self.conditions:
            layer = condition.layer
            carry = condition.carry(constants, far.get(layer.name))
            if carry is not None:
                if keep is active:
                    keep = active.clone()
                keep[layer.part] |= carry
        return keep

    def spoiled(self, scores: Sequence[Tensor]) -> bool:
        """Whether something is not finite that zeros of dropped channels are multiplied by.

        Args:
            scores: of all filters, which tell of the weights of threshold layers.
        """
        values = [*scores, *(getattr(owner, name).detach().sum().view(1) for owner, name in self._factors)]
        return not math.isfinite(torch.cat(values).sum().item())

    @property
    def reasons(self) -> dict[str, str]:
        """By layer, why rows may be computed although they are pruned."""
        return {c.layer.name: c.reason for c in self.conditions}

    @torch.no_grad()
    def of_model(self, gradients: bool) -> Chosen:
        """From the parameters as they are now; without ``gradients`` only active rows are computed."""
        if not self.layers:
            return Chosen({}, {}, {})
        scores = [layer.module.scores() for layer in self.layers]
        spoiled = self.spoiled(scores)
        masks, passes, far = {}, {}, {}
        for layer, score in zip(self.layers, scores):
            threshold = layer.module.threshold
            masks[layer.name] = score > threshold
            passes[layer.name] = None if layer.window else torch.ones_like(score)
            if layer.window and bool((beyond := (score - threshold).abs() > WINDOW).any()):
                passes[layer.name], far[layer.name] = beyond.to(score.dtype), beyond
        active = torch.cat(list(masks.values()))
        keep = self.kept(active, OfParameters(self.flow), far, spoiled) if gradients or spoiled else active
        return Chosen(masks, {layer.name: keep[layer.part] for layer in self.layers}, passes, bool(far))


def _factors(flow: Flow) -> list[tuple[Any, str]]:
    """The floating-point tensors, but for the weights of threshold layers, that meet the zeros of dropped channels.

    They are owner and attribute, for somebody may put another tensor there. A kept bias and what is added spoil a
    constant, which is computed; whatever runs at full width gets the zeros themselves.
    """
    found: dict[int, tuple[Any, str]] = {}

    def note(owner: Any, name: str) -> None:
        value = getattr(owner, name)
        if isinstance(value, Tensor) and value.is_floating_point():
            found[id(value)] = owner, name

    for op in flow.ops.values():
        m, sources = op.module, [flow.ops[s] for s in op.sources]
        if isinstance(op, Whole) or not (op.layout or any(s.layout for s in sources)):
            continue
        if isinstance(m, ThresholdLayer):
            if m.bias is not None and m.mask_bias:
                note(m, "bias")
        elif m is not None:
            for name in m._parameters:
                note(m, name)
        for source in sources:
            path = str(source.node.target)
            if isinstance(source, Constant) and path not in flow.trace.constants:
                parent, _, name = path.rpartition(".")
                note(flow.model.get_submodule(parent), name)
    return list(found.values())


class OfParameters:
    """The constants in front of norms, for :class:`Condition`, from the model's own parameters."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def in_front(self, layer: LayerState, norm: str, layout: Layout | None, zero: bool = False) -> Tensor:
        weight = layer.module.weight
        if not norm:
            bias = layer.module.bias
            return weight.new_zeros(layer.rows) if bias is None or layer.mask_bias else bias.detach()
        assert layout is not None
        m = self.flow.norms[norm].module
        value = weight.new_zeros(layout.width) if m.bias is None else m.bias.detach()
        return per_filter((value == 0).to(weight.dtype) if zero else value, layout, layer.name, layer.rows)

"""The compact copy of a model during a training: read, kept under the plan of the current masks, written back.

Weights and momentum stay compact across steps (arena.py), and only a mask that changes costs a rebuild. Rows that are
dropped stay in the model's own tensors (dropped.py); dropped columns of kept rows are stepped eagerly, for the
estimator's sign term moves them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor, nn

from .. import native
from ..reference import WINDOW, filter_scores
from ..training import SGDOptions
from .arena import Arena, attach, shares_of
from .conditions import Condition
from .dropped import DroppedRows
from .flow import Flow, Layout
from .plan import Channels, Plan
from .program import Program, always_fused, prefers_channels_last
from .state import LayerState, NormState, Tensors, all_channels, per_filter, same_channels
from .update import CompiledUpdate, Loose, PlainUpdate, Update

__all__ = ["Session"]


class Session:
    """One training of one model.

    Args:
        flow: the traced model.
        parameters: all its parameters by name; read now.
        options: settings of the training.
        momentum: a full-size buffer for every parameter; empty without momentum.
        fresh: the buffers are all 0.
        densities: of every threshold layer in its last forward; kept up to date.
        multiple, compiled: see :class:`~spafl_kernels.compact.CompactTrainer`.

    Attributes:
        program: the forward pass under the current plan, after :meth:`refresh`.
        rebuilds: plans made after the first.
    """

    program: Program
    _update: Update

    def __init__(
        self,
        flow: Flow,
        parameters: Mapping[str, nn.Parameter],
        options: SGDOptions,
        momentum: Mapping[str, Tensor],
        fresh: bool,
        densities: dict[str, float],
        multiple: int,
        compiled: bool,
    ) -> None:
        self.flow, self.options, self.densities, self.multiple = flow, options, densities, multiple
        self.rebuilds = 0
        self._fresh = fresh
        p0 = next(iter(parameters.values()))
        self._device = p0.device
        known = p0.device.type == "cpu" and p0.dtype in (torch.float32, torch.float64)
        self.compiled = compiled and known and native.available()

        self._layers: dict[str, LayerState] = {}
        count = 0
        for name, op in flow.layers.items():
            self._layers[name] = layer = LayerState(name, op.module, count)
            count += layer.rows if layer.is_threshold else 0
        self._norms = {name: NormState(name, op.module) for name, op in flow.norms.items()}
        self._parts: list[LayerState | NormState] = [*self._layers.values(), *self._norms.values()]
        for part in self._parts:
            part.read(momentum)
        self._pruned = [layer for layer in self._layers.values() if layer.is_threshold]
        self._loose = Loose(
            [parameters[name].data for name in flow.loose], [momentum[name] for name in flow.loose] if momentum else []
        )
        self._loose_leaves: list[Tensor] = [parameters[name] for name in flow.loose]

        # Vectors over the filters of all threshold layers.
        self._scores = torch.cat([filter_scores(layer.module.weight.data) for layer in self._pruned])
        self._tau = torch.cat([layer.threshold for layer in self._pruned if layer.threshold is not None])
        self._keep = torch.zeros(count, dtype=torch.bool, device=self._device)
        self._active = self._keep
        self._far: Tensor | None = None
        self._window: Tensor | None = None
        if any(layer.window for layer in self._pruned):
            window = [torch.full((la.rows,), la.window, device=self._device) for la in self._pruned]
            self._window = torch.cat(window)
        self._dropped = DroppedRows(self._pruned, self._scores, options)

        self._conditions = [c for layer in self._pruned if (c := Condition.of(flow, layer)) is not None]
        self._steady = all(condition.fixed for condition in self._conditions)
        self._exact = always_fused(flow) if self.compiled else set()
        self._arena: Arena | None = None
        self._stale = True
        self._collapsed = self._find_collapsed()

    # -- masks -----------------------------------------------------------------------------------------------------

    def _find_collapsed(self) -> list[LayerState]:
        floor = self.options.collapse_floor
        return [] if floor is None else [la for la in self._pruned if self.densities[la.name] <= floor]

    @torch.no_grad()
    def refresh(self) -> None:
        """What happens at the start of a forward: guard, masks, and a new plan if a row's class changed."""
        for layer in self._collapsed:
            self._tau[layer.part] = 0
            self._stale = True
        if not self._stale:
            return
        first = self._arena is None
        scores, tau = self._scores, self._tau
        if not first:
            self._update.rescore()
        revived = self._dropped.moving and self._dropped.look(tau, ~self._keep, self._window)
        far = None
        if self._window is not None:
            far = ((scores - tau).abs() > WINDOW) & self._window
            far = far if bool(far.any()) else None
        settled = self._steady and far is None and self._far is None
        if not first and settled and not (self._update.flipped or self._collapsed or revived):
            self._stale = False
            return
        active = scores > tau
        keep = self._kept_rows(active, far)
        if new := first or not torch.equal(keep, self._keep):
            self._rebuild(keep)
        if new or not torch.equal(active, self._active) or far is not None or self._far is not None:
            self._active, self._far = active, far
            self._set_masks()
        self._stale = False
        self._collapsed = self._find_collapsed()
        self._update.set_masks(active)

    def _kept_rows(self, active: Tensor, far: Tensor | None) -> Tensor:
        keep = active
        for condition in self._conditions:
            layer = condition.layer
            carry = condition.carry(self, None if far is None or not layer.window else far[layer.part])
            if carry is not None:
                if keep is active:
                    keep = active.clone()
                keep[layer.part] |= carry
        return keep

    def in_front(self, layer: LayerState, norm: str, layout: Layout | None, zero: bool = False) -> Tensor:
        """See :class:`~spafl_kernels.compact.conditions.Constants`."""
        if not norm:
            value = self._current((layer.name, "b"), layer.bias)
            return self._scores.new_zeros(layer.rows) if value is None or layer.mask_bias else value
        assert layout is not None
        bias = self._norms[norm].module.bias
        value = self._current((norm, "nb"), None if bias is None else bias.data)
        if value is None:
            value = self._scores.new_zeros(layout.width)
        return per_filter((value == 0).to(value.dtype) if zero else value, layout, layer.name, layer.rows)

    def _current(self, key: tuple[str, str], full: Tensor | None) -> Tensor | None:
        """A vector at full width as it is now: from the arena, or from the model before the first plan."""
        if full is None or self._arena is None:
            return full
        value = torch.empty_like(full)
        self._arena.shares[key].store(value, self._arena.flat)
        return value

    def _set_masks(self) -> None:
        """Masks of the kept rows where some are pruned; densities."""
        self._masked: list[LayerState] = []
        masks: list[Tensor] = []
        for layer in self._pruned:
            active = self._active[layer.part]
            self.densities[layer.name] = int(active.sum()) / layer.rows
            assert layer.row_channels is not None
            kept = active[layer.row_channels.kept]
            layer.slot.mask = None
            layer.far = None if self._far is None else self._far[layer.part]
            if not bool(kept.all()):
                mask = self._scores.new_zeros(layer.row_channels.stored)
                mask[: len(kept)] = kept
                layer.slot.mask = mask.requires_grad_()
                self._masked.append(layer)
                masks.append(mask)
            layer.signed = not layer.window or (layer.far is not None and bool(layer.far.any()))
        assert self._arena is not None
        self.leaves: list[Tensor] = [*self._arena.leaves, *self._loose_leaves, *masks]

    # -- rebuild ---------------------------------------------------------------------------------------------------

    def _rebuild(self, keep: Tensor) -> None:
        """A plan that keeps ``keep``, a new arena, and a program that runs on it."""
        flow, old = self.flow, self._arena
        plan = Plan(flow, {la.name: keep[la.part] for la in self._pruned}, self.multiple, self._exact)
        changed = self._changed_layers(plan)
        if old is not None:
            self.rebuilds += 1
            self._write(old, {layer.name for layer in changed})
        self._move_rows(keep, changed, first=old is None)
        self._keep = keep
        for layer, (rows, columns) in changed.items():
            layer.row_channels, layer.column_channels = rows, columns
        for norm in self._norms.values():
            layout = flow.layout_in(norm.name)
            width = norm.module.num_features
            norm.channels = all_channels(width, self._device) if layout is None else plan.channels(layout)
            norm.load_statistics()
        self._arena = arena = self._fill(old, {layer.name for layer in changed})
        self._tau = arena.tau
        attach(arena, self._layers.values(), self._norms.values())
        kind = CompiledUpdate if self.compiled else PlainUpdate
        self._update = kind(arena, self._pruned, self._loose, self._scores, self.options)
        layers = {name: layer.slot for name, layer in self._layers.items()}
        norms = {name: norm.slot for name, norm in self._norms.items()}
        self.program = Program(flow, plan, layers, norms, prefers_channels_last(flow), self.compiled)

    def _changed_layers(self, plan: Plan) -> dict[LayerState, tuple[Channels, Channels]]:
        """Layers whose kept rows or columns are others under ``plan``, with these."""
        changed = {}
        for name, layer in self._layers.items():
            layout = self.flow.layout_in(name) if self.flow.layers[name].kind == "layer" else None
            rows = plan.rows.get(name) or all_channels(layer.rows, self._device)
            columns = all_channels(layer.inputs, self._device) if layout is None else plan.channels(layout)
            if not (same_channels(rows, layer.row_channels) and same_channels(columns, layer.column_channels)):
                changed[layer] = rows, columns
        return changed

    def _move_rows(self, keep: Tensor, changed: Iterable[LayerState], first: bool) -> None:
        """Rows that come back make the steps they have missed; rows that go are the model's from now on."""
        dropped = self._dropped
        if dropped.moving and bool((back := keep & ~self._keep).any()):
            dropped.catch_up(back)
        gone = ~keep if first else self._keep & ~keep
        dropped.leave(gone)
        if self.options.momentum and not (first and self._fresh):
            for layer in changed:
                if layer.is_threshold:
                    dropped.measure(layer, gone)
        dropped.settle(~keep)

    def _fill(self, old: Arena | None, changed: set[str]) -> Arena:
        """An arena for the channels that layers and norms have now: ``changed`` layers from the model."""
        layers, norms = self._layers.values(), self._norms.values()
        shares = shares_of(self.flow, layers, norms)
        arena = Arena(shares, len(self._scores), self._scores, bool(self.options.momentum))
        for key, full, momentum in self._tensors():
            if old is not None and key[1] == "w" and key[0] not in changed:
                arena.take_over(key, old)
                continue
            shares[key].load(full, arena.flat)
            if momentum is not None:
                shares[key].load(momentum, arena.velocity)
        arena.tau.copy_(self._tau)
        if self.options.momentum and old is not None:
            arena.tau_momentum.copy_(old.tau_momentum)
        elif self.options.momentum:
            for layer in self._pruned:
                assert layer.threshold_momentum is not None
                arena.tau_momentum[layer.part] = layer.threshold_momentum
        return arena

    def _tensors(self) -> Tensors:
        for part in self._parts:
            yield from part.tensors()

    # -- the step, and the end -------------------------------------------------------------------------------------

    def advance(self, grads: tuple[Tensor | None, ...]) -> None:
        """One SGD step with the gradients of ``leaves``."""
        assert self._arena is not None
        arena, loose = len(self._arena.leaves), len(self._loose_leaves)
        masks = {layer.name: g for layer, g in zip(self._masked, grads[arena + loose :])}
        self._dropped.clock += 1
        self._stale = True
        self._update(grads[:arena], grads[arena : arena + loose], masks)

    def store(self) -> None:
        """Write the whole state into the model's tensors and the momentum."""
        arena, steps = self._arena, self._dropped.clock
        if arena is None:
            return
        # Without a step only the guard can have changed anything: the thresholds.
        if steps:
            self._write(arena, self._layers)
            if self._dropped.moving:
                self._dropped.catch_up(~self._keep)
        for norm in self._norms.values():
            if norm.module.num_batches_tracked is not None:
                norm.module.num_batches_tracked += steps
        for layer in self._pruned:
            assert layer.threshold is not None
            layer.threshold.copy_(arena.tau[layer.part])
            if layer.threshold_momentum is not None:
                layer.threshold_momentum.copy_(arena.tau_momentum[layer.part])

    def _write(self, arena: Arena, layers: Container[str]) -> None:
        """Weights of ``layers``, and all vectors and statistics, which a rebuild reads again."""
        for key, full, momentum in self._tensors():
            if key[1] == "w" and key[0] not in layers:
                continue
            arena.shares[key].store(full, arena.flat)
            if momentum is not None:
                arena.shares[key].store(momentum, arena.velocity)
        for norm in self._norms.values():
            norm.store_statistics()

"""The compact copy of a model during a training: read, kept under the plan of the current masks, written back.

Weights and momentum stay compact across steps (arena.py), and only a mask that changes costs a rebuild. Rows that are
dropped stay in the model's own tensors (dropped.py); dropped columns of kept rows are stepped eagerly, for the
estimator's sign term moves them.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ... import native
from ...layers import ThresholdLayer
from ...reference import WINDOW
from ...training import SGDOptions
from ..graph.flow import Flow
from ..graph.layout import Layout
from ..plan.plan import Channels, Plan
from ..plan.rows import Rows, layer_states, norm_states
from ..plan.state import (
    LayerState,
    NormState,
    Tensors,
    all_channels,
    channels_of,
    channels_of_norm,
    per_filter,
    same_channels,
    slots_of,
)
from ..run.fusion import always_fused, prefers_channels_last
from ..run.memory import Memory
from ..run.program import Program
from ..run.scope import Scope
from .arena import Arena, attach, shares_of
from .dropped import DroppedRows
from .flat_update import FlatUpdate
from .update import CompiledUpdate, Loose, PlainUpdate, Update

__all__ = ["Session", "settings_of"]

# Bytes at multiples of which tensors begin on a GPU.
ALIGNMENT = 32


class Masks(Enum):
    """What is known of the masks of the next forward."""

    UNREAD = "nothing: the model's tensors have not been read in this training"
    OPEN = "the last step, or the guard, may have changed them"
    KNOWN = "they are those of the plan"


class Buffers(Enum):
    """What the model-sized momentum buffers of a training hold when it begins."""

    NONE = "there is no momentum"
    STATE = "the momentum to go on from"
    ANYTHING = "what was in memory; the momentum is 0"
    ZEROS = "zeros, written since"

    @property
    def fresh(self) -> bool:
        return self in (Buffers.ANYTHING, Buffers.ZEROS)


def settings_of(flow: Flow) -> tuple[object, ...]:
    """What layers and norms are told to do and somebody may change between two trainings."""
    p0 = next(flow.model.parameters())
    layers = (op.module for op in flow.layers.values())
    rules = ((m.estimator, m.mask_bias) for m in layers if isinstance(m, ThresholdLayer))
    norms = ((m.momentum, m.eps) for m in (op.module for op in flow.norms.values()))
    return (p0.dtype, p0.device, *rules, *norms)


class Session:
    """One training after another of one model; what depends on the masks alone is made once for as long as they stay.

    A training is :meth:`load`, any number of :meth:`refresh` and :meth:`advance`, :meth:`store`.

    Args:
        flow: the traced model.
        multiple, compiled, patience: see :class:`~spafl_kernels.compact.CompactTrainer`.
        gpu: lay out plans and weights for the products of a GPU; None: if the model is not on a CPU.

    Attributes:
        program: the forward pass under the current plan, after :meth:`refresh`.
        copied: the names of the model's parameters that have a compact copy.
        leaves: what :meth:`advance` takes the gradients of, after :meth:`refresh`.
        densities: of every threshold layer in its last forward.
        rebuilds: plans made after the first in this training.
        settings: see :func:`settings_of`; with others, a new session is needed.
    """

    program: Program
    leaves: list[Tensor]
    copied: dict[nn.Parameter, str]
    options: SGDOptions
    densities: dict[str, float]
    rebuilds: int
    _update: Update
    _in_one_call: bool
    _tau: Tensor
    _keep: Tensor
    _active: Tensor
    _needed: Tensor  # rows that must be computed; the plan may keep more for a while
    _momentum: Mapping[str, Tensor]

    def __init__(self, flow: Flow, multiple: int, compiled: bool, patience: float, gpu: bool | None = None) -> None:
        self.flow, self.multiple, self.settings = flow, multiple, settings_of(flow)
        self.patience = patience
        # Of a step's work, what idle filters take now; and what they have taken since the plan was made, in steps.
        self._idle_share = self._idle_steps = 0.0
        p0 = next(flow.model.parameters())
        self._device = p0.device
        known = p0.device.type == "cpu" and p0.dtype in (torch.float32, torch.float64)
        self.compiled = compiled and known and native.available()
        self._layers = layer_states(flow)
        self._rows = Rows(flow, self._layers.values())
        self._norms = norm_states(flow)
        self._parts: list[LayerState | NormState] = [*self._layers.values(), *self._norms.values()]
        self._pruned = self._rows.layers
        # Scores of all filters. Like all vectors over filters it has the threshold layers one after another.
        self._scores = torch.empty(sum(layer.rows for layer in self._pruned), dtype=p0.dtype, device=p0.device)
        self._far: Tensor | None = None
        self._window: Tensor | None = None
        if any(layer.window for layer in self._pruned):
            window = [torch.full((la.rows,), la.window, device=self._device) for la in self._pruned]
            self._window = torch.cat(window)
        self._dropped = DroppedRows(self._pruned, self._scores)
        self._steady = all(condition.fixed for condition in self._rows.conditions)
        self._exact = always_fused(flow) if self.compiled else set()
        self._gpu = self._device.type != "cpu" if gpu is None else gpu
        self._channels_last = prefers_channels_last(flow, self._gpu)
        self._all_channels: dict[int, Channels] = {}
        self._memory = Memory(self._scores)
        # Threshold layers that run as they are: autograd and the loose parameters know all of them but the guard.
        self._apart: dict[str, Any] = {name: flow.model.get_submodule(name) for name in flow.apart}
        self._arena: Arena | None = None
        self._masks = Masks.UNREAD

    # -- the beginning ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: SGDOptions,
        momentum: Mapping[str, Tensor],
        fresh: bool,
        densities: dict[str, float],
    ) -> None:
        """Take hold of the model's tensors; the first :meth:`refresh` reads them.

        Args:
            parameters: all of the model's, by name.
            options: settings of the training.
            momentum: a full-size buffer for every parameter; empty without momentum.
            fresh: momentum starts at 0, and whatever the buffers hold is to be overwritten.
            densities: of every threshold layer in its last forward.
        """
        self.options, self.densities, self.rebuilds = options, densities, 0
        self._momentum = momentum
        self._buffers = (Buffers.ANYTHING if fresh else Buffers.STATE) if momentum else Buffers.NONE
        for part in self._parts:
            part.read(momentum)
        self._loose_names = loose = [*self.flow.loose, *(self.flow.unused if options.penalty else ())]
        thresholds = {f"{name}.threshold" if name else "threshold" for name in self._apart}
        self._loose = Loose(
            [parameters[name].data for name in loose],
            [momentum[n] for n in loose] if momentum else [],
            frozenset(i for i, name in enumerate(loose) if name in thresholds),
        )
        self._loose_leaves: list[Tensor] = [parameters[name] for name in loose]
        self.copied = {p: name for name, p in parameters.items() if name not in loose}
        if self._buffers is Buffers.ANYTHING:
            for buffer in self._loose.momenta:  # every step works on them
                buffer.zero_()
        for layer in self._pruned:
            self._score(layer)
        self._tau = torch.cat([layer.threshold for layer in self._pruned]) if self._pruned else self._scores
        self._spoiled = self._rows.spoiled([self._scores])
        # The compiled step knows one learning rate, plain momentum, and one coefficient of the penalty.
        self._in_one_call = (
            self.compiled and not options.nesterov and options.threshold_lr is None and options.penalty_scales is None
        )
        self._dropped.begin(options)
        self._masks = Masks.UNREAD
        self._collapsed = self._find_collapsed()

    def _score(self, layer: LayerState) -> None:
        """:func:`~spafl_kernels.reference.filter_scores` of the model's weight, without its temporary tensor."""
        weight = layer.weight.flatten(1)
        size = torch.abs(weight, out=self._memory.take("rows", weight.shape))
        torch.mean(size, 1, out=self._scores[layer.part])

    def _clear_momentum(self) -> None:
        """Fresh buffers are set to 0 before they are first looked at, which most trainings never do."""
        if self._buffers is Buffers.ANYTHING:
            self._buffers = Buffers.ZEROS
            for name, buffer in self._momentum.items():
                if name not in self._loose_names:
                    buffer.zero_()
            for layer in self._layers.values():
                if layer.copied and layer.momentum is not None:
                    layer.momentum.zero_()

    # -- masks -----------------------------------------------------------------------------------------------------

    def _find_collapsed(self) -> list[LayerState]:
        floor = self.options.collapse_floor
        return [] if floor is None else [la for la in self._pruned if self.densities[la.name] <= floor]

    @torch.no_grad()
    def refresh(self) -> None:
        """What happens at the start of a forward: guard, masks, and a new plan if a row's class changed."""
        self.guard()
        self._observe_apart()
        if self._masks is Masks.KNOWN:
            return
        scores, tau = self._scores, self._tau
        revived, read = False, self._masks is not Masks.UNREAD
        if read:
            self._update.rescore()
            # Elsewhere than on a CPU every question below waits for the device; mostly this one answers all.
            asks = self._device.type != "cpu" and self._idle_steps < self.patience and not self._collapsed
            if asks and not bool(self.drift(self._dropped.clock, self._dropped.clock)):
                self._masks = Masks.KNOWN
                return
            revived = self._dropped.moving and self._dropped.look(tau, ~self._keep, self._window)
        far = None
        if self._window is not None:
            far = ((scores - tau).abs() > WINDOW) & self._window
            far = far if bool(far.any()) else None
        overdue = self._idle_share > 0 and self._idle_steps >= self.patience
        settled = read and self._steady and far is None and self._far is None and not overdue
        if settled and not (self._update.flipped or self._collapsed or revived):
            self._masks = Masks.KNOWN
            return
        active = scores > tau
        if read and not self._spoiled:
            self._spoiled = not math.isfinite(scores.sum().item())
        keep = self._rows.kept(active, self, self._far_rows(far), self._spoiled)
        made = True
        if not read:
            made = self._begin(keep)
        elif self._bears(keep):
            made = False
        elif made := not torch.equal(keep, self._keep):
            self._rebuild(keep)
        # A row that was pruned since the plan was made may be needed again though it stays pruned.
        other = made or not torch.equal(active, self._active)
        other = other or (keep is not active and not torch.equal(keep, self._needed))
        if other or far is not None or self._far is not None:
            self._active, self._needed, self._far = active, keep, far
            self._set_masks()
        self._masks = Masks.KNOWN
        self._collapsed = self._find_collapsed()
        self._update.set_masks(active)

    @torch.no_grad()
    def guard(self) -> None:
        """The collapse guard: thresholds of layers that the last forward left hardly any filter."""
        for layer in self._collapsed:
            self._tau[layer.part].zero_()
            self._reopen()

    def _reopen(self) -> None:
        if self._masks is Masks.KNOWN:
            self._masks = Masks.OPEN

    def penalty(self) -> Tensor | None:
        """The penalty of threshold layers that run as they are, which the update does not know."""
        if not self._apart or not self.options.penalty:
            return None
        thresholds = [(name, m.threshold) for name, m in self._apart.items() if m.threshold.requires_grad]
        return self.options.penalty_over(thresholds) if thresholds else None

    def _observe_apart(self) -> None:
        """Guard and densities of the threshold layers that run as they are."""
        floor = self.options.collapse_floor
        for name, m in self._apart.items():
            if floor is not None and self.densities[name] <= floor:
                m.threshold.data.zero_()
            self.densities[name] = m.density()

    @torch.no_grad()
    def rescore(self) -> None:
        """Bring the scores of the kept rows up to date after a step; :meth:`refresh` does so itself."""
        self._update.rescore()

    @torch.no_grad()
    def drift(self, clock: Tensor | int, most: int) -> Tensor:
        """Whether the next forward may want other masks or rows than the present plan has: a bool, on the device.

        Never False where they changed; True without need where a dropped row moves and its bound exceeds its threshold.
        Nothing waits for the device, nor depends on what the host knows of the steps but its arguments, so the call can
        be recorded into a CUDA graph.

        Args:
            clock: steps of this training so far; int64 scalar on the device, or a number.
            most: the largest ``clock`` that can be judged; above it the answer is True if dropped rows move.
        """
        scores, tau = self._scores, self._tau
        active = scores > tau
        changed = active != self._active
        if self._window is not None:
            far = ((scores - tau).abs() > WINDOW) & self._window
            changed |= far if self._far is None else far != self._far
        if not self._steady:
            far_rows = {la.name: la.far for la in self._pruned if la.window and la.signed and la.far is not None}
            changed |= self._rows.kept(active, self, far_rows, self._spoiled) & ~self._needed
        if self._dropped.moving:
            changed |= self._dropped.suspects(tau, ~self._keep, self._window, clock, most)
        return changed.any()

    def _bears(self, keep: Tensor) -> bool:
        """Whether the present plan has all that is to be kept, and more for not too long."""
        return self._idle_steps < self.patience and not bool((keep & ~self._keep).any())

    def _far_rows(self, far: Tensor | None) -> dict[str, Tensor]:
        """By window layer, where the window lets gradients through; layers without any are left out."""
        if far is None:
            return {}
        known = far.cpu()
        return {la.name: far[la.part] for la in self._pruned if la.window and bool(known[la.part].any())}

    def in_front(self, layer: LayerState, norm: str, layout: Layout | None, zero: bool = False) -> Tensor:
        """See :class:`~spafl_kernels.compact.plan.conditions.Constants`."""
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
        if full is None or self._arena is None or self._masks is Masks.UNREAD:
            return full
        value = torch.empty_like(full)
        self._arena.shares[key].store(value, self._arena.flat, self._memory)
        return value

    def _set_masks(self) -> None:
        """Masks of the kept rows where some are pruned: by conditions, or since the plan was made; densities."""
        self._masked: list[LayerState] = []
        self._set_densities: list[float] = []
        masks: list[Tensor] = []
        computed = used = 0
        # Answers for all layers: every one of these waits for the device.
        active_rows, needed_rows = self._active.cpu(), self._needed.cpu()
        far_rows = None if self._far is None else self._far.cpu()
        for layer in self._pruned:
            assert layer.row_channels is not None
            kept = layer.row_channels.kept
            count = len(kept)
            layer.slot.mask = layer.slot.rows = None
            layer.far = None if self._far is None else self._far[layer.part]
            active = active_rows[layer.part]
            count = int(active.sum())
            if count < len(kept):
                mask = self._scores.new_zeros(layer.row_channels.stored)
                mask[: len(kept)] = self._active[layer.part][kept]
                if torch.equal(active, needed_rows[layer.part]):
                    # Pruned since the plan was made; nothing reads what they would compute.
                    layer.slot.rows = mask
                    used -= layer.work * (len(kept) - count)
                else:
                    layer.slot.mask = mask.requires_grad_()
                    self._masked.append(layer)
                    masks.append(mask)
            computed += layer.work * len(kept)
            used += layer.work * len(kept)
            self.densities[layer.name] = count / layer.rows
            self._set_densities.append(count / layer.rows)
            layer.signed = not layer.window or (far_rows is not None and bool(far_rows[layer.part].any()))
        # An idle filter takes its own products and those of the layers that read it.
        self._idle_share = 1 - (used / max(computed, 1)) ** 2
        assert self._arena is not None
        self.leaves = [*self._arena.leaves, *self._loose_leaves, *masks]

    def rows(self) -> dict[str, tuple[Tensor, Tensor, str]]:
        """Of every threshold layer: which filters are active, which must be computed, and why more than are active."""
        if not hasattr(self, "_needed"):
            return {}
        reasons = self._rows.reasons
        return {
            la.name: (self._active[la.part].cpu(), self._needed[la.part].cpu(), reasons.get(la.name, ""))
            for la in self._pruned
        }

    # -- rebuild ---------------------------------------------------------------------------------------------------

    def _begin(self, keep: Tensor) -> bool:
        """Read the model, into the arena of the last training if that has the right plan; True if a new one is made."""
        arena = self._arena
        with_momentum = bool(self.options.momentum)
        fits = arena is not None and bool(len(arena.velocity)) == with_momentum and torch.equal(keep, self._keep)
        fits = fits and self._still_borrowed() and isinstance(self._update, CompiledUpdate) == self._in_one_call
        if fits:
            assert arena is not None
            self._idle_steps = 0.0
            self._move_rows(keep)
            for norm in self._norms.values():
                norm.load_statistics()
            self._read(arena, None, ())
            self._tau = arena.tau
            self._update.begin(self._loose, self.options)
            for layer, density in zip(self._pruned, self._set_densities):
                self.densities[layer.name] = density
        else:
            self._make(keep, None)
        self._masks = Masks.OPEN
        return not fits

    def _still_borrowed(self) -> bool:
        """Whether the model's tensors lie where the arena has borrowed them."""
        assert self._arena is not None
        for layer in self._pruned:
            borrowed = self._arena.shares[layer.name, "w"].kept.borrowed
            if borrowed is not None and borrowed.data_ptr() != layer.weight.data_ptr():
                return False
        return True

    def _rebuild(self, keep: Tensor) -> None:
        """A new plan in the middle of a training."""
        self._clear_momentum()
        self.rebuilds += 1
        self._make(keep, self._arena)

    def _make(self, keep: Tensor, old: Arena | None) -> None:
        """A plan that keeps ``keep``, a new arena, and a program that runs on it; from the model and from ``old``."""
        flow = self.flow
        self._arena = None  # until all is made: what is left half-way must not be used again
        known = keep.cpu()
        keeps = {la.name: known[la.part] for la in self._pruned}
        plan = Plan(flow, keeps, self.multiple, self._exact, self._gpu, self._device)
        changed = self._changed_layers(plan, old)
        if old is not None:
            self._write(old, [layer.name for layer in changed])
        self._move_rows(keep)
        self._keep, self._idle_steps = keep, 0.0
        for layer, (rows, columns) in changed.items():
            layer.row_channels, layer.column_channels = rows, columns
        for norm in self._norms.values():
            norm.set_channels(channels_of_norm(norm, flow, plan, self._whole))
            norm.load_statistics()
        layers, norms = self._layers.values(), self._norms.values()
        shares = shares_of(flow, layers, norms, borrow=self._in_one_call, last=self._gpu and self._channels_last)
        # The two arenas of a rebuild must not overlap.
        name = "other arena" if old is not None and old.name == "arena" else "arena"
        align = ALIGNMENT // self._scores.element_size() if self._gpu else 1
        arena = Arena(shares, len(self._scores), self._memory, name, bool(self.options.momentum), align)
        self._read(arena, old, [layer.name for layer in changed])
        self._tau = arena.tau
        attach(arena, layers, norms)
        kind = CompiledUpdate if self._in_one_call else FlatUpdate if self._gpu else PlainUpdate
        self._update = kind(arena, self._pruned, self._scores, self.options)
        self._update.begin(self._loose, self.options)
        slots = slots_of(self._layers), slots_of(self._norms)
        self.program = Program(Scope(flow, plan, *slots, self._channels_last, self.compiled))
        self._arena = arena

    def _whole(self, width: int, device: torch.device) -> Channels:
        if width not in self._all_channels:
            self._all_channels[width] = all_channels(width, device)
        return self._all_channels[width]

    def _changed_layers(self, plan: Plan, old: Arena | None) -> dict[LayerState, tuple[Channels, Channels]]:
        """Layers whose kept rows or columns are others under ``plan`` than in ``old``, with these."""
        changed = {}
        for layer in self._layers.values():
            rows, columns = channels_of(layer, self.flow, plan, self._whole)
            if old is None or not (
                same_channels(rows, layer.row_channels) and same_channels(columns, layer.column_channels)
            ):
                changed[layer] = rows, columns
        return changed

    def _move_rows(self, keep: Tensor) -> None:
        """Rows that come back make the steps they have missed; rows that go are the model's from now on."""
        dropped = self._dropped
        if dropped.moving and bool((back := keep & ~self._keep).any()):
            dropped.catch_up(back)
        read = self._masks is not Masks.UNREAD
        gone = self._keep & ~keep if read else ~keep
        if read:
            dropped.leave(gone)
        if self.options.momentum and (read or not self._buffers.fresh):
            dropped.measure(gone)
        dropped.settle(~keep)
        if dropped.moving:
            self._clear_momentum()

    def _read(self, arena: Arena, old: Arena | None, changed: Container[str]) -> None:
        """Fill an arena: from ``old`` the weights of layers that are not ``changed``, all else from the model."""
        blank = self._buffers.fresh and old is None
        if blank:
            arena.velocity.zero_()
        for key, full, momentum in self._tensors():
            if old is not None and key[1] == "w" and key[0] not in changed:
                arena.take_over(key, old)
                continue
            arena.load(key, full, self._memory)
            if momentum is not None and not blank:
                arena.shares[key].load(momentum, arena.velocity, self._memory)
        arena.tau.copy_(self._tau)
        if old is not None:
            arena.tau_momentum.copy_(old.tau_momentum)
        elif not blank:
            for layer in self._pruned:
                if layer.threshold_momentum is not None:
                    arena.tau_momentum[layer.part] = layer.threshold_momentum

    def _tensors(self) -> Tensors:
        for part in self._parts:
            yield from part.tensors()

    # -- the step, and the end -------------------------------------------------------------------------------------

    def advance(self, grads: list[Tensor | None]) -> None:
        """One SGD step with the gradients of ``leaves``; the list is emptied, so that each can be freed once used."""
        assert self._arena is not None
        arena, loose = len(self._arena.leaves), len(self._loose_leaves)
        masks = {layer.name: g for layer, g in zip(self._masked, grads[arena + loose :])}
        self._dropped.clock += 1
        self._idle_steps += self._idle_share
        self._reopen()
        weights, others = grads[:arena], grads[arena : arena + loose]
        grads.clear()
        self._update(weights, others, masks)

    def store(self, steps: int | None = None) -> None:
        """Write the whole state into the model's tensors, and into the momentum unless that began fresh.

        ``steps``: of this training, where some were taken without :meth:`advance` being called, from a CUDA graph.
        """
        counted = steps
        if steps is not None:
            self._dropped.clock = steps
        arena, steps = self._arena, self._dropped.clock
        if self._masks is Masks.UNREAD or arena is None:
            return
        # Without a step only the guard can have changed anything: the thresholds.
        if steps:
            self._write(arena, self._layers, momentum=False)
            if self._dropped.moving:
                self._dropped.catch_up(~self._keep)
            for layer in self._layers.values():
                layer.write_back()
        for norm in self._norms.values():
            if norm.slot.batches and not steps:  # of a step that broke off
                norm.store_statistics()
            norm.count_batches(counted)
        for layer in self._pruned:
            layer.threshold.copy_(arena.tau[layer.part])

    @torch.no_grad()
    def store_momentum(self) -> None:
        """Write the momentum into its buffers, after :meth:`store`."""
        self._clear_momentum()
        arena = self._arena
        if self._masks is Masks.UNREAD or arena is None:
            return
        for key, _, momentum in self._tensors():
            if momentum is not None:
                arena.shares[key].store(momentum, arena.velocity, self._memory)
        for layer in self._layers.values():
            layer.write_back(momentum=True)
        for layer in self._pruned:
            if layer.threshold_momentum is not None:
                layer.threshold_momentum.copy_(arena.tau_momentum[layer.part])

    def _write(self, arena: Arena, layers: Container[str], momentum: bool = True) -> None:
        """Weights of ``layers``, and all vectors and statistics, which a rebuild reads again."""
        for key, full, buffer in self._tensors():
            if key[1] == "w" and key[0] not in layers:
                continue
            arena.store(key, full, self._memory)
            if buffer is not None and momentum:
                arena.shares[key].store(buffer, arena.velocity, self._memory)
        for norm in self._norms.values():
            norm.store_statistics()

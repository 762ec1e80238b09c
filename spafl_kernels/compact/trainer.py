"""The persistent engine: weights and momentum stay compact across steps, and only a mask that changes costs a rebuild.

What is stored where, between ``begin`` and ``finish``:

* the *arena*: one flat parameter tensor, one momentum and one gradient tensor of the same length. Its regions, in
  order: vectors and plain weights; kept weights of threshold layers; their dropped input columns where these are
  constants; dropped columns whose input is 0; parameters without a gradient; all thresholds. Autograd sees the leading
  regions as leaves, and an SGD step is three calls for the whole model.
* rows that are dropped stay in the model's own tensors. Their loss gradient is exactly 0, so momentum and weight decay
  move them by a fixed linear map per step, ``(w, v) <- M (w, v)``; ``k`` steps are ``M^k``, applied when somebody needs
  the row. Until then ``|a_k| mean|w| + |b_k| mean|v|`` bounds the row's score from above; only a row whose bound
  exceeds its threshold is looked at.
* dropped columns of kept rows are stepped eagerly: the estimator's sign term moves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import native
from ..layers import ThresholdLayer
from ..ops.step import FilterRows, threshold_step
from ..reference import WINDOW, filter_scores
from ..training import Loss, MaskedTrainer, SGDOptions, Trainer, TrainResult, Unsupported
from .flow import Flow, Layout, check_traceable, trace_flow
from .plan import Channels, Plan
from .program import NormSlot, Program, always_fused, prefers_channels_last
from .state import (
    Condition,
    Gather,
    LayerState,
    Piece,
    Powers,
    VectorGather,
    all_channels,
    full_name,
    per_filter,
    put_rows,
    same_channels,
)

__all__ = ["CompactTrainer"]


class CompactTrainer(Trainer):
    """Equal to :class:`~spafl_kernels.training.MaskedTrainer`, on compact weights and activations.

    The channels are followed when the first batch shows the input shape; if that fails the trainer becomes a masked one
    (``engine`` and ``reason`` say so) or raises in strict mode.

    Args:
        model, loss: see :class:`~spafl_kernels.training.Trainer`.
        strict: raise :class:`~spafl_kernels.training.Unsupported` instead of falling back.
        multiple: convolutions keep a multiple of this many filters.
        compiled: use the compiled operators where the extension is there; otherwise plain PyTorch.

    Raises:
        Unsupported: the model has no threshold layers, or cannot be traced.
    """

    engine = "compact"

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        strict: bool = False,
        multiple: int = 8,
        compiled: bool = True,
    ) -> None:
        super().__init__(model, loss)
        if not any(isinstance(m, ThresholdLayer) for m in model.modules()):
            raise Unsupported("the model has no threshold layers")
        check_traceable(model)
        self.strict, self.multiple, self.compiled = strict, multiple, compiled
        self.reason = "all channels can be traced"
        self._flows: dict[tuple[int, ...], Flow] = {}
        self._scratch: dict[str, Tensor] = {}
        self._fallback: MaskedTrainer | None = None
        self._parameters = dict(model.named_parameters())

    # -- interface -------------------------------------------------------------------------------------------------

    def begin(
        self,
        options: SGDOptions,
        momentum: Mapping[str, Tensor] | None = None,
        densities: Mapping[str, float] | None = None,
    ) -> None:
        start = self._start(options, momentum, densities)
        try:
            self._check_parameters()
        except RuntimeError:
            self._open = False
            raise
        self._options, self._given, self._density = options, momentum, start
        self._flow: Flow | None = None
        self._steps = self._macs = self._rebuilds = 0
        if self._fallback is not None:
            self._fallback.begin(options, momentum, densities)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self._check_open()
        if not self._ready(x):
            assert self._fallback is not None
            return self._fallback.step(x, y)
        self._refresh()
        loss = self.loss(self._program(x, True), y)
        grads: tuple[Tensor | None, ...] = (None,) * len(self._leaves)
        if loss.requires_grad:  # not so when the whole last layer is pruned
            grads = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        with torch.no_grad():
            self._update(grads)
        self._steps += 1
        self._macs += self._program.macs * len(x) + self._program.macs_fixed
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_open()
        if not self._ready(x):
            assert self._fallback is not None
            return self._fallback.evaluate(x, y)
        self._refresh()
        # Modules that run as they are (dropout, attention) read their own flag.
        self.model.eval()
        out = self._program(x, False)
        self.model.train()
        return self.loss(out, y) * len(y), (out.argmax(dim=1) == y).sum()

    @torch.no_grad()
    def finish(self) -> TrainResult:
        if self._result is not None:
            return self._result
        self._check_open()
        if self._fallback is not None:
            self._result = self._fallback.finish()
        else:
            if self._flow is not None:
                # Whatever happens, this training is over: nothing compact may be written into a changed model.
                self._open = False
                self._check_parameters(self._versions)
                self._write_all()
            momentum = {}
            if self._options.momentum:
                momentum = dict(self._given) if self._given else self._own_momentum(self._flow is None)
            self._result = TrainResult(
                densities=dict(self._density),
                macs=self._macs,
                steps=self._steps,
                rebuilds=self._rebuilds,
                momentum=momentum,
            )
        self._open = False
        return self._result

    def explain(self) -> str:
        """Which engine runs and why; after the first batch also which channels are followed and where they stop."""
        return "\n".join([f"{self.engine}: {self.reason}", *(flow.explain() for flow in self._flows.values())])

    # -- start -----------------------------------------------------------------------------------------------------

    def _check_parameters(self, versions: dict[str, tuple[int, int]] | None = None) -> None:
        now = dict(self.model.named_parameters())
        if now.keys() != self._parameters.keys() or any(now[k] is not p for k, p in self._parameters.items()):
            raise RuntimeError("parameters of the model were replaced; make a new trainer (p.data may be swapped)")
        for name, p in now.items():
            if not p.requires_grad:
                raise RuntimeError(f"requires_grad of {name!r} was switched off; make a new trainer")
            if versions is not None and (p.data_ptr(), p._version) != versions[name]:
                raise RuntimeError(f"{name!r} was changed by somebody else between begin() and finish()")

    def _ready(self, x: Tensor) -> bool:
        """True once the compact state exists; False if the masked trainer has taken over."""
        if self._flow is not None:
            if x.shape[1:] != self._flow.image:
                raise ValueError(
                    f"x must have the sample shape this training began with, {tuple(self._flow.image)}; "
                    f"got {tuple(x.shape[1:])}"
                )
            return True
        if self._fallback is not None:
            return False
        image = tuple(x.shape[1:])
        try:
            if image not in self._flows:
                self._flows[image] = trace_flow(self.model, image)
        except Unsupported as error:
            if self.strict:
                raise
            self._fallback = MaskedTrainer(self.model, self.loss, str(error))
            self.engine, self.reason = "masked", str(error)
            self._fallback.begin(self._options, self._given, self._density)
            return False
        with torch.no_grad():
            self._load(self._flows[image])
        return True

    def _own_momentum(self, clear: bool) -> dict[str, Tensor]:
        if not self._scratch:
            self._scratch = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        elif clear:
            for v in self._scratch.values():
                v.zero_()
        return self._scratch

    def _load(self, flow: Flow) -> None:
        """Read the model; the first refresh makes the plan."""
        self.model.train()
        options = self._options
        self._flow = flow
        momentum: Mapping[str, Tensor] = {}
        if options.momentum:
            momentum = self._given or self._own_momentum(True)
        self._fresh = not self._given
        self._versions = {name: (p.data_ptr(), p._version) for name, p in self._parameters.items()}
        p0 = next(iter(self._parameters.values()))
        self._dtype, self._device = p0.dtype, p0.device
        floats = (torch.float32, torch.float64)
        known = self._device.type == "cpu" and self._dtype in floats
        self._compiled = self.compiled and known and native.available()

        self._layers: dict[str, LayerState] = {}
        count = 0
        for name, op in flow.layers.items():
            self._layers[name] = layer = LayerState(name, op.module, count)
            layer.read(momentum)
            count += layer.rows if layer.is_threshold else 0
        self._pruned = [layer for layer in self._layers.values() if layer.is_threshold]
        self._tau_full = {layer.name: layer.module.threshold.data for layer in self._pruned}
        self._tau_momentum = (
            {layer.name: momentum[full_name(layer.name, "threshold")] for layer in self._pruned} if momentum else None
        )
        self._norms = {name: op.module for name, op in flow.norms.items()}
        self._norm_slots = {
            name: NormSlot(None, None, m.running_mean, m.running_var) for name, m in self._norms.items()
        }
        self._norm_momentum = momentum
        self._norm_channels: dict[str, Channels | None] = {}
        self._loose = [self._parameters[name].data for name in flow.loose]
        self._loose_leaves = [self._parameters[name] for name in flow.loose]
        self._loose_momentum = [momentum[name] for name in flow.loose] if momentum else None

        def flat(values: list[Tensor]) -> Tensor:
            return torch.cat(values) if values else torch.empty(0, dtype=self._dtype, device=self._device)

        self._scores = flat([filter_scores(layer.module.weight.data) for layer in self._pruned])
        self._tau = flat([self._tau_full[layer.name] for layer in self._pruned])
        self._moving_mean = torch.zeros_like(self._scores)
        self._base = torch.zeros(count, dtype=torch.int64, device=self._device)
        self._keep = torch.zeros(count, dtype=torch.bool, device=self._device)
        self._active = self._keep.clone()
        self._far: Tensor | None = None
        window = [torch.full((la.rows,), la.window, device=self._device) for la in self._pruned]
        self._window_rows = torch.cat(window)
        self._any_window = any(layer.window for layer in self._pruned)
        self._conditions = [c for layer in self._pruned if (c := Condition.of(flow, layer)) is not None]
        self._exact = always_fused(flow) if self._compiled else set()
        self._steady = all(condition.fixed for condition in self._conditions)
        self._rows: FilterRows | None = None
        self._flipped = False
        self._clock = 0
        self._powers = Powers(options, self._dtype, self._device)
        self._plan: Plan | None = None
        self._pieces: dict[tuple[str, str], Piece] = {}
        self._moving = False
        self._stale = True
        self._collapsed = self._find_collapsed()

    def _find_collapsed(self) -> list[LayerState]:
        floor = self._options.collapse_floor
        return [] if floor is None else [la for la in self._pruned if self._density[la.name] <= floor]

    # -- masks -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _refresh(self) -> None:
        """What happens at the start of a forward: guard, masks, and a new plan if a row's class changed."""
        for layer in self._collapsed:
            self._tau[layer.begin : layer.begin + layer.rows] = 0
            self._stale = True
        if not self._stale:
            return
        first = self._plan is None
        scores, tau = self._scores, self._tau
        if self._rows is None and not first:
            self._score()
        revived = self._moving and self._look_at_dropped_rows()
        if self._rows is not None and self._steady and not (self._flipped or self._collapsed or revived):
            passes = self._any_window and bool((((scores - tau).abs() > WINDOW) & self._window_rows).any())
            if not passes and self._far is None:
                self._stale = False
                return
        active = scores > tau
        far: Tensor | None = None
        if self._any_window:
            far = ((scores - tau).abs() > WINDOW) & self._window_rows
            far = far if bool(far.any()) else None
        keep = self._kept_rows(active, far)
        if new := first or not torch.equal(keep, self._keep):
            self._rebuild(keep)
        if new or not torch.equal(active, self._active) or far is not None or self._far is not None:
            self._active, self._far = active, far
            self._set_masks()
        self._stale = False
        self._collapsed = self._find_collapsed()
        if self._rows is not None:
            self._next.copy_(active)

    def _score(self) -> None:
        torch.abs(self._flat[self._abs_from : self._abs_to], out=self._absolute)
        for rows, dead, out in self._score_views:
            torch.sum(rows, 1, out=out)
            if dead is not None:
                out += dead.sum(1)
        self._scores.index_copy_(0, self._kept_index, self._row_sums.index_select(0, self._kept_place) / self._row_size)

    def _look_at_dropped_rows(self) -> bool:
        """Bring the scores of dropped rows up to date where their bounds do not suffice; True if one is active."""
        dropped = ~self._keep
        unsure = (self._bounds() > self._tau) & dropped
        if self._any_window:
            unsure |= dropped & self._window_rows & (self._tau > WINDOW)
        if not bool(unsure.any()):
            return False
        self._catch_up(unsure)
        return bool(((self._scores > self._tau) & dropped).any())

    def _bounds(self) -> Tensor:
        """Upper bounds of the dropped rows' scores (kept rows: anything)."""
        a, b, _, _ = self._powers.at(self._clock - self._base)
        slack = 1 + 8 * torch.finfo(self._dtype).eps
        bound = (a.abs() * self._scores + b.abs() * self._moving_mean) * slack
        still = (self._moving_mean == 0) & (a == 1)
        return torch.where(still, self._scores, bound)

    def _catch_up(self, rows: Tensor) -> None:
        """Apply the steps that dropped rows have missed; ``rows``: bool over all thresholds."""
        for layer in self._pruned:
            index = rows[layer.begin : layer.begin + layer.rows].nonzero().flatten()
            if not len(index):
                continue
            place = index + layer.begin
            a, b, c, d = (t.view(-1, 1, 1) for t in self._powers.at(self._clock - self._base[place]))
            w = layer.weight[index]
            if layer.momentum is None:
                w = a * w
            else:
                v = layer.momentum[index]
                w, v = a * w + b * v, c * w + d * v
                layer.momentum[index] = v
                self._moving_mean[place] = v.flatten(1).abs().mean(1)
            layer.weight[index] = w
            self._scores[place] = filter_scores(w)
            self._base[place] = self._clock

    def _kept_rows(self, active: Tensor, far: Tensor | None) -> Tensor:
        keep = active
        for condition in self._conditions:
            layer = condition.layer
            part = slice(layer.begin, layer.begin + layer.rows)
            carry = condition.carry(self, None if not layer.window else far)
            if carry is not None:
                if keep is active:
                    keep = active.clone()
                keep[part] |= carry
        return keep

    def _constant_in_front(self, layer: LayerState, norm: str, layout: Layout | None, zero: bool = False) -> Tensor:
        """By filter: the constant a pruned filter has in front of ReLU; with ``zero``: 1 where it is 0, else 0."""
        if not norm:
            value = self._current(layer.name, "b", layer.bias, layer.row_channels)
            return self._scores.new_zeros(layer.rows) if value is None or layer.mask_bias else value
        assert layout is not None
        m = self._norms[norm]
        bias = None if m.bias is None else m.bias.data
        value = self._current(norm, "nb", bias, self._norm_channels.get(norm))
        if value is None:
            value = self._scores.new_zeros(layout.width)
        return per_filter((value == 0).to(self._dtype) if zero else value, layout, layer.name, layer.rows)

    def _current(self, name: str, key: str, full: Tensor | None, channels: Channels | None) -> Tensor | None:
        """A vector at full width as it is now: from the arena, or from the model before the first plan."""
        if full is None or self._plan is None or channels is None:
            return full
        value = torch.empty_like(full)
        value[channels.kept] = self._pieces[name, key].of(self._flat)[: len(channels.kept)]
        if len(channels.dropped):
            value[channels.dropped] = self._pieces[name, key + "d"].of(self._flat)
        return value

    def _set_masks(self) -> None:
        """Masks of the kept rows where some are pruned; densities."""
        self._masks: list[LayerState] = []
        for layer in self._pruned:
            active = self._active[layer.begin : layer.begin + layer.rows]
            self._density[layer.name] = int(active.sum()) / layer.rows
            assert layer.row_channels is not None
            kept = active[layer.row_channels.kept]
            layer.slot.mask = None
            layer.far = None if self._far is None else self._far[layer.begin : layer.begin + layer.rows]
            if not bool(kept.all()):
                mask = torch.zeros(layer.row_channels.stored, dtype=self._dtype, device=self._device)
                mask[: len(kept)] = kept
                layer.slot.mask = mask.requires_grad_()
                self._masks.append(layer)
            layer.signed = not layer.window or (layer.far is not None and bool(layer.far.any()))
            if not layer.signed and layer.dead_grad is not None:
                layer.dead_grad.zero_()
        masks = [layer.slot.mask for layer in self._masks if layer.slot.mask is not None]
        self._leaves: list[Tensor] = [*self._arena_leaves, *self._loose_leaves, *masks]

    # -- rebuild ---------------------------------------------------------------------------------------------------

    def _rebuild(self, keep: Tensor) -> None:
        flow, first = self._flow, self._plan is None
        assert flow is not None
        masks = {la.name: keep[la.begin : la.begin + la.rows] for la in self._pruned}
        plan = Plan(flow, masks, self.multiple, self._exact)
        if not first:
            self._rebuilds += 1
        changed = []
        for layer in self._layers.values():
            layout = flow.layout_in(layer.name) if flow.layers[layer.name].kind == "layer" else None
            rows = plan.rows.get(layer.name) or all_channels(layer.rows, self._device)
            columns = all_channels(layer.inputs, self._device) if layout is None else plan.channels(layout)
            if first or not (same_channels(rows, layer.row_channels) and same_channels(columns, layer.column_channels)):
                changed.append((layer, rows, columns))
        old_flat = None if first else (self._flat, self._velocity)
        old_pieces = self._pieces
        if not first:
            for layer, _, _ in changed:
                self._write_layer(layer)
            self._write_norms()
        # Rows that come back first make the steps they have missed; rows that go are the model's from now on.
        if self._moving and bool((back := keep & ~self._keep).any()):
            self._catch_up(back)
        gone = ~keep if first else self._keep & ~keep
        self._base[gone] = self._clock
        for layer, rows, columns in changed:
            layer.row_channels, layer.column_channels = rows, columns
            part = gone[layer.begin : layer.begin + layer.rows] if layer.is_threshold else None
            if part is not None and layer.momentum is not None and not (first and self._fresh):
                index = part.nonzero().flatten()
                if len(index):
                    self._moving_mean[index + layer.begin] = layer.momentum[index].abs().mean((1, 2))
        dropped = ~keep
        self._moving = bool(dropped.any()) and (
            self._options.weight_decay > 0 or bool((self._moving_mean[dropped] > 0).any())
        )
        self._keep, self._plan = keep, plan
        again = {layer.name for layer, _, _ in changed}
        self._fill(again, old_pieces, old_flat)
        slots = {name: layer.slot for name, layer in self._layers.items()}
        self._program = Program(flow, plan, slots, self._norm_slots, prefers_channels_last(flow), self._compiled)

    def _fill(
        self, again: set[str], old_pieces: dict[tuple[str, str], Piece], old: tuple[Tensor, Tensor] | None
    ) -> None:
        """Lay the arena out and fill it: layers in ``again`` from the model, the others from the old arena."""
        flow, plan = self._flow, self._plan
        assert flow is not None and plan is not None
        with_momentum = bool(self._options.momentum)
        vectors: list[tuple[Piece, Any]] = []
        weights: list[tuple[Piece, Any]] = []
        constants: list[tuple[Piece, Any]] = []
        columns: list[tuple[Piece, Any]] = []
        still: list[tuple[Piece, Any]] = []

        for layer in self._layers.values():
            op = flow.layers[layer.name]
            rows, cols = layer.row_channels, layer.column_channels
            assert rows is not None and cols is not None
            kernel = layer.module.weight.shape[2:]
            shape = (rows.stored, cols.stored, *kernel)
            region = weights if layer.is_threshold else vectors
            region.append((Piece((layer.name, "w"), shape), layer.name in again and Gather(layer, "kept")))
            if len(cols.dropped):
                source = flow.ops[op.sources[0]]
                shape = (rows.stored, len(cols.dropped), *kernel)
                if layer.is_threshold:
                    region = constants if source.const else columns
                else:
                    region = vectors if source.const else still
                region.append((Piece((layer.name, "wd"), shape), layer.name in again and Gather(layer, "dropped")))
            if layer.bias is not None:
                vectors.append(
                    (Piece((layer.name, "b"), (rows.stored,)), VectorGather(layer.bias, layer.bias_momentum, rows))
                )
                if len(rows.dropped):
                    region = still if layer.mask_bias else vectors
                    gather = VectorGather(layer.bias, layer.bias_momentum, rows, dropped=True)
                    region.append((Piece((layer.name, "bd"), (len(rows.dropped),)), gather))
        for name, m in self._norms.items():
            layout = flow.layout_in(name)
            channels = all_channels(m.num_features, self._device) if layout is None else plan.channels(layout)
            self._norm_channels[name] = channels
            for key, p in (("g", m.weight), ("b", m.bias)):
                if p is None:
                    continue
                v = self._norm_momentum[full_name(name, "weight" if key == "g" else "bias")] if with_momentum else None
                vectors.append((Piece((name, "n" + key), (channels.stored,)), VectorGather(p.data, v, channels)))
                if len(channels.dropped):
                    region = still if key == "g" else vectors
                    gather = VectorGather(p.data, v, channels, dropped=True)
                    region.append((Piece((name, f"n{key}d"), (len(channels.dropped),)), gather))

        order = vectors + weights + constants + columns + still
        parts_p: list[Tensor] = []
        parts_v: list[Tensor] = []
        at = 0
        for piece, gather in order:
            piece.at = at
            at += piece.size
            if gather is False or gather is None:
                assert old is not None
                was = old_pieces[piece.key]
                parts_p.append(old[0][was.at : was.at + was.size])
                if with_momentum:
                    parts_v.append(old[1][was.at : was.at + was.size])
            else:
                p, v = gather.take()
                parts_p.append(p.reshape(-1))
                if with_momentum:
                    parts_v.append(p.new_zeros(piece.size) if v is None else v.reshape(-1))
        parts_p.append(self._tau)
        if with_momentum:
            if old is None:
                assert self._tau_momentum is not None
                parts_v += list(self._tau_momentum.values())
            else:
                parts_v.append(old[1][-len(self._tau) :])
        self._flat = torch.cat(parts_p)
        self._velocity = torch.cat(parts_v) if with_momentum else self._flat.new_empty(0)
        self._grad = torch.zeros_like(self._flat)
        self._tau = self._flat[at:]
        self._tau_grad = self._grad[at:]
        self._pieces = {piece.key: piece for piece, _ in order}

        leaves = vectors + weights + constants
        self._leaf_end = sum(piece.size for piece, _ in leaves)
        self._arena_leaves = []
        tensors: dict[tuple[str, str], Tensor] = {}
        for piece, _ in leaves:
            tensors[piece.key] = piece.of(self._flat).detach().requires_grad_()
            self._arena_leaves.append(tensors[piece.key])
        for piece, _ in columns + still:
            tensors[piece.key] = piece.of(self._flat)
        for name, layer in self._layers.items():
            slot = layer.slot
            slot.weight = tensors[name, "w"]
            slot.weight_dropped = tensors.get((name, "wd"))
            slot.bias, slot.bias_dropped = tensors.get((name, "b")), tensors.get((name, "bd"))
        for name, m in self._norms.items():
            norm, normed = self._norm_slots[name], self._norm_channels[name]
            assert normed is not None
            norm.weight, norm.bias = tensors.get((name, "ng")), tensors.get((name, "nb"))
            norm.weight_dropped, norm.bias_dropped = tensors.get((name, "ngd")), tensors.get((name, "nbd"))
            norm.running_mean = VectorGather(m.running_mean, None, normed).take()[0]
            norm.running_var = VectorGather(m.running_var, None, normed).take()[0]
            if len(normed.dropped):
                norm.mean_dropped = m.running_mean[normed.dropped]
                norm.var_dropped = m.running_var[normed.dropped]
                if norm.bias_dropped is None:
                    norm.bias_dropped = torch.zeros_like(norm.mean_dropped)

        # Views for the threshold mathematics.
        regions = weights + constants + columns
        self._abs_from = regions[0][0].at
        self._abs_to = regions[-1][0].at + regions[-1][0].size
        self._absolute = self._flat.new_empty(self._abs_to - self._abs_from)
        total = sum(layer.row_channels.stored for layer in self._pruned if layer.row_channels is not None)
        self._row_sums = self._flat.new_zeros(total)
        self._row_dots = self._flat.new_zeros(total)
        self._score_views = []
        index, place, sizes, start = [], [], [], 0
        for layer in self._pruned:
            held = layer.row_channels
            assert held is not None
            stop = start + held.stored
            piece, dead = self._pieces[layer.name, "w"], self._pieces.get((layer.name, "wd"))

            def two(piece: Piece, flat: Tensor, rows: Channels = held, offset: int = 0) -> Tensor:
                return flat[piece.at - offset : piece.at - offset + piece.size].view(rows.stored, -1)

            self._score_views.append(
                (
                    two(piece, self._absolute, offset=self._abs_from),
                    None if dead is None else two(dead, self._absolute, offset=self._abs_from),
                    self._row_sums[start:stop],
                )
            )
            layer.kept_rows, layer.kept_grad = two(piece, self._flat), two(piece, self._grad)
            layer.dead_rows = None if dead is None else two(dead, self._flat)
            layer.dead_grad = None if dead is None else two(dead, self._grad)
            layer.dead_const = dead is not None and dead.at < self._leaf_end
            layer.dots = self._row_dots[start:stop]
            index.append(held.kept + layer.begin)
            place.append(torch.arange(start, start + len(held.kept), device=self._device))
            sizes.append(torch.full((len(held.kept),), layer.size, dtype=self._dtype, device=self._device))
            start = stop
        self._kept_index, self._kept_place, self._row_size = torch.cat(index), torch.cat(place), torch.cat(sizes)
        self._vector_count = len(vectors)
        self._rows = self._compiled_rows(still) if self._compiled else None

    def _compiled_rows(self, still: list[tuple[Piece, Any]]) -> FilterRows:
        """The arena as the compiled step wants it."""
        flat, velocity = self._flat, self._velocity
        with_momentum = bool(self._options.momentum)
        tau_at = len(flat) - len(self._tau)
        self._next = self._keep.clone()

        def filters(values: Tensor, offset: int = 0) -> list[Tensor]:
            return [values[offset + la.begin : offset + la.begin + la.rows] for la in self._pruned]

        def pieces(values: Tensor, key: str) -> list[Tensor]:
            found = [self._pieces.get((layer.name, key)) for layer in self._pruned]
            return [values.new_empty(0) if piece is None else piece.of(values) for piece in found]

        rows = FilterRows(
            weights=pieces(flat, "w"),
            thresholds=filters(self._tau),
            scores=filters(self._scores),
            masks=filters(self._next),
            n_in=[layer.size for layer in self._pruned],
            index=[layer.row_channels.kept for layer in self._pruned if layer.row_channels is not None],
            dropped=pieces(flat, "wd"),
            estimators=["window" if layer.window else "identity" for layer in self._pruned],
            weight_momenta=pieces(velocity, "w") if with_momentum else [],
            dropped_momenta=pieces(velocity, "wd") if with_momentum else [],
            threshold_momenta=filters(velocity, tau_at) if with_momentum else [],
        )
        rows.check(self._options.momentum)
        spans = [(0, self._abs_from)]
        if still:
            spans.append((still[0][0].at, tau_at))
        self._other_params = [flat[a:b] for a, b in spans] + self._loose
        self._other_grads = [self._grad[a:b] for a, b in spans]
        self._other_momenta = []
        if with_momentum:
            assert self._loose_momentum is not None
            self._other_momenta = [velocity[a:b] for a, b in spans] + self._loose_momentum
        self._other_flags = [0] * len(self._other_params)
        return rows

    # -- the step --------------------------------------------------------------------------------------------------

    def _update(self, grads: tuple[Tensor | None, ...]) -> None:
        options, grad, flat = self._options, self._grad, self._flat
        n, loose = len(self._arena_leaves), len(self._loose)
        loose_grads = [g if g is not None else torch.zeros_like(p) for g, p in zip(grads[n : n + loose], self._loose)]
        for layer, g in zip(self._masks, grads[n + loose :]):
            layer.mask_grad = g
        self._clock += 1
        self._stale = True
        if self._rows is not None:
            return self._update_compiled(grads, loose_grads)
        self._collect(grads[:n], self._arena_leaves, grad[: self._leaf_end])
        signed = False
        for layer in self._pruned:
            if layer.signed:
                signed = True
                self._sign_term(layer)
        tau_grad = self._tau_grad
        if options.penalty:
            torch.neg(self._tau, out=tau_grad)
            tau_grad.exp_().mul_(-options.penalty)
        else:
            tau_grad.zero_()
        if signed:
            tau_grad.index_add_(0, self._kept_index, self._row_dots.index_select(0, self._kept_place), alpha=-1)
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
                torch._foreach_add_(loose_grads, self._loose, alpha=options.weight_decay)
        if options.momentum:
            grad_or_v = self._velocity.mul_(options.momentum).add_(grad)
            if loose_grads:
                assert self._loose_momentum is not None
                torch._foreach_mul_(self._loose_momentum, options.momentum)
                torch._foreach_add_(self._loose_momentum, loose_grads)
                loose_grads = self._loose_momentum
        else:
            grad_or_v = grad
        flat.add_(grad_or_v, alpha=-options.lr)
        if loose_grads:
            torch._foreach_add_(self._loose, loose_grads, alpha=-options.lr)
        if options.weight_decay:
            # It was added in place; entries that no later gradient overwrites start at 0 again.
            grad[self._leaf_end :].zero_()

    @staticmethod
    def _collect(grads: Sequence[Tensor | None], leaves: Sequence[Tensor], out: Tensor) -> None:
        parts = [g.reshape(-1) if g is not None else leaf.new_zeros(leaf.numel()) for g, leaf in zip(grads, leaves)]
        if parts:
            torch.cat(parts, out=out)

    def _update_compiled(self, grads: tuple[Tensor | None, ...], loose_grads: list[Tensor]) -> None:
        """All of the update, and the scores and masks that follow, in one call."""
        options, rows = self._options, self._rows
        assert rows is not None
        vectors, layers = self._vector_count, len(self._pruned)
        self._collect(grads[:vectors], self._arena_leaves[:vectors], self._grad[: self._abs_from])
        weight_grads: list[Tensor] = []
        for g, leaf in zip(grads[vectors : vectors + layers], self._arena_leaves[vectors:]):
            weight_grads.append(torch.zeros_like(leaf) if g is None else g.contiguous())
        dropped_grads, dots, none, at = [], [], rows.none[0], vectors + layers
        for layer, weight_grad in zip(self._pruned, weight_grads):
            dropped = none
            if layer.dead_const:
                g = grads[at]
                dropped = torch.zeros_like(self._arena_leaves[at]) if g is None else g.contiguous()
                at += 1
            dropped_grads.append(dropped)
            dot = none
            if layer.slot.mask is not None:
                dot = layer.mask_grad if layer.mask_grad is not None else torch.zeros_like(layer.slot.mask)
            elif layer.mask_bias and layer.slot.bias is not None:
                piece = self._pieces[layer.name, "b"]
                dot = (layer.kept_rows * weight_grad.view(layer.kept_rows.shape)).sum(1)
                if layer.dead_const:
                    dot += (layer.dead_rows * dropped.view(layer.dead_rows.shape)).sum(1)
                dot += piece.of(self._flat) * piece.of(self._grad)
            dots.append(dot)
        _, flips = threshold_step(
            rows,
            weight_grads,
            self._other_params,
            self._other_grads + loose_grads,
            self._other_momenta,
            self._other_flags,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            penalty=options.penalty,
            max_norm=options.max_grad_norm,
            dropped_grads=dropped_grads,
            dots=dots,
            check=False,
        )
        self._flipped = bool(flips.any())

    def _sign_term(self, layer: LayerState) -> None:
        """``r_i = sum_j G_ij w_ij`` of every kept row, and ``r_i sign(w_ij) / n_in`` added to the gradient."""
        w, g, dead, dead_grad = layer.kept_rows, layer.kept_grad, layer.dead_rows, layer.dead_grad
        if layer.slot.mask is not None:
            r = layer.mask_grad
        else:
            r = (w * g).sum(1)
            if layer.dead_const:
                r += (dead * dead_grad).sum(1)
            if layer.mask_bias and layer.slot.bias is not None:
                piece = self._pieces[layer.name, "b"]
                r += piece.of(self._flat) * piece.of(self._grad)
        if layer.far is not None:
            assert layer.row_channels is not None
            passes = torch.zeros_like(r)
            passes[: len(layer.row_channels.kept)] = layer.far[layer.row_channels.kept].to(r.dtype)
            r = r * passes
        layer.dots.copy_(r)
        rho = (r / layer.size).unsqueeze(1)
        g.addcmul_(w.sign(), rho)
        if layer.dead_const:
            dead_grad.addcmul_(dead.sign(), rho)
        elif dead is not None:
            torch.mul(dead.sign(), rho, out=dead_grad)

    # -- write back ------------------------------------------------------------------------------------------------

    def _write_layer(self, layer: LayerState) -> None:
        rows, cols = layer.row_channels, layer.column_channels
        assert rows is not None and cols is not None
        flats = [(self._flat, layer.weight, layer.bias)]
        if self._options.momentum:
            flats.append((self._velocity, layer.momentum, layer.bias_momentum))
        live, lost = len(rows.kept), len(cols.dropped)
        for flat, full, bias in flats:
            part = self._pieces[layer.name, "w"].of(flat).view(rows.stored, cols.stored, -1)[:live, : len(cols.kept)]
            if lost:
                whole = part.new_empty(live, cols.width, full.shape[2])
                whole.index_copy_(1, cols.kept, part)
                dead = self._pieces[layer.name, "wd"].of(flat).view(rows.stored, lost, -1)
                whole.index_copy_(1, cols.dropped, dead[:live])
                part = whole
            put_rows(full, rows, part)
            if bias is not None:
                put_rows(bias, rows, self._pieces[layer.name, "b"].of(flat)[:live])
                if len(rows.dropped):
                    bias[rows.dropped] = self._pieces[layer.name, "bd"].of(flat)

    def _write_norms(self) -> None:
        flats = [(self._flat, False)] + ([(self._velocity, True)] if self._options.momentum else [])
        for layer in self._layers.values():
            # Bias pieces of unchanged layers are gathered again from the model, so they are written too.
            if layer.bias is not None:
                rows = layer.row_channels
                assert rows is not None
                for flat, is_momentum in flats:
                    target = layer.bias_momentum if is_momentum else layer.bias
                    assert target is not None
                    put_rows(target, rows, self._pieces[layer.name, "b"].of(flat)[: len(rows.kept)])
                    if len(rows.dropped):
                        target[rows.dropped] = self._pieces[layer.name, "bd"].of(flat)
        for name, m in self._norms.items():
            channels, slot = self._norm_channels[name], self._norm_slots[name]
            assert channels is not None
            real = len(channels.kept)
            put_rows(m.running_mean, channels, slot.running_mean[:real])
            put_rows(m.running_var, channels, slot.running_var[:real])
            if len(channels.dropped):
                m.running_mean[channels.dropped] = slot.mean_dropped
                m.running_var[channels.dropped] = slot.var_dropped
            for flat, is_momentum in flats:
                for key, p, leaf in (("g", m.weight, "weight"), ("b", m.bias, "bias")):
                    if p is None:
                        continue
                    target = self._norm_momentum[full_name(name, leaf)] if is_momentum else p.data
                    put_rows(target, channels, self._pieces[name, "n" + key].of(flat)[:real])
                    if len(channels.dropped):
                        target[channels.dropped] = self._pieces[name, f"n{key}d"].of(flat)

    def _write_all(self) -> None:
        """The whole state, into the model's tensors and the momentum."""
        if self._plan is None:
            return
        # Without a step only the guard can have changed anything: the thresholds.
        if self._steps:
            for layer in self._layers.values():
                self._write_layer(layer)
            self._write_norms()
            if self._moving:
                self._catch_up(~self._keep)
        for m in self._norms.values():
            if m.num_batches_tracked is not None:
                m.num_batches_tracked += self._steps
        velocity = self._velocity[len(self._velocity) - len(self._tau) :]
        for layer in self._pruned:
            part = slice(layer.begin, layer.begin + layer.rows)
            self._tau_full[layer.name].copy_(self._tau[part])
            if self._tau_momentum is not None:
                self._tau_momentum[layer.name].copy_(velocity[part])

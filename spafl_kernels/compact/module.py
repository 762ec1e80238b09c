"""A model whose forward and backward pass run compact, for anybody's training loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..functional import refuse_transforms, warn_of_collapse
from ..settings import strict as strict_by_default
from ..training import Given, Unsupported, arguments_of
from .captures import FOLLOWED, Batch, Captures
from .explain import in_words, nothing_skipped
from .graph.flow import Flow
from .graph.inputs import Form, inputs_of
from .graph.trace import Trace
from .plan.plan import Plan
from .plan.rows import Chosen, layer_states, norm_states
from .plan.state import (
    LayerState,
    NormState,
    by_filter,
    channels_of,
    channels_of_norm,
    slots_of,
    take_rows,
    take_weight,
)
from .run.fusion import always_fused, prefers_channels_last
from .run.program import Program
from .run.scope import Scope
from .verify import Verify, differs

__all__ = ["CompactModule"]


class _GatherRows(torch.autograd.Function):
    """Kept rows of a weight, split into kept and dropped columns, and the mask of the rows.

    ``(weight, threshold, bias, spec) -> (kept, dropped or None, mask, bias or None)``; backward gives the gradients of
    the definition (reference.py) to the full tensors. ``bias`` is given only if the mask covers it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor, bias: Tensor | None, spec: _Spec) -> Any:
        rows, cols = spec.rows, spec.columns
        shape = weight.shape[2:]
        kept, dropped = weight.new_empty(rows.stored, cols.stored, *shape), None
        if len(cols.dropped) and spec.constants:
            dropped = weight.new_empty(rows.stored, len(cols.dropped), *shape)
        take_weight(
            weight.reshape(weight.shape[0], spec.inputs, -1), rows, cols, kept.view(rows.stored, cols.stored, -1),
            None if dropped is None else dropped.view(rows.stored, len(cols.dropped), -1),
        )  # fmt: skip
        mask = F.pad(spec.active.to(weight.dtype), (0, rows.pads))
        row_bias = None
        if bias is not None:
            row_bias = bias.new_empty(rows.stored)
            take_rows(bias, rows, row_bias)
        ctx.spec = spec
        ctx.save_for_backward(weight, bias)
        ctx.set_materialize_grads(False)
        return kept, dropped, mask, row_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        weight, bias = ctx.saved_tensors
        spec, (g_kept, g_dropped, g_mask, g_bias) = ctx.spec, grads
        rows, cols, count = spec.rows, spec.columns, len(spec.rows.kept)
        full = weight.reshape(weight.shape[0], spec.inputs, -1)
        w = full.index_select(0, rows.kept) if len(rows.dropped) else full
        g = torch.zeros_like(w)
        if g_kept is not None:
            part = g_kept.reshape(rows.stored, cols.stored, -1)[:count, : len(cols.kept)]
            g = g.index_copy_(1, cols.kept, part) if len(cols.dropped) else part.clone()
        if g_dropped is not None:
            g.index_copy_(1, cols.dropped, g_dropped.reshape(rows.stored, len(cols.dropped), -1)[:count])
        grad_bias = None
        if bias is not None:
            grad_bias = torch.zeros_like(bias)
            if g_bias is not None:
                grad_bias.index_copy_(0, rows.kept, g_bias[:count])
        grad_threshold = weight.new_zeros(weight.shape[0])
        if spec.passes is not None:
            if g_mask is not None:
                r = g_mask[:count]
            else:
                r = (g * w).sum((1, 2))
                if g_bias is not None:
                    r = r + g_bias[:count] * bias[rows.kept]
            r = r * spec.passes
            g += (r / w[0].numel()).view(-1, 1, 1) * w.sign() if count else 0
            grad_threshold.index_copy_(0, rows.kept, -r)
        grad_weight = g
        if len(rows.dropped):
            grad_weight = torch.zeros_like(full).index_copy_(0, rows.kept, g)
        return grad_weight.view_as(weight), grad_threshold, grad_bias, None


class _Spec:
    """What :class:`_GatherRows` needs to know about one layer under a plan.

    ``active`` and ``passes`` (where the estimator lets the gradient through; None: nowhere) are those of the kept rows;
    ``constants`` says whether dropped inputs are constants other than 0.
    """

    def __init__(self, layer: LayerState, active: Tensor, passes: Tensor | None, constants: bool) -> None:
        assert layer.row_channels is not None and layer.column_channels is not None
        self.rows, self.columns, self.inputs = layer.row_channels, layer.column_channels, layer.inputs
        self.active, self.passes, self.constants = active, passes, constants


class CompactModule(nn.Module):
    """Wraps a model with threshold layers; forward and backward skip what is pruned, in rows and in columns.

    Parameters stay those of ``model``, at full size, and get full-size gradients, so any optimiser and any training
    loop works; masks are taken from the parameters at every forward. (The persistent
    :class:`~spafl_kernels.compact.CompactTrainer` saves the gathers too, for SGD.) ``state_dict`` is the model's own.

    It is called as ``model`` is, with any number of tensors, also in lists and dictionaries and by name; numbers and
    strings among the arguments are a part of what is read. A call that cannot run compact (with objects of other kinds,
    with a number that is another one at every call, or of a model that cannot be read) runs the model as it is, and so
    does whoever exports or scripts it, since the masks of that moment would be in the result; ``engine`` and ``reason``
    are those of the last call. What was read of the model is compared with what it is at every call, and read anew when
    it has changed. Calls from several threads wait for each other.

    Args:
        model: the model; shared, not copied.
        strict: raise :class:`~spafl_kernels.training.Unsupported` where the model cannot run compact; by default what
            ``SPAFL_STRICT`` says.
        multiple: convolutions keep a multiple of this many filters.
        verify: ``"first"``: what was captured is compared with the model itself, on a float64 copy, before it is used;
            ``"always"``: again whenever a new plan is made; ``"never"``.
        trace: of ``model`` in its present modes, where one has been made already.
    """

    runs_compact = True

    def __init__(
        self,
        model: nn.Module,
        strict: bool | None = None,
        multiple: int = 8,
        verify: Verify = "first",
        trace: Trace | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.strict = strict_by_default() if strict is None else strict
        self.multiple, self.verify = multiple, verify
        self.engine, self.reason = "compact", FOLLOWED
        self._reset(trace)
        try:
            self._captures.read_early(model.training)
        except Unsupported as error:
            self._fall_back(error)

    def _reset(self, trace: Trace | None = None) -> None:
        self._captures: Captures[Made] = Captures(
            self.model, "now", self.verify, self._differs, bounded=True, trace=trace
        )
        self._warned: set[str] = set()
        self._lock = threading.RLock()  # the tensors of a call are in the slots of the program while it runs

    def _fall_back(self, error: Unsupported) -> None:
        if self.strict:
            raise error
        self.engine, self.reason = "masked", str(error)

    def explain(self, measure: Given | None = None) -> str:
        """Which engine ran last and why; after a forward also which channels are followed, which rows are computed
        although they are pruned, and what is expected to be gained in a step with gradients.

        Args:
            measure: a batch: a tensor, a tuple or list of the model's arguments, or a dictionary of them by name; every
                layer is timed alone on inputs of the sizes it gets from it, masked and compact.
        """
        lines, timed, count = [f"{self.engine}: {self.reason}"], None, 0
        if measure is not None:
            form, tensors = Form.of(*arguments_of(measure))
            timed, count = inputs_of(tensors)
        for batch, captured in self._captures:
            for made in list(captured.made.values())[-1:]:
                rows = made.chosen.reasoned(captured.rows.reasons)
                if self.engine == "compact" and (nothing := nothing_skipped(rows)) is not None:
                    lines[0] = f"compact: {nothing}"
                asked = count if timed is not None and (batch.form, batch.inputs) == (form, timed) else 0
                samples = captured.samples if batch.gradients else 0
                lines += in_words(captured.flow, rows, samples, True, gathers=True, measure=asked)
        return "\n".join(lines)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """As a part of another module: the keys are those of the model alone."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}model.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint: by name in the state dict, the attribute that is left out there."""
        m = self.model
        return dict.fromkeys([*m._modules, *m._parameters, *m._buffers], "model")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_captures", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return self.model(*args, **kwargs)
        return self._run(*args, **kwargs)

    # A program is chosen by the masks: a compiler would follow that anew at every other one.
    @torch.compiler.disable
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        refuse_transforms("a CompactModule")
        with self._lock:
            if self._captures.model is not self.model:
                self._reset()
            return self._called(args, kwargs)

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = None
        tensors: list[Tensor] = []
        try:
            form, tensors = Form.of(args, kwargs)
            inputs, count = inputs_of(tensors)
            if count:  # of an empty batch the model itself knows what to say
                made = self._made(Batch(form, inputs, self.model.training, torch.is_grad_enabled()), tensors)
        except Unsupported as error:
            self._fall_back(error)
        if made is None:
            return self.model(*args, **kwargs)
        self.engine, self.reason = "compact", FOLLOWED
        for gather in made.gathers:
            gather()
        try:
            return made.program(tensors, True)
        finally:  # what stops in the middle (a checkpoint, which has all it needs) has changed statistics too
            with torch.no_grad():
                for put in made.puts:
                    put()
            made.release()

    # -- a plan ----------------------------------------------------------------------------------------------------

    def _made(self, batch: Batch, tensors: list[Tensor]) -> Made:
        """Masks of the current parameters, and the program for them (the last one if no mask has changed)."""
        captured = self._captures.of(batch, tensors)
        with torch.no_grad():
            chosen = captured.rows.of_model(batch.gradients)
        compiled = not torch.is_autocast_enabled(tensors[0].device.type)
        # Tensors that a program keeps are of one kind only: made in inference mode, or not.
        key = compiled, torch.is_inference_mode_enabled()
        old = captured.made.get(key)
        if old is not None and old.chosen.serves(chosen):
            return old
        self._captures.check(batch, captured, tensors, again=True)
        with torch.no_grad():
            captured.made[key] = made = Made(captured.flow, chosen, self.multiple, compiled)
        if batch.gradients and batch.training:
            self._warned |= warn_of_collapse(chosen.masks, self._warned)
        return made

    def _differs(self, flow: Flow, tensors: Sequence[Tensor]) -> str | None:
        def ours(model: nn.Module, copies: list[Tensor]) -> Any:
            args, kwargs = flow.trace.form.call(copies)
            return CompactModule(model, True, self.multiple, "never", flow.trace.on(model))(*args, **kwargs)

        return differs(flow, tensors, ours, flow.trace.gradients[0])


class Made:
    """A program under one plan, and how its slots are filled from the model before a run and emptied after it."""

    def __init__(
        self,
        flow: Flow,
        chosen: Chosen,
        multiple: int,
        compiled: bool,
    ) -> None:
        masks, passes = chosen.masks, chosen.passes
        weight = next(flow.model.parameters())
        exact = always_fused(flow) if compiled and weight.device.type == "cpu" else set()
        self.plan = plan = Plan(flow, chosen.keep, multiple, exact)
        self.chosen = chosen
        self.layers, self.norms = layer_states(flow), norm_states(flow)
        self.gathers: list[Callable[[], None]] = []
        for name, layer in self.layers.items():
            rows, layer.column_channels = channels_of(layer, flow, plan)
            layer.row_channels = rows
            active = torch.ones(rows.width, dtype=torch.bool, device=weight.device)
            active = masks[name][rows.kept] if name in masks else active
            passing = None if (p := passes.get(name)) is None else p[rows.kept]
            spec = _Spec(layer, active, passing, bool(flow.source(flow.layers[name]).const))
            self.gathers.append(_layer_gather(layer, spec))
        for norm in self.norms.values():
            norm.set_channels(channels_of_norm(norm, flow, plan))
            self.gathers.append(_norm_gather(norm))
        self.puts = [_norm_put(norm) for norm in self.norms.values()]
        with torch.no_grad():
            for gather in self.gathers:
                gather()
        slots = slots_of(self.layers), slots_of(self.norms)
        self.program = Program(Scope(flow, plan, *slots, prefers_channels_last(flow), compiled))
        self.release()

    def release(self) -> None:
        """Drop the gathered tensors, so that nothing keeps the autograd graph alive."""
        for layer in self.layers.values():
            layer.slot.weight = layer.slot.weight_dropped = layer.slot.bias = layer.slot.bias_dropped = None
            layer.slot.mask = None
        for norm in self.norms.values():
            slot = norm.slot
            slot.weight = slot.bias = slot.weight_dropped = slot.bias_dropped = None


def _layer_gather(layer: LayerState, spec: _Spec) -> Callable[[], None]:
    m, slot, rows, masked_bias = layer.module, layer.slot, spec.rows, layer.mask_bias
    partial = not bool(spec.active.all())

    if not layer.is_threshold and spec.columns.full:
        return layer.lend_whole

    def gather() -> None:
        weight = by_filter(m, m.weight)
        threshold = m.threshold if layer.is_threshold else weight.new_zeros(len(weight))
        bias = m.bias if masked_bias else None
        slot.weight, slot.weight_dropped, mask, row_bias = _GatherRows.apply(weight, threshold, bias, spec)
        slot.mask = mask if partial else None
        slot.bias, slot.bias_dropped = row_bias, None
        if m.bias is not None and not masked_bias:
            slot.bias = F.pad(m.bias.index_select(0, rows.kept), (0, rows.pads)) if layer.is_threshold else m.bias
            if len(rows.dropped):
                slot.bias_dropped = m.bias.index_select(0, rows.dropped)

    return gather


def _norm_gather(norm: NormState) -> Callable[[], None]:
    m, slot, channels = norm.module, norm.slot, norm.channels
    assert channels is not None

    def take(p: Tensor | None) -> Tensor | None:
        return p if p is None or channels.full else F.pad(p.index_select(0, channels.kept), (0, channels.pads))

    def gather() -> None:
        norm.set_channels(channels)  # other tensors: a graph may hold those of the last call
        norm.load_statistics()
        slot.weight, slot.bias = take(m.weight), take(m.bias)
        if slot.mean_dropped is not None:
            slot.weight_dropped = None if m.weight is None else m.weight.index_select(0, channels.dropped)
            zeros = torch.zeros_like(slot.mean_dropped)
            slot.bias_dropped = zeros if m.bias is None else m.bias.index_select(0, channels.dropped)

    return gather


def _norm_put(norm: NormState) -> Callable[[], None]:
    def put() -> None:
        if norm.slot.batches:
            norm.count_batches()
            norm.store_statistics()

    return put

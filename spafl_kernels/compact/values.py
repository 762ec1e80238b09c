"""Where a program and the model part: the first operation whose value differs, to name it in a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .graph.flow import Flow
from .graph.follow import follow_inputs
from .graph.trace import copy_of
from .graph.watch import set_modes
from .plan.rows import Rows

__all__ = ["first_difference"]


class _Values(fx.Interpreter):
    """Runs a trace on a model and keeps every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n.name] = result.detach().clone()
        return result


@torch.no_grad()
def first_difference(flow: Flow, twin: nn.Module, tensors: Sequence[Tensor], tolerance: float) -> str | None:
    """Name and kind of the first operation of which a plain program makes another value than ``twin``, a copy of the
    model of ``flow`` that is called with ``tensors``; None if there is none."""
    from .module import Made

    was = flow.trace
    trace = replace(was, modes=was.modes[:1], gradients=was.gradients[:1])
    set_modes(twin, was.modes[0])
    other = copy_of(twin)
    for name, value in flow.trace.constants.items():
        setattr(twin, name, value)
    right = _Values(fx.GraphModule(twin, flow.trace.graph))
    torch.manual_seed(1)
    right.run(*tensors)
    gradients = flow.trace.gradients[0]
    inputs = tuple(i.like(t) for i, t in zip(flow.inputs, tensors))
    here = follow_inputs(other, inputs, trace.on(other), flow.batch)
    made = Made(here, Rows(here).of_model(gradients), multiple=8, compiled=False)
    for gather in made.gathers:
        gather()
    torch.manual_seed(1)
    for name, value in made.program.values(tensors):
        op = here.ops[name]
        if name in right.values:
            want = right.values[name]
            scale = max(1.0, float(want.double().abs().max())) if want.numel() else 1.0
            if value.shape != want.shape or not bool((value - want).abs().max() <= tolerance * scale):
                return f"{name} ({op.kind})"
    return None

"""Where a program and the model part: the first operation whose value differs, to name it in a reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from .flow import Flow
from .follow import trace_flow
from .trace import Trace, copy_of
from .watch import set_modes

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
def first_difference(flow: Flow, twin: nn.Module, x: Tensor, tolerance: float) -> str | None:
    """Name and kind of the first operation of which a plain program makes another value than ``twin``, a copy of the
    model of ``flow``; None if there is none."""
    from .module import Made, conditions_of, rows_of

    assert flow.trace is not None
    was = flow.trace
    trace = Trace(was.graph, was.modes[:1], was.gradients[:1], was.watch, was.constants, was.reads)
    set_modes(twin, was.modes[0])
    other = copy_of(twin)
    for name, value in flow.trace.constants.items():
        setattr(twin, name, value)
    right = _Values(fx.GraphModule(twin, flow.trace.graph))
    torch.manual_seed(1)
    right.run(x)
    gradients = flow.trace.gradients[0]
    here = trace_flow(other, tuple(x.shape[1:]), trace.on(other), x.dtype)
    made = Made(here, *rows_of(here, conditions_of(here), gradients), multiple=8, compiled=False)
    for gather in made.gathers:
        gather()
    torch.manual_seed(1)
    for name, value in made.program.values(x):
        op = here.ops[name]
        if name in right.values:
            want = right.values[name]
            scale = max(1.0, float(want.double().abs().max())) if want.numel() else 1.0
            if value.shape != want.shape or not bool((value - want).abs().max() <= tolerance * scale):
                return f"{name} ({op.kind})"
    return None

"""Calls of everything else, at full width."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..flow import Op
from ..scope import Run, Scope


def shape(scope: Scope, op: Op, i: int) -> Run:
    source = scope.op(op.sources[0])
    j, layout = scope.index[source.name], source.layout
    args = op.node.args[1:] if op.node.op == "call_method" else ()

    def run(env: list[Any], training: bool) -> None:
        shape = list(env[j].shape)
        if layout is not None:
            shape[layout.dim] = layout.width
        env[i] = shape[args[0]] if args else torch.Size(shape)

    return run


def _products(scope: Scope, op: Op) -> int:
    """How many products a step makes of one in the forward pass: one more for every factor with a gradient."""
    factors = [s for s in map(scope.op, op.sources) if len(s.shape or ()) > 1]  # a vector is a bias
    own = op.module is not None and any(p.requires_grad and p.dim() > 1 for p in op.module.parameters())
    return 1 + min(2, own + sum(s.grad for s in factors))


def other(scope: Scope, op: Op, i: int) -> Run:
    """Any other node, as the trace has it, on full-width inputs."""
    node, model = op.node, scope.flow.model
    scope.macs += op.macs * _products(scope, op)
    if node.op == "get_attr":
        trace = scope.flow.trace
        if trace is not None and node.target in trace.constants:
            value = trace.constants[node.target]

            def constant(env: list[Any], training: bool) -> None:
                env[i] = value

            return constant
        parent, _, leaf = str(node.target).rpartition(".")
        owner = model.get_submodule(parent)

        def attribute(env: list[Any], training: bool) -> None:
            env[i] = getattr(owner, leaf)

        return attribute
    reads = {s.name: scope.full(s.name) for s in node.all_input_nodes}
    here = node.args, node.kwargs
    elsewhere = node.meta.get("otherwise", here)
    target = op.module if node.op == "call_module" else node.target
    writes, view = op.writes, node.op == "call_method" and target == "view"

    def run(env: list[Any], training: bool) -> None:
        args, kwargs = here if training else elsewhere
        args = fx.node.map_arg(args, lambda s: reads[s.name](env))
        kwargs = fx.node.map_arg(kwargs, lambda s: reads[s.name](env))
        if writes:
            args = (args[0].clone(), *args[1:]) if args else args
            kwargs = kwargs if args else {**kwargs, "input": kwargs["input"].clone()}
        if view and not any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
            # Whether a tensor can be viewed depends on how it lies in memory, which here may be another way.
            env[i] = args[0].reshape(*args[1:], *kwargs.values())
        elif node.op == "call_method":
            env[i] = getattr(args[0], target)(*args[1:], **kwargs)
        else:
            env[i] = target(*args, **kwargs)

    return run

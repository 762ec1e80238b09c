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


def other(scope: Scope, op: Op, i: int) -> Run:
    """Any other node, as the trace has it, on full-width inputs."""
    node, model = op.node, scope.flow.model
    scope.macs += op.macs * 3
    if node.op == "get_attr":
        parent, _, leaf = str(node.target).rpartition(".")
        owner = model.get_submodule(parent)

        def attribute(env: list[Any], training: bool) -> None:
            env[i] = getattr(owner, leaf)

        return attribute
    reads = {s.name: scope.full(s.name) for s in node.all_input_nodes}
    flag = "training" in node.kwargs
    target = op.module if node.op == "call_module" else node.target

    def run(env: list[Any], training: bool) -> None:
        args = fx.node.map_arg(node.args, lambda s: reads[s.name](env))
        kwargs = dict(fx.node.map_arg(node.kwargs, lambda s: reads[s.name](env)))
        if flag:
            kwargs["training"] = training
        if node.op == "call_method":
            env[i] = getattr(args[0], target)(*args[1:], **kwargs)
        else:
            env[i] = target(*args, **kwargs)

    return run

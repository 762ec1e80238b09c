"""The graph of a model, whether a compact engine can follow it, and the shapes in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from ..layers import ThresholdLayer
from ..training import Unsupported


class Tracer(fx.Tracer):
    """Keeps threshold layers whole, and unpacks ``chunk`` and ``split`` in loops, whose length is known."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, ThresholdLayer):
            return True
        inside = any(isinstance(child, ThresholdLayer) for child in m.modules())
        return super().is_leaf_module(m, module_qualified_name) and not inside

    def iter(self, obj: Any) -> Iterator[Any]:
        node = obj.node
        if target_of(node) in ("chunk", torch.chunk):
            count = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
            if isinstance(count, int):
                return iter([obj[i] for i in range(count)])
        return super().iter(obj)


def target_of(node: fx.Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


class Shapes(fx.Interpreter):
    """Runs the trace once on zeros and keeps every shape, and the MACs of what is not a layer."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        self.macs: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        self.shapes[n.name] = tuple(result.shape) if isinstance(result, Tensor) else None
        self.macs[n.name] = counter.get_total_flops() // 4  # two FLOPs each, two samples
        return result


def _check_model(model: nn.Module) -> None:
    seen: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in seen:
            raise Unsupported(f"parameters {seen[id(p)]!r} and {name!r} are the same tensor")
        seen[id(p)] = name
        if not p.requires_grad:
            raise Unsupported(f"parameter {name!r} is frozen (requires_grad=False)")
    params = dict(model.named_parameters())
    if len({(p.dtype, p.device) for p in params.values()}) > 1:
        raise Unsupported("parameters have different dtypes or devices")
    if params and not next(iter(params.values())).is_floating_point():
        raise Unsupported("parameters are not floating point")
    for name, module in model.named_modules():
        hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
        if any(getattr(module, h, None) for h in hooks):
            raise Unsupported(f"module {name or type(model).__name__!r} has hooks")
        if parametrize.is_parametrized(module):
            raise Unsupported(f"module {name!r} has a parametrised tensor")


def _trace_graph(model: nn.Module) -> fx.Graph:
    """Trace in train mode; the eval trace must be the same up to ``training`` flags."""
    modes = {m: m.training for m in model.modules()}
    texts, graph = [], None
    try:
        for training in (False, True):
            model.train(training)
            graph = Tracer().trace(model)
            texts.append(re.sub(r"training = (True|False)", "training", str(graph)))
    except Exception as error:  # whatever user code does with a proxy
        raise Unsupported(f"cannot be traced: {str(error).splitlines()[0]}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    if texts[0] != texts[1]:
        raise Unsupported("forward does different things in train and eval mode")
    assert graph is not None
    return graph


def check_traceable(model: nn.Module) -> fx.Graph:
    """The graph of ``model``, as far as it is known without an input; raises :class:`Unsupported`."""
    _check_model(model)
    graph = _trace_graph(model)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise Unsupported(f"forward takes {len(inputs)} inputs; one is needed")
    return graph

"""What runs as it stands in the trace, at full width: operations that no kind knows, and those where channels stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ...training import Unsupported
from ..graph.calls import written_at_
from ..small import Value, dense_copy
from .base import Op, Stop

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["Constant", "Whole"]


@dataclass(eq=False)
class Whole(Op):
    """Any node, on full-width inputs. ``reason``: why it is not of the kind that it could be."""

    kind = "whole"
    reason: str = ""

    def follow(self, flow: Flow) -> None:
        target = self.node.target
        what = type(self.module).__name__ if self.module is not None else getattr(target, "__name__", str(target))
        raise Stop(f"{what} runs at full width: {self.reason}" if self.reason else f"{what} is not followed")

    def build(self, scope: Scope, i: int) -> Run:
        node = self.node
        scope.macs += self.macs * self.products(scope)
        reads = {s.name: scope.full(s.name) for s in node.all_input_nodes}
        # In which order random numbers are drawn is a matter of memory, which here may be another way.
        words = str(node.target), type(self.module).__name__.lower()
        if any(word in text for text in words for word in _RANDOM):
            reads = {name: _in_order(scope.op(name), read) for name, read in reads.items()}
        here = node.args, node.kwargs
        elsewhere = node.meta.get("otherwise", here)
        target = self.module if node.op == "call_module" else node.target
        writes, view = self.name in scope.flow.writers, node.op == "call_method" and target == "view"

        def run(env: Values, training: bool) -> None:
            args, kwargs = here if training else elsewhere
            args = fx.node.map_arg(args, lambda s: reads[s.name](env))
            kwargs = fx.node.map_arg(kwargs, lambda s: reads[s.name](env))
            if writes:
                args = (args[0].clone(), *args[1:]) if args else args
                kwargs = kwargs if args else {**kwargs, "input": kwargs["input"].clone()}
            if view and not any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
                # Whether a tensor can be viewed depends on how it lies in memory, which here may be another way.
                env.kept[i] = args[0].reshape(*args[1:], *kwargs.values())
            elif node.op == "call_method":
                env.kept[i] = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                env.kept[i] = target(*args, **kwargs)

        return run

    def products(self, scope: Scope) -> int:
        """How many products a step makes of one in the forward pass: one more for every factor with a gradient."""
        factors = [s for s in map(scope.op, self.sources) if len(s.shape or ()) > 1]  # a vector is a bias
        own = self.module is not None and any(p.requires_grad and p.dim() > 1 for p in self.module.parameters())
        return 1 + min(2, own + sum(s.grad for s in factors))

    def export(self, small: Small) -> Value:
        return Value(as_it_stands(self, small), None)


_RANDOM = ("dropout", "rand", "bernoulli", "rrelu", "normal", "uniform", "multinomial", "poisson", "exponential")


def _in_order(op: Op, read: Callable[[Values], Any]) -> Callable[[Values], Any]:
    def reads(env: Values) -> Any:
        value = read(env)
        return op.in_order(value) if isinstance(value, torch.Tensor) else value

    return reads


def as_it_stands(op: Op, small: Small) -> fx.Node:
    """The node of the trace on full-width inputs, in an exported model."""
    node, flow = op.node, small.flow

    def read(source: fx.Node) -> fx.Node:
        return small.full(source.name)

    args, kwargs = (fx.node.map_arg(part, read) for part in (node.args, node.kwargs))
    if op.name in flow.writers:
        first = args[0] if args else kwargs["input"]
        first = small.graph.call_method("clone", (first,))
        args, kwargs = ((first, *args[1:]), kwargs) if args else (args, {**kwargs, "input": first})
        if node.target is written_at_:  # nothing of this package is in an exported model
            small.graph.call_method("__setitem__", args)  # which a GraphModule that is loaded can trace
            return first
    if node.op == "call_module":
        if flow.trace.of(op.module)[0]:  # whoever calls eval() on the result would switch it off
            if type(op.module) is not nn.Dropout:
                raise Unsupported(f"{node.target!r} is in training mode though the model is in eval mode")
            dropped = (*args, *kwargs.values(), op.module.p, True)
            return small.graph.call_function(nn.functional.dropout, dropped)
        return small.module(op.name, dense_copy(op.module), *args, **kwargs)
    new = small.graph.node_copy(node, read)
    new.args, new.kwargs = args, kwargs
    if node.op == "call_method" and node.target == "view":
        values = (*node.args, *node.kwargs.values())
        if not any(isinstance(a, torch.dtype) or _asks_dtype(a) for a in values):
            new.target = "reshape"  # here a tensor may lie in memory otherwise
            new.kwargs = {"shape" if k == "size" else k: v for k, v in kwargs.items()}
    return new


def _asks_dtype(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is getattr and value.args[1] == "dtype"


@dataclass(eq=False)
class Constant(Op):
    """A parameter or buffer that ``forward`` reads, or a tensor that it makes."""

    kind = "constant"

    @classmethod
    def of_attribute(cls, node: fx.Node, flow: Flow) -> Constant:
        value = flow.attribute(str(node.target))
        return cls(node, grad=isinstance(value, nn.Parameter) and value.requires_grad)

    def follow(self, flow: Flow) -> None:
        """It has all its channels."""

    def build(self, scope: Scope, i: int) -> Run:
        path, trace = str(self.node.target), scope.flow.trace
        if path in trace.constants:
            value = trace.constants[path]

            def constant(env: Values, training: bool) -> None:
                env.kept[i] = value

            return constant
        parent, _, leaf = path.rpartition(".")
        owner = scope.flow.model.get_submodule(parent)

        def attribute(env: Values, training: bool) -> None:
            env.kept[i] = getattr(owner, leaf)

        return attribute

    def export(self, small: Small) -> Value:
        path = str(self.node.target)
        return Value(small.buffer(path, small.flow.attribute(path).detach()), None)

"""Sums of two tensors, whose channels may be different ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from ..graph.calls import Call, Signature
from ..plan.plan import Channels
from ..run.constants import chosen, summed
from ..run.spread import Spread, Summand
from ..small import Value
from .base import Const, Op, Stop
from .numbers import with_number

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["Sum"]


_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(eq=False)
class Sum(Op):
    """``terms``: names of the two tensors, which may be one. ``weight``: what the second is multiplied by."""

    kind = "sum"
    _ADD = Signature("input other alpha out", alpha=1, out=None)
    calls: ClassVar[Mapping[Any, Any]] = {
        operator.add: _ADD, operator.iadd: _ADD, torch.add: _ADD, "add": _ADD, "add_": _ADD,
        operator.sub: _ADD, operator.isub: _ADD, torch.sub: _ADD, torch.subtract: _ADD, "sub": _ADD, "sub_": _ADD,
    }  # fmt: skip
    passes_channels = True
    fresh = True

    terms: tuple[str, str] = ("", "")
    weight: float = 1

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        a, b, alpha = call.values["input"], call.values["other"], call.values["alpha"]
        function = torch.add if call.target in _SUMS else torch.sub
        if not isinstance(alpha, (int, float)):
            return None
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return cls(call.node, terms=(a.name, b.name), weight=alpha if function is torch.add else -alpha)
        if alpha != 1:
            return with_number(call.node, function, a, b, alpha=alpha) if isinstance(a, fx.Node) else None
        return with_number(call.node, function, a, b)

    def follow(self, flow: Flow) -> None:
        a, b = (flow.ops[name] for name in self.terms)
        if a.shape is None or b.shape is None:
            raise Stop
        if a.layout is None and b.layout is None:
            return
        if a.shape != b.shape:
            raise Stop("addition with broadcasting")
        if a.layout is None or b.layout is None:
            flow.stop(self, "addition to a tensor at full width")
        elif a.layout != b.layout and not flow.read_compact(self):
            flow.stop(self, "addition of different channels, which nobody reads apart")
        elif (layout := a.layout.plus(b.layout)) is None:
            flow.stop(self, "addition of channels that are not repeated alike")
        elif (const := a.const | b.const) == Const.VARIES:
            flow.stop(self, "addition of channels that vary over samples and over positions")
        else:
            self.layout, self.const = layout, const

    def build(self, scope: Scope, i: int) -> Run:
        a, b = (scope.op(name) for name in self.terms)
        if self.weight == 1:
            return self.added(scope, i, a, b, scope.index[b.name])
        jb, k, weight = scope.index[b.name], scope.extra_place(), self.weight
        add = self.added(scope, i, a, b, k)

        def run(env: Values, training: bool) -> None:
            c = env.constants[jb]
            env.kept[k], env.constants[k] = env.kept[jb] * weight, None if c is None else c * weight
            add(env, training)
            env.kept[k] = env.constants[k] = env.wide[k] = None

        return run

    def added(self, scope: Scope, i: int, a: Op, b: Op, jb: int) -> Run:
        """``a`` and what is at ``jb``, which has the channels of ``b``."""
        ja = scope.index[a.name]
        after, ndim = scope.channels(self), len(self.shape or ())
        if a.layout == b.layout and (after is not None or a.layout is None):
            dim = 0 if self.layout is None else self.layout.dim

            def run(env: Values, training: bool) -> None:
                env.kept[i] = env.kept[ja] + env.kept[jb]
                env.constants[i] = summed(env.constants[ja], env.constants[jb], dim, ndim)

            return run
        if after is not None:
            return self._channels(scope, a, b, ja, jb, after, i)
        fa, fb = scope.full(a.name), scope.full(b.name, jb)
        ca, cb = scope.channels(a), scope.channels(b)
        # Add a compact operand into the channels it has.
        if cb is not None and not cb.full:
            return _into(scope, fa, jb, b, cb, i)
        if ca is not None and not ca.full:
            return _into(scope, fb, ja, a, ca, i)

        def wide(env: Values, training: bool) -> None:
            env.kept[i] = fa(env) + fb(env)

        return wide

    def _channels(self, scope: Scope, a: Op, b: Op, ja: int, jb: int, after: Channels, i: int) -> Run:
        """A sum of different channels: it has those that one of the operands has."""
        assert self.layout is not None
        dim, ndim = self.layout.dim, len(self.shape or ())
        first, second = (_summand(scope, op, after) for op in (a, b))
        if second.spread is None:
            ja, jb, first, second = jb, ja, second, first

        def run(env: Values, training: bool) -> None:
            ca, cb = env.constants[ja], env.constants[jb]
            env.kept[i] = second(env.kept[jb], cb, first(env.kept[ja], ca, None))
            env.constants[i] = summed(first.left(ca), second.left(cb), dim, ndim)

        return run

    def export(self, small: Small) -> Value:
        after = small.channels(self)
        if after is None:
            return Value(self.exported([small.full(n) for n in self.terms], small), None)
        assert self.layout is not None
        nodes, constants, dim, ndim = [], None, self.layout.dim, len(self.shape or ())
        for name in self.terms:
            value = small.values[name]
            assert value.channels is not None
            same = torch.equal(value.channels.kept, after.kept) and value.channels.pads == after.pads
            nodes.append(value.node if same else small.relayout(name, after.kept, after.pads))
            if value.constants is not None and len(after.dropped):
                stay = torch.isin(value.channels.dropped, after.dropped).nonzero().flatten()
                left = chosen(value.constants, stay, dim)
                constants = summed(constants, left if len(nodes) == 1 else left * self.weight, dim, ndim)
        return Value(self.exported(nodes, small), after, constants)

    def exported(self, nodes: list[fx.Node], small: Small) -> fx.Node:
        return small.call(torch.add, *nodes, **({} if self.weight == 1 else {"alpha": self.weight}))


def _into(scope: Scope, full: Callable[[Values], Any], j: int, part: Op, channels: Channels, i: int) -> Run:
    assert part.layout is not None
    spread = Spread(channels.host.kept, channels.width, part.layout.dim, scope.native, scope.device)

    def run(env: Values, training: bool) -> None:
        env.kept[i] = spread(env.kept[j], env.constants[j], full(env))

    return run


def _summand(scope: Scope, op: Op, after: Channels) -> Summand:
    channels = scope.channels(op)
    assert channels is not None and op.layout is not None
    return Summand(channels, after, op.layout.dim, scope.native)

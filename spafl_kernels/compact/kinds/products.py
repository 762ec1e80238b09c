"""Products and quotients: by a number, a parameter, a gate, or another tensor of the same channels."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from ..graph.calls import Call, Signature
from ..run.constants import like_value
from ..small import Value
from .base import Const, Op, Stop
from .numbers import with_number
from .whole import Constant

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["Product"]

_MUL = Signature("input other out", out=None)
_DIV = Signature("input other rounding_mode out", rounding_mode=None, out=None)


@dataclass(eq=False)
class Product(Op):
    """``function(first, second)``.

    Args:
        function: ``torch.mul`` or ``torch.div``.
        first, second: names of the operands.
        main: the operand whose channels the result has.
        together: the other one has the same channels; else it is read at full width.
    """

    kind = "product"
    calls: ClassVar[Mapping[Any, Any]] = {
        operator.mul: _MUL, operator.imul: _MUL, torch.mul: _MUL, torch.multiply: _MUL, "mul": _MUL, "mul_": _MUL,
        operator.truediv: _DIV, operator.itruediv: _DIV, torch.div: _DIV, "div": _DIV, "div_": _DIV,
    }  # fmt: skip
    passes_channels = True

    function: Any = torch.mul
    first: str = ""
    second: str = ""
    main: str = ""
    together: bool = False

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        a, b = call.values["input"], call.values["other"]
        if call.values.get("rounding_mode") is not None:
            return None
        function = torch.div if "rounding_mode" in call.values else torch.mul
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return cls(call.node, function=function, first=a.name, second=b.name)
        return with_number(call.node, function, a, b)

    @property
    def other(self) -> str:
        return self.second if self.main == self.first else self.first

    def follow(self, flow: Flow) -> None:
        a, b = flow.ops[self.first], flow.ops[self.second]
        if a.layout is None and b.layout is None:
            raise Stop
        if a.shape is None or b.shape is None:
            raise Stop("multiplication by what is neither a tensor nor a number")
        # A quotient by what is pruned is not finite.
        able = [op for op in (a, b) if op.layout is not None and op.shape == self.shape]
        able = [op for op in able if self.function is torch.mul or op is a]
        if not able:
            raise Stop("multiplication that broadcasts over channels")
        main = able[0]
        assert main.layout is not None
        self.main = main.name
        other = flow.ops[self.other]
        self.together = other.layout == main.layout and self.function is torch.mul and _same_rank(main, other)
        const = self.factor(flow, main, other)
        self.const = Const.ZERO if not (main.const and const) else main.const | const
        if self.const == Const.VARIES:
            raise Stop("multiplication of pruned channels by what varies over samples and over positions")
        if self.const == Const.SAMPLE and flow.stored:
            raise Stop("the product of a pruned channel is another constant in every sample, which cannot be stored")
        if self.const and flow.stored and not self.together and not isinstance(other, Constant):
            raise Stop("the product of a pruned channel and of what is computed cannot be stored")
        self.layout = main.layout

    def factor(self, flow: Flow, main: Op, other: Op) -> Const:
        """What the other operand is where the main one's channels are dropped."""
        if self.together:
            return other.const
        assert main.layout is not None
        shape = _aligned(other.shape or (), len(main.shape or ()))
        by_place = any(size != 1 for d, size in enumerate(shape) if d not in (0, main.layout.dim))
        return Const.SAME | (Const.SAMPLE if shape[0] != 1 else 0) | (Const.PLACE if by_place else 0)

    def build(self, scope: Scope, i: int) -> Run:
        main, other, channels = scope.op(self.main), scope.op(self.other), scope.channels(self)
        j, k, function = scope.index[main.name], scope.index[other.name], self.function
        assert channels is not None and self.layout is not None
        dim, ndim, same = self.layout.dim, len(self.shape or ()), self.const == Const.SAME
        if self.together:

            def alike(env: Values, training: bool) -> None:
                env.kept[i] = env.kept[j] * env.kept[k]
                c, d = env.constants[j], env.constants[k]
                if c is not None and d is not None:
                    both = c.dim() == d.dim()
                    env.constants[i] = c * d if both else like_value(c, dim, ndim) * like_value(d, dim, ndim)

            return alike
        read, at = scope.full(other.name), dim - ndim + len(other.shape or ())
        single = at < 0 or (other.shape or ())[at] == 1
        # What padding is multiplied by means nothing.
        index = torch.cat([channels.kept, channels.kept.new_zeros(channels.pads)])
        dropped, whole = channels.dropped, channels.full

        def run(env: Values, training: bool) -> None:
            g, c = read(env), env.constants[j]
            env.kept[i] = function(env.kept[j], g if single or whole else g.index_select(at, index))
            if c is not None:
                d = g if single else g.index_select(at, dropped)
                out = function(like_value(c, dim, ndim), d)
                env.constants[i] = out.reshape(-1) if same else out

        return run

    def export(self, small: Small) -> Value:
        main, other, channels = small.values[self.main], small.flow.ops[self.other], small.channels(self)
        assert channels is not None and self.layout is not None
        dim, ndim = self.layout.dim, len(self.shape or ())
        at = dim - ndim + len(other.shape or ())
        single = at < 0 or (other.shape or ())[at] == 1
        if self.together:
            node, c, d = small.values[self.other].node, main.constants, small.values[self.other].constants
        else:
            node, c, d = small.full(self.other), main.constants, None
            if not single and not channels.full:
                index = torch.cat([channels.kept, channels.kept.new_zeros(channels.pads)])
                node = small.call(torch.index_select, node, at, small.buffer(f"{self.name}_channels", index))
            if c is not None and self.const:
                d = small.known(self.other)
                d = d if single else d.index_select(at, channels.dropped)
        constants: Tensor | None = None
        if c is not None and d is not None:
            d = like_value(d, dim, ndim) if self.together else d
            constants = self.function(like_value(c, dim, ndim), d)
            constants = constants.reshape(-1) if self.const == Const.SAME else constants
        return Value(small.call(self.function, main.node, node), channels, constants)


def _aligned(shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """A shape as broadcasting sees it."""
    return (1,) * (ndim - len(shape)) + shape


def _same_rank(a: Op, b: Op) -> bool:
    return len(a.shape or ()) == len(b.shape or ())

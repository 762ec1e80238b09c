"""Arithmetic with one number: a scale, a shift, a sign."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from ..graph.calls import Call, Signature
from .base import Op, Sign, Stop
from .channelwise import Elementwise

if TYPE_CHECKING:
    from ..graph.flow import Flow

__all__ = ["WithNumber", "with_number"]

_ALONE = Signature("input out", out=None)
_FUNCTIONS: dict[Any, Any] = {
    operator.neg: torch.neg, torch.neg: torch.neg, "neg": torch.neg, "abs": torch.abs, torch.abs: torch.abs,
    "square": torch.square, torch.square: torch.square,
}  # fmt: skip


@dataclass(eq=False)
class WithNumber(Elementwise):
    """``positive``: what is not positive stays so, and its gradient only falls where it is so."""

    kind = "arithmetic"
    calls: ClassVar[Mapping[Any, Any]] = dict.fromkeys(_FUNCTIONS, _ALONE)

    positive: bool = False

    def follow(self, flow: Flow) -> None:
        if flow.source(self).layout is None:  # perhaps not even a tensor
            raise Stop
        super().follow(flow)

    @property
    def sign(self) -> Sign:
        return Sign.KEEPS if self.positive else Sign.LOSES

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        return cls(call.node, apply=_FUNCTIONS[call.target]) if isinstance(call.values["input"], fx.Node) else None


def with_number(node: fx.Node, function: Any, a: Any, b: Any, **settings: Any) -> Op | None:
    """``function(a, b)`` where one of the two is a number; None if that is not so or its result not finite."""
    if isinstance(b, fx.Node):
        if function is torch.div:
            return None
        # Products and sums do not mind the order, differences do.
        function, a, b = (torch.rsub if function is torch.sub else function), b, a
    if not isinstance(a, fx.Node) or isinstance(b, bool) or not isinstance(b, (int, float)):
        return None
    apply = partial(function, other=b, **settings)
    positive = (function is torch.mul and b >= 0) or (function is torch.div and b > 0)
    at_zero = apply(torch.zeros((), dtype=torch.float64)).item() if b or function is not torch.div else math.nan
    return WithNumber(node, apply=apply, at_zero=at_zero, positive=positive) if math.isfinite(at_zero) else None

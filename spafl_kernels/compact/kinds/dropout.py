"""Dropout, which draws the same random numbers as at full width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..graph.calls import Call, Signature
from ..small import Value
from .base import Op
from .channelwise import Same

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["Dropout"]


@dataclass(eq=False)
class Dropout(Op):
    """``p``: the share that is dropped; ``drops``: by pattern of the trace, whether it does."""

    kind = "dropout"
    modules = (nn.Dropout, nn.Dropout1d, nn.Dropout2d)
    calls: ClassVar[Mapping[Any, Any]] = {
        F.dropout: Signature("input p training inplace", p=0.5, training=True, inplace=False)
    }
    by_mode = True
    stands = True

    p: float = 0.5
    drops: tuple[bool, ...] = ()

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        if m.p == 0:
            return Same(node)
        return cls(node, p=m.p, drops=flow.trace.of(m)) if type(m) is nn.Dropout else None

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        patterns = [call.values]
        if len(flow.trace.modes) == 2:
            patterns.append(call.values if call.elsewhere is None else call.elsewhere)
        p = call.values["p"]
        if not isinstance(call.values["input"], fx.Node) or not isinstance(p, (int, float)):
            return None
        if any(c["p"] != p or not isinstance(c["training"], bool) for c in patterns):
            return None
        drops = tuple(c["training"] for c in patterns)
        return cls(call.node, p=p, drops=drops) if p and any(drops) else Same(call.node)

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        if before.const:
            flow.stop(self, "dropout of pruned channels that are not zero")
        else:
            self.layout = before.layout

    def build(self, scope: Scope, i: int) -> Run:
        p, drops, j = self.p, self.drops, scope.index[self.sources[0]]
        channels, read = scope.channels(self), scope.full(self.sources[0])
        dim = 0 if self.layout is None else self.layout.dim
        source = scope.op(self.sources[0])

        def run(env: Values, training: bool) -> None:
            x = env.kept[j] if channels is not None else read(env)
            if drops[0 if training else -1] if self.module is None else self.module.training:
                shape = list(x.shape)
                if channels is not None:
                    shape[dim] = channels.width
                noise = F.dropout(source.in_order(x.new_ones(shape)), p, True)
                if channels is not None:
                    noise = noise.index_select(dim, channels.kept)
                if channels is not None and channels.pads:
                    shape[dim] = channels.pads
                    noise = torch.cat([noise, noise.new_zeros(shape)], dim)
                x = x * noise
            env.kept[i] = x

        return run

    def export(self, small: Small) -> Value:
        """Nothing, unless it is on in eval mode; then the same numbers are drawn as at full width."""
        source = small.source(self)
        (on,) = self.drops
        if not on and self.layout is not None:
            return Value(source.node, small.channels(self), source.constants)
        if not on:
            return Value(small.full(self.sources[0]), None)
        return small.narrowed(self, small.call(F.dropout, small.full(self.sources[0]), self.p, True))

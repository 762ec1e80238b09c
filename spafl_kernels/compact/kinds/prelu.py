"""PReLU, with one slope or one per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..graph.calls import Call, Signature
from ..small import Value
from .base import Op, Stop
from .channelwise import Channelwise
from .whole import Constant

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..plan.plan import Channels
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["PReLU"]

_SIGNATURE = Signature("input weight")


@dataclass(eq=False)
class PReLU(Channelwise):
    """``weight``: name of the node of a functional call's slopes."""

    kind = "prelu"
    modules = (nn.PReLU,)
    calls: ClassVar[Mapping[Any, Any]] = {F.prelu: _SIGNATURE, torch.prelu: _SIGNATURE, "prelu": _SIGNATURE}

    weight: str = ""

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        return cls(node)

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        x, weight = call.values["input"], call.values["weight"]
        return cls(call.node, weight=weight.name) if isinstance(x, fx.Node) and isinstance(weight, fx.Node) else None

    def follow(self, flow: Flow) -> None:
        super().follow(flow)
        if self.layout is None:
            raise Stop
        if self.weight and flow.stored and not isinstance(flow.ops[self.weight], Constant):
            raise Stop("slopes that are computed")
        slopes = self.module.weight.shape if self.module is not None else flow.ops[self.weight].shape or ()
        if tuple(slopes) not in ((), (1,)) and self.layout.dim != 1:
            raise Stop("channels are not where PReLU has its slopes")

    def build(self, scope: Scope, i: int) -> Run:
        j, channels, m = scope.index[self.sources[0]], scope.channels(self), self.module
        assert channels is not None
        read = scope.full(self.weight) if self.weight else None

        def run(env: Values, training: bool) -> None:
            c = env.constants[j]
            kept, dropped = _slopes(m.weight if read is None else read(env), channels)
            env.kept[i] = F.prelu(env.kept[j], kept)
            env.constants[i] = None if c is None else _of_constants(c, dropped)

        return run

    def export(self, small: Small) -> Value:
        source, channels = small.source(self), small.channels(self)
        assert channels is not None
        weight = self.module.weight if self.module is not None else small.known(self.weight)
        kept, dropped = _slopes(weight.detach(), channels)
        made = nn.PReLU(kept.numel(), device=kept.device, dtype=kept.dtype)
        made.weight.copy_(kept)
        c = source.constants
        return Value(
            small.module(self.name, made, source.node), channels, None if c is None else _of_constants(c, dropped)
        )


def _slopes(weight: Tensor, channels: Channels) -> tuple[Tensor, Tensor]:
    """Those of the kept and of the dropped channels."""
    if weight.numel() == 1:
        return weight, weight
    kept = weight.index_select(0, channels.kept)
    return F.pad(kept, (0, channels.pads)) if channels.pads else kept, weight.index_select(0, channels.dropped)


def _of_constants(c: Tensor, slopes: Tensor) -> Tensor:
    return F.prelu(c.unsqueeze(0), slopes).squeeze(0) if c.dim() == 1 else F.prelu(c, slopes)

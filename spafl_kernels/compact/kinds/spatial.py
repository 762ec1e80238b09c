"""What operations over the positions of images have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from ..run.constants import all_places
from ..run.spread import zero_pads
from ..small import Value
from .base import Const, Stop
from .channelwise import Channelwise, exported_function

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["Spatial"]


@dataclass(eq=False)
class Spatial(Channelwise):
    """A function of every channel of an image alone.

    Args:
        apply: the function.
        keeps: of a constant channel it makes the same constant.
        fills: what it writes to some positions, whatever the channel is.
    """

    fresh = True

    apply: Callable[..., Tensor] = F.max_pool2d
    keeps: bool = True
    fills: float = 0.0

    def follow(self, flow: Flow) -> None:
        super().follow(flow)
        if self.layout is None:
            return
        if self.layout.dim != 1 or len(self.shape or ()) != 4:
            raise Stop(f"channels are not where {self.kind} has them")
        if not self.keeps and (self.const or self.fills):
            self.const |= Const.PLACE
            if self.const == Const.VARIES:
                raise Stop(f"{self.kind} of pruned channels that vary over samples")

    def constants(self, c: Tensor | None, count: int, like: Tensor, shape: Any) -> Tensor | None:
        """What becomes of the constants of ``count`` dropped channels of a value of this shape."""
        if c is None:
            if not self.fills or not count:
                return None
            c = like.new_zeros(count)
        if self.keeps and (c.dim() == 1 or c.shape[2:].numel() == 1):
            return c
        return self.apply(all_places(c, shape, 1))

    def build(self, scope: Scope, i: int) -> Run:
        apply, j, channels = self.apply, scope.index[self.sources[0]], scope.channels(self)
        count = 0 if channels is None else len(channels.dropped)
        filled = bool(self.fills)
        # Mostly a constant stays what it is.
        steady = self.keeps and self.const != Const.PLACE

        def run(env: Values, training: bool) -> None:
            x, c = env.kept[j], env.constants[j]
            env.kept[i] = apply(x) if not filled or channels is None else zero_pads(apply, x, channels, 1)
            env.constants[i] = c if steady else self.constants(c, count, x, x.shape)

        return run

    def export(self, small: Small) -> Value:
        source, channels = small.source(self), small.channels(self)
        node = exported_function(self, small, source.node)
        count, like = 0 if channels is None else len(channels.dropped), next(small.flow.model.parameters())
        shape = (1, *(small.flow.source(self).shape or ())[1:])
        return Value(node, channels, self.constants(source.constants, count, like, shape))

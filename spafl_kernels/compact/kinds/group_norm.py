"""GroupNorm: means and variances of groups of which some channels are not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..graph.calls import Call, Signature
from ..run.constants import like_value, typed
from ..small import Value
from .base import Const, Op, Stop
from .whole import as_it_stands

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["GroupNorm"]


@dataclass(eq=False)
class GroupNorm(Op):
    """A dropped channel takes part in its group's statistics; what becomes of it is another number in every sample.

    Args:
        groups, eps: as the call has them.
        weight, bias: names of the nodes of a functional call's parameters.
    """

    kind = "group norm"
    modules = (nn.GroupNorm,)
    calls: ClassVar[Mapping[Any, Any]] = {
        F.group_norm: Signature("input num_groups weight bias eps", weight=None, bias=None, eps=1e-5)
    }
    reads_channels = True

    groups: int = 1
    eps: float = 1e-5
    weight: str = ""
    bias: str = ""

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        return cls(node, groups=m.num_groups, eps=m.eps)

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        v = call.values
        names = ["" if v[k] is None else v[k].name for k in ("weight", "bias") if isinstance(v[k], fx.Node | None)]
        if not isinstance(v["input"], fx.Node) or len(names) < 2 or call.literals("input", "weight", "bias") is None:
            return None
        return cls(call.node, groups=v["num_groups"], eps=v["eps"], weight=names[0], bias=names[1])

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        if before.layout is None:
            raise Stop
        if before.layout.dim != 1:
            raise Stop("channels are not where the norm reads them")
        if before.const == Const.PLACE:
            raise Stop("GroupNorm of pruned channels that vary over positions")
        if flow.stored:
            raise Stop("behind GroupNorm a pruned channel is another constant in every sample, which cannot be stored")
        self.layout, self.const = before.layout, Const.SAMPLE

    def build(self, scope: Scope, i: int) -> Run:
        j, channels, eps, groups = scope.index[self.sources[0]], scope.channels(self), self.eps, self.groups
        assert channels is not None
        m, size = self.module, channels.width // groups
        weight, bias = ((scope.full(n) if n else None) for n in (self.weight, self.bias))
        kept, dropped, pads = channels.kept, channels.dropped, channels.pads
        group_kept, group_dropped = kept // size, dropped // size
        every = torch.arange(groups, device=kept.device)
        of_kept, of_dropped = (g.unsqueeze(1) == every for g in (group_kept, group_dropped))

        def run(env: Values, training: bool) -> None:
            x, c = env.kept[j], env.constants[j]
            if m is not None:
                w, b = m.weight, m.bias
            else:
                w, b = (None if read is None else read(env) for read in (weight, bias))
            if not pads and not len(dropped):
                env.kept[i] = F.group_norm(x, groups, w, b, eps)
                return
            if torch.is_autocast_enabled(x.device.type):
                x, c = x.float(), None if c is None else c.float()
            count, ndim = len(kept), x.dim()
            # What is small is worked out for the kept channels, what is large for all that are stored: zeros stay 0.
            centred, mean, var = _Centred.apply(x if ndim > 2 else x.unsqueeze(2))
            mean, var = mean.narrow(1, 0, count), var.narrow(1, 0, count)
            constant = mean.new_zeros(1, len(dropped)) if c is None else like_value(c, 1, ndim).flatten(1)
            sums = _by_group(mean, of_kept) + _by_group(constant, of_dropped)
            means = sums / size
            inside, outside = mean - means.index_select(1, group_kept), constant - means.index_select(1, group_dropped)
            squares = _by_group(var + inside.square(), of_kept) + _by_group(outside.square(), of_dropped)
            scale = torch.rsqrt(squares / size + eps)
            factor, constants = scale.index_select(1, group_kept), outside * scale.index_select(1, group_dropped)
            if w is not None:
                factor, constants = factor * w.index_select(0, kept), constants * w.index_select(0, dropped)
            shift = inside * factor
            if b is not None:
                shift, constants = shift + b.index_select(0, kept), constants + b.index_select(0, dropped)
            if pads:
                factor, shift = F.pad(factor, (0, pads)), F.pad(shift, (0, pads))
            y = _Scaled.apply(centred, factor, shift)
            y = env.kept[i] = y if ndim > 2 else y.squeeze(2)
            if len(dropped):
                env.constants[i] = typed(constants.view(len(constants), -1, *(1,) * (ndim - 2)), y)

        return run

    def export(self, small: Small) -> Value:
        return Value(as_it_stands(self, small), None)


def _by_group(value: Tensor, member: Tensor) -> Tensor:
    """``(N, C)`` summed to ``(N, groups)``; not by a product, which a GPU may round."""
    return (value.unsqueeze(2) * member.to(value.dtype)).sum(1)


def _over(value: Tensor, like: Tensor) -> Tensor:
    """``(N, C)`` for a product with ``(N, C, ...)``."""
    return value.view(*value.shape, *(1,) * (like.dim() - 2))


def _places(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


class _Centred(torch.autograd.Function):
    """``_Centred.apply(x)``: x ``(N, C, ...)`` less its mean over positions; mean and variance ``(N, C)``.

    Three plain passes take a tenth of ``torch.var_mean``, and two of its derivative's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.mean(_places(x), keepdim=True)
        centred = x - mean
        ctx.save_for_backward(centred)
        return centred, mean.flatten(1), centred.square().mean(_places(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad, of_mean, of_var = grads
        (centred,) = ctx.saved_tensors
        count = max(prod(centred.shape[2:]), 1)
        rest = of_mean / count - grad.mean(_places(grad))
        return grad + torch.addcmul(_over(rest, grad), centred, _over(of_var * (2 / count), grad))


class _Scaled(torch.autograd.Function):
    """``_Scaled.apply(x, factor, shift)``: ``x * factor + shift``, x ``(N, C, ...)``, the others ``(N, C)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return torch.addcmul(_over(shift, x), x, _over(factor, x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grads
        x, factor = ctx.saved_tensors
        return grad * _over(factor, grad), (grad * x).sum(_places(x)), grad.sum(_places(x))

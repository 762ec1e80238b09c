"""BatchNorm: its parameters and statistics are compact too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...cpu.norm import DirectBatchNormRelu
from ...cpu.norm import pools as takes_pool
from ..graph.layout import Layout
from ..plan.plan import Channels
from ..run.constants import like_value, typed
from ..small import Value, take_rows_of
from .base import Const, Op
from .whole import Whole

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["BatchNorm"]


@dataclass(eq=False)
class BatchNorm(Op):
    """``reads``: layout of what it normalises, None at full width. ``levels``: what is dropped is beta in training."""

    kind = "norm"
    modules = (nn.BatchNorm1d, nn.BatchNorm2d)
    reads_channels = True
    fresh = True

    reads: Layout | None = None
    levels: bool = True

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        if not m.track_running_stats or m.momentum is None or m.running_mean is None or m.running_var is None:
            return None
        # Where gradients are asked for, a constant channel is beta; with fixed statistics it would be another.
        modes = flow.trace.of(m)
        if modes != (True, False) if len(modes) == 2 else flow.trace.gradients[0] and not modes[0]:
            return Whole(node, reason="its statistics are fixed in training")
        op = cls(node)
        flow.norms[flow.names[id(m)]] = op
        return op

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        if before.layout is not None and before.layout.dim != 1:
            return flow.stop(self, "channels are not where the norm reads them")
        self.reads = self.layout = before.layout
        if before.layout is not None:
            self.const = before.const | Const.SAME
            self.levels = self.const == Const.SAME

    def takes_tail(self, scope: Scope) -> bool:
        """Whether ReLU and max-pool can be a part of the call."""
        return self.levels

    def build(self, scope: Scope, i: int) -> Run:
        m = self.module
        slot = scope.norms[scope.flow.names[id(m)]]
        momentum, eps = m.momentum, m.eps
        channels = None if self.reads is None else scope.plan.channels(self.reads)
        read = scope.full(self.sources[0]) if channels is None else None
        drops = channels is not None and len(channels.dropped) > 0
        j, tail = scope.index[self.sources[0]], scope.tails.get(self.name)
        assert momentum is not None

        def run(env: Values, training: bool) -> None:
            x = env.kept[j] if read is None else read(env)
            training = m.training
            slot.batches += training
            arguments = (x, slot.running_mean, slot.running_var, slot.weight, slot.bias, training, momentum, eps)
            # Of one value per channel, or none, PyTorch knows what to say.
            if tail is not None and x.numel() > x.shape[1]:
                pooled = tail.window > 1 and takes_pool(x, tail.window)
                y = DirectBatchNormRelu.apply(*arguments, tail.window if pooled else 1)
                if tail.window > 1 and not pooled:
                    y = tail.pooled(y)
            else:
                y = F.batch_norm(*arguments)
                if tail is not None:
                    y = tail(y)
            env.kept[i] = y
            if not drops:
                return
            out: Tensor | None
            c, mean, var, bias = env.constants[j], slot.mean_dropped, slot.var_dropped, slot.bias_dropped
            assert mean is not None and var is not None
            if c is not None and c.dim() > 1:
                count = x.numel() // x.shape[1]
                out = _of_maps(
                    c, mean, var, slot.weight_dropped, bias, (momentum, eps, count) if training else (None, eps, 0)
                )
            elif training:
                # A constant has batch variance 0, and its normalised value is 0.
                out = bias
                with torch.no_grad():
                    mean.mul_(1 - momentum)
                    if c is not None:
                        mean.add_(c, alpha=momentum)
                    var.mul_(1 - momentum)
            else:
                level = -mean if c is None else c - mean
                level = level * torch.rsqrt(var + eps)
                if bias is not None:
                    weight = slot.weight_dropped
                    level = torch.addcmul(bias, level, weight) if weight is not None else level + bias
                out = level
            out = typed(out, y)
            env.constants[i] = out if tail is None or out is None else torch.relu(out)

        return run

    def numbers(self, channels: Channels | None, constants: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """In eval: ``(scale, shift)`` of the kept channels, 0 for pads, and what becomes of the constants."""
        m = self.module
        assert m.running_mean is not None and m.running_var is not None
        scale = torch.rsqrt(m.running_var + m.eps)
        if m.weight is not None:
            scale = scale * m.weight.detach()
        shift = -m.running_mean * scale
        if m.bias is not None:
            shift = shift + m.bias.detach()
        after = None
        if channels is not None and len(channels.dropped):
            after = shift[channels.dropped]
            if constants is not None:
                factor = scale[channels.dropped]
                if constants.dim() > 1:
                    factor, after = like_value(factor, 1, constants.dim()), like_value(after, 1, constants.dim())
                after = after + constants * factor
        if channels is not None:
            scale, shift = take_rows_of(scale, channels), take_rows_of(shift, channels)
        return scale, shift, after

    def export(self, small: Small) -> Value:
        m, source = self.module, small.source(self)
        channels = None if self.reads is None else small.plan.channels(self.reads)
        node = small.full(self.sources[0]) if channels is None else source.node
        *_, after = self.numbers(channels, source.constants if channels is not None else None)
        width = m.num_features if channels is None else channels.stored
        made = type(m)(width, m.eps, m.momentum, m.affine, True, m.running_mean.device, m.running_mean.dtype)
        for key, value in m.state_dict().items():
            target = getattr(made, key)
            target.copy_(take_rows_of(value, channels) if channels is not None and value.dim() else value)
        return Value(small.module(small.flow.names[id(m)], made, node), channels, after)


def _of_maps(
    c: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, settings: tuple[Any, float, int]
) -> Tensor:
    """Constants that vary over samples or positions, normalised; in training the statistics are updated.

    ``settings``: momentum (None in eval), eps, and how many numbers a channel has.
    """
    momentum, eps, count = settings
    ndim = c.dim()
    if momentum is None:
        center, spread = mean, var
    else:
        over = [d for d in range(ndim) if d != 1]
        spread, center = torch.var_mean(c, over, correction=0)
        with torch.no_grad():
            mean.lerp_(center.to(mean.dtype), momentum)
            var.lerp_(spread.to(var.dtype) * count / (count - 1), momentum)
    out = (c - like_value(center, 1, ndim)) * like_value(torch.rsqrt(spread + eps), 1, ndim)
    out = out if weight is None else out * like_value(weight, 1, ndim)
    return out if bias is None else out + like_value(bias, 1, ndim)

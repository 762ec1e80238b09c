"""What of a traced model can be one compiled call, and which memory order suits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...cpu.conv_pool import MAX_IN_CHANNELS, MAX_KERNEL, DirectReluPool
from ...layers import ThresholdLayer
from ..graph.calls import target_of
from ..graph.flow import Flow
from ..kinds.base import Op
from ..kinds.channelwise import Relu
from ..kinds.layers import Layer
from ..kinds.norms import BatchNorm
from ..kinds.pools import Pool

__all__ = ["Tail", "always_fused", "deferred", "prefers_channels_last", "tails"]


def prefers_channels_last(flow: Flow, gpu: bool = False) -> bool:
    """Measured on a CPU: 10-20 % less time for Conv4; more for a fused first layer. The order of a GPU's tensor cores.

    Not where a norm reads a kept bias: BatchNorm of that constant is beta plus rounding, ReLU asks for its sign, and
    the rounding is that of the masked model only in the same memory order. Nor where GroupNorm reads what has no
    gradient, such as the image or what a frozen layer gives: on a CPU its backward of channels-last tensors then writes
    to a tensor that is not there, and the process dies (torch 2.13).
    """
    if any(_is_group_norm(op) and not flow.source(op).grad for op in flow.ops.values()):
        return False
    norms = [op for op in flow.norms.values() if isinstance(op.module, nn.BatchNorm2d)]
    biased = any(_reads_kept_bias(flow, op) for op in flow.norms.values())
    images = [i.shape for i in flow.inputs if i.batched and len(i.shape) == 3]
    worth = gpu or (any(shape[0] > 1 for shape in images) and bool(norms))
    return bool(images) and worth and not biased


def _is_group_norm(op: Op) -> bool:
    return isinstance(op.module, nn.GroupNorm) or target_of(op.node) in (F.group_norm, torch.group_norm)


def _reads_kept_bias(flow: Flow, norm: BatchNorm) -> bool:
    """Whether a pruned filter can reach ``norm`` as the constant of its bias."""
    nodes, seen = list(norm.node.all_input_nodes), set()
    while nodes:
        op = flow.ops[nodes.pop().name]
        if op.name in seen:
            continue
        seen.add(op.name)
        if isinstance(op.module, ThresholdLayer) and op.module.bias is not None and not op.module.mask_bias:
            return True
        if not isinstance(op, Layer) or not op.dense:
            nodes += op.node.all_input_nodes
    return False


@dataclass(frozen=True)
class Tail:
    """A ReLU, and perhaps a max-pool, that is a part of the call of the layer or norm in front of it.

    Args:
        relu, pool: the operations.
        window: of the pool, as compiled kernels know it; 1 without one.
    """

    relu: Relu
    pool: Pool | None = None
    window: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return (self.relu.name,) if self.pool is None else (self.relu.name, self.pool.name)

    def __call__(self, y: Tensor) -> Tensor:
        """Both, where they cannot be a part of another call; ``y`` may be overwritten."""
        if self.pool is None:
            return torch.relu_(y)
        if y.is_contiguous():
            return DirectReluPool.apply(y, self.window)
        return torch.relu_(self.pool.apply(y))

    def pooled(self, y: Tensor) -> Tensor:
        """The pool alone, behind a ReLU."""
        assert self.pool is not None
        return self.pool.apply(y)


def tails(flow: Flow) -> dict[str, Tail]:
    """By layer or norm: what can be a part of its call. Plan and batch decide whether it is."""
    return _conv_tails(flow) | _norm_tails(flow)


def _conv_tails(flow: Flow) -> dict[str, Tail]:
    """Convolutions with ReLU and max-pool; with more input channels a general convolution is as fast."""
    found = {}
    for op in flow.layers.values():
        m = op.module
        if not isinstance(m, nn.Conv2d) or not op.dense:
            continue
        if m.stride != (1, 1) or m.dilation != (1, 1) or m.groups != 1 or m.padding_mode != "zeros":
            continue
        if isinstance(m.padding, str) or max(m.kernel_size) > MAX_KERNEL:
            continue
        relu = _only_user(flow, op)
        pool = _only_user(flow, relu) if isinstance(relu, Relu) and relu.plain else None
        if isinstance(relu, Relu) and isinstance(pool, Pool) and pool.window is not None:
            found[op.name] = Tail(relu, pool, pool.window)
    return found


def _norm_tails(flow: Flow) -> dict[str, Tail]:
    """Norms whose only user is a ReLU, and the pool that is the ReLU's, if a kernel knows it.

    Not where a norm reads a kept bias, for the reason in :func:`prefers_channels_last`.
    """
    found = {}
    for op in flow.norms.values():
        relu = _only_user(flow, op)
        if not isinstance(relu, Relu) or not relu.plain or _reads_kept_bias(flow, op):
            continue
        pool = _only_user(flow, relu)
        known = isinstance(pool, Pool) and pool.window is not None
        found[op.name] = Tail(relu, pool, pool.window) if known else Tail(relu)  # type: ignore[union-attr, arg-type]
    return found


def _only_user(flow: Flow, op: Op) -> Op | None:
    """The only op that reads a value or its shape, which a fused call may not have."""
    users = flow.users(op)
    return users[0] if len(users) == 1 else None


def always_fused(flow: Flow) -> set[str]:
    """Layers that have a tail under every plan; their rows need no rounding to blocks."""
    found = _conv_tails(flow)
    return {name for name, op in flow.layers.items() if op.name in found and op.module.in_channels <= MAX_IN_CHANNELS}


def deferred(flow: Flow, tails: Mapping[str, Tail]) -> dict[str, Relu]:
    """The ReLUs, by name, that wait for the max-pool that is their only user.

    It is the same function with the same gradient there, on a quarter of the elements. What falls anywhere, as GELU
    does, would be another function.
    """
    inside = {name for tail in tails.values() for name in tail.names}
    found = {}
    for op in flow.ops.values():
        if isinstance(op, Relu) and op.name not in inside:
            pool = _only_user(flow, op)
            if isinstance(pool, Pool) and pool.is_max:
                found[op.name] = op
    return found

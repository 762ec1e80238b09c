"""What of a traced model can be one compiled call, and which memory order suits it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import ThresholdLayer
from ..ops.conv_pool import MAX_IN_CHANNELS, MAX_KERNEL, POOLS
from .flow import Flow, Op


def prefers_channels_last(flow: Flow, gpu: bool = False) -> bool:
    """Measured on a CPU: 10-20 % less time for Conv4; more for a fused first layer. The order of a GPU's tensor cores.

    Not where a norm reads a kept bias: BatchNorm of that constant is beta plus rounding, ReLU asks for its sign, and
    the rounding is that of the masked model only in the same memory order.
    """
    norms = [op for op in flow.norms.values() if isinstance(op.module, nn.BatchNorm2d)]
    biased = any(_reads_kept_bias(flow, op) for op in flow.norms.values())
    worth = gpu or (flow.image[0] > 1 and bool(norms))
    return len(flow.image) == 3 and worth and not biased


def _reads_kept_bias(flow: Flow, norm: Op) -> bool:
    """Whether a pruned filter can reach ``norm`` as the constant of its bias."""
    nodes, seen = list(norm.node.all_input_nodes), set()
    while nodes:
        op = flow.ops[nodes.pop().name]
        if op.name in seen:
            continue
        seen.add(op.name)
        if isinstance(op.module, ThresholdLayer) and op.module.bias is not None and not op.module.mask_bias:
            return True
        if op.kind != "layer":
            nodes += op.node.all_input_nodes
    return False


def single_user(flow: Flow, op: Op) -> bool:
    return len([u for u in op.node.users if flow.ops[u.name].kind != "shape"]) == 1


def fused_pools(flow: Flow) -> dict[str, tuple[str, int]]:
    """Layers whose convolution, ReLU and max-pool can be one compiled call: ``{layer: (pool op, window)}``.

    The call is made while a plan leaves the layer at most ``MAX_IN_CHANNELS`` input channels; above that a general
    convolution is as fast.
    """
    found = {}
    for name, op in flow.layers.items():
        m = op.module
        if not isinstance(m, nn.Conv2d) or op.kind != "layer":
            continue
        if m.stride != (1, 1) or m.dilation != (1, 1) or m.groups != 1 or m.padding_mode != "zeros":
            continue
        if isinstance(m.padding, str) or max(m.kernel_size) > MAX_KERNEL:
            continue
        relu = _only_user(flow, op)
        if relu is None or relu.kind != "relu" or relu.apply is not F.relu:
            continue
        pool = _only_user(flow, relu)
        if pool is not None and pool.kind == "pool" and (window := plain_window(pool)) is not None:
            found[name] = (pool.name, window)
    return found


def fused_norms(flow: Flow) -> dict[str, tuple[str, str, int]]:
    """Norms whose only user is a ReLU, so that both can be one compiled call: ``{norm: (relu op, pool op, window)}``.

    The pool is the ReLU's only user, if a kernel knows it; else it is ``""`` and the window 1. Not where a norm reads a
    kept bias, for the reason in :func:`prefers_channels_last`.
    """
    found = {}
    for op in flow.norms.values():
        relu = _only_user(flow, op)
        if relu is None or relu.kind != "relu" or relu.apply is not F.relu or _reads_kept_bias(flow, op):
            continue
        pool = _only_user(flow, relu)
        window = plain_window(pool) if pool is not None and pool.kind == "pool" else None
        found[op.name] = (relu.name, "", 1) if pool is None or window is None else (relu.name, pool.name, window)
    return found


def _only_user(flow: Flow, op: Op) -> Op | None:
    """The only op that reads a value or its shape, which a fused call may not have."""
    users = [flow.ops[u.name] for u in op.node.users]
    return users[0] if len(users) == 1 else None


def always_fused(flow: Flow) -> set[str]:
    """Layers of :func:`fused_pools` that are within reach under every plan; their rows need no rounding to blocks."""
    return {name for name in fused_pools(flow) if flow.layers[name].module.in_channels <= MAX_IN_CHANNELS}


def plain_window(op: Op) -> int | None:
    """Window of a max-pool without overlap, padding or dilation that a compiled kernel knows."""
    m = op.module
    if not isinstance(m, nn.MaxPool2d) or m.ceil_mode:
        return None
    window = m.kernel_size if isinstance(m.kernel_size, int) else m.kernel_size[0]
    square = m.kernel_size in (window, (window, window)) and m.stride in (window, (window, window))
    return window if square and window in POOLS and m.padding in (0, (0, 0)) and m.dilation in (1, (1, 1)) else None


def after_its_pool(flow: Flow, op: Op) -> bool:
    """Whether a ReLU waits for the max-pool that is its only user.

    It is the same function with the same gradient there, on a quarter of the elements. What falls anywhere, as GELU
    does, would be another function.
    """
    pool = _only_user(flow, op)
    return op.kind == "relu" and pool is not None and pool.kind == "pool" and _is_max(pool)


def _is_max(op: Op) -> bool:
    if isinstance(op.module, nn.MaxPool2d):
        return True
    return op.node.op == "call_function" and op.node.target in (F.max_pool2d, torch.max_pool2d)

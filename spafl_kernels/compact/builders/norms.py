"""Calls of BatchNorm, activations and pools, alone and fused."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ...ops.conv_pool import DirectReluPool
from ...ops.norm import DirectBatchNormRelu
from ...ops.norm import pools as takes_pool
from ..flow import Op
from ..fusion import after_its_pool, plain_window, single_user
from ..scope import Run, Scope
from .layers import as_type_of
from .moves import same


def norm(scope: Scope, op: Op, i: int) -> Run:
    m, n = op.module, scope.count
    slot = scope.norms[scope.names[id(m)]]
    momentum, eps = m.momentum, m.eps
    channels = None if op.data is None else scope.plan.channels(op.data)
    read = scope.full(op.sources[0]) if channels is None else None
    drops = channels is not None and len(channels.dropped) > 0
    j = scope.index[op.sources[0]]
    relu, pool, window = scope.fused_norms.get(op.name, ("", "", 1))
    after_relu, after_pool = (3 * n + scope.index[name] if name else 0 for name in (relu, pool))
    assert momentum is not None

    def run(env: list[Any], training: bool) -> None:
        x = env[j] if read is None else read(env)
        training = m.training
        arguments = (x, slot.running_mean, slot.running_var, slot.weight, slot.bias, training, momentum, eps)
        # Of one value per channel, or none, PyTorch knows what to say.
        if relu and x.numel() > x.shape[1]:
            pooled = window > 1 and takes_pool(x, window)
            env[i] = DirectBatchNormRelu.apply(*arguments, window if pooled else 1)
            env[after_pool if pooled else after_relu] = True
        else:
            env[i] = F.batch_norm(*arguments)
        if not drops:
            return
        c, mean, var, bias = env[n + j], slot.mean_dropped, slot.var_dropped, slot.bias_dropped
        assert mean is not None and var is not None
        if training:
            # A constant has batch variance 0, and its normalised value is 0.
            env[n + i] = as_type_of(bias, env[i])
            with torch.no_grad():
                mean.mul_(1 - momentum)
                if c is not None:
                    mean.add_(c, alpha=momentum)
                var.mul_(1 - momentum)
        else:
            out = -mean if c is None else c - mean
            out = out * torch.rsqrt(var + eps)
            if bias is not None:
                out = torch.addcmul(bias, out, slot.weight_dropped) if slot.weight_dropped is not None else out + bias
            env[n + i] = as_type_of(out, env[i])

    return run


def relu(scope: Scope, op: Op, i: int) -> Run:
    apply, n, j = op.apply, scope.count, scope.index[op.sources[0]]
    assert apply is not None
    source = scope.op(op.sources[0])
    if after_its_pool(scope.flow, op):
        return same(scope, op, i)
    inside = source.kind in ("layer", "depthwise", "norm", "pool", "add") and single_user(scope.flow, source)
    if inside and apply is F.relu:
        apply = torch.relu_
    outside: Any = op.apply

    def run(env: list[Any], training: bool) -> None:
        env[i] = env[j] if env[3 * n + i] else apply(env[j])
        c = env[n + j]
        if c is not None:
            env[n + i] = outside(c)

    return run


def pool(scope: Scope, op: Op, i: int) -> Run:
    apply, n, j = op.apply, scope.count, scope.index[op.sources[0]]
    assert apply is not None
    source = scope.op(op.sources[0])
    relu = source.apply if after_its_pool(scope.flow, source) else None
    inner: Any = torch.relu_ if relu is F.relu else relu
    done = 3 * n + j  # ReLU is part of the norm before it
    window = plain_window(op)
    direct = relu is F.relu and scope.native and window is not None

    def run(env: list[Any], training: bool) -> None:
        y, c = env[j], env[n + j]
        if not env[3 * n + i]:
            if direct and y.is_contiguous():
                y = DirectReluPool.apply(y, window)
            else:
                y = apply(y)
                if relu is not None and not env[done]:
                    y = inner(y)
        if relu is not None and c is not None:
            c = relu(c)
        env[i], env[n + i] = y, c

    return run

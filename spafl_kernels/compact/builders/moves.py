"""Calls that move channels: flatten, concatenation, splits; and dropout, which zeroes some."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..flow import Op
from ..scope import Run, Scope


def same(scope: Scope, op: Op, i: int) -> Run:
    n, j = scope.count, scope.index[op.sources[0]]

    def run(env: list[Any], training: bool) -> None:
        env[i], env[n + i] = env[j], env[n + j]

    return run


def flatten(scope: Scope, op: Op, i: int) -> Run:
    n, j = scope.count, scope.index[op.sources[0]]
    before, after = scope.channels(scope.op(op.sources[0])), scope.channels(op)
    assert before is not None and after is not None

    def run(env: list[Any], training: bool) -> None:
        x, c = env[j], env[n + j]
        repeat = x[0, 0].numel()
        if (before.pads and repeat > 1) or after.pads != before.pads:
            x = F.pad(x.narrow(1, 0, len(before.kept)).flatten(1), (0, after.pads))
        env[i] = x.flatten(1)
        if c is not None:
            env[n + i] = c.repeat_interleave(repeat) if repeat > 1 else c

    return run


def dropout(scope: Scope, op: Op, i: int) -> Run:
    p, j = op.data, scope.index[op.sources[0]]
    channels = scope.channels(op)
    assert channels is not None and op.layout is not None
    dim = op.layout.dim

    def run(env: list[Any], training: bool) -> None:
        x = env[j]
        if training if op.module is None else op.module.training:
            # Draw the mask at full width: the same random numbers as the masked model.
            shape = list(x.shape)
            shape[dim] = channels.width
            noise = F.dropout(x.new_ones(shape), p, True).index_select(dim, channels.kept)
            if channels.pads:
                shape[dim] = channels.pads
                noise = torch.cat([noise, noise.new_zeros(shape)], dim)
            x = x * noise
        env[i] = x

    return run


def cat(scope: Scope, op: Op, i: int) -> Run:
    n, dim = scope.count, op.data
    after = scope.channels(op)
    assert after is not None
    parts = []
    for s in op.node.args[0]:
        source = scope.op(s.name)
        channels = scope.channels(source)
        width = (source.shape or ())[dim]
        parts.append(
            (scope.index[source.name], width if channels is None else len(channels.kept),
             0 if channels is None else len(channels.dropped))
        )  # fmt: skip

    def run(env: list[Any], training: bool) -> None:
        xs = [env[j] if env[j].shape[dim] == real else env[j].narrow(dim, 0, real) for j, real, _ in parts]
        if after.pads:
            shape = list(xs[0].shape)
            shape[dim] = after.pads
            xs.append(xs[0].new_zeros(shape))
        env[i] = torch.cat(xs, dim)
        if any(env[n + j] is not None for j, _, _ in parts):
            x = xs[0]
            cs = [x.new_zeros(lost) if env[n + j] is None else env[n + j] for j, _, lost in parts]
            env[n + i] = torch.cat(cs)

    return run


def split(scope: Scope, op: Op, i: int) -> Run:
    """A tuple of tensors and one of constants: one backward for all of them, where slices would have one each."""
    n, j, before = scope.count, scope.index[op.sources[0]], scope.channels(scope.op(op.sources[0]))
    layout = scope.op(op.sources[0]).layout
    assert before is not None and layout is not None
    ends = torch.tensor([high for _, high in op.data])
    sizes, lost = (
        torch.searchsorted(c, ends).diff(prepend=ends.new_zeros(1)).tolist()
        for c in (before.host.kept, before.host.dropped)
    )
    sizes.append(before.pads)

    def run(env: list[Any], training: bool) -> None:
        c = env[n + j]
        env[i], env[n + i] = env[j].split(sizes, layout.dim), None if c is None else c.split(lost)

    return run


def item(scope: Scope, op: Op, i: int) -> Run:
    n, j, index = scope.count, scope.index[op.sources[0]], op.node.args[1]
    after = scope.channels(op)
    assert after is not None and op.layout is not None
    index, dim, pads = index % len(scope.op(op.sources[0]).data), op.layout.dim, after.pads

    def run(env: list[Any], training: bool) -> None:
        x, c = env[j][index], env[n + j]
        if pads:
            shape = list(x.shape)
            shape[dim] = pads
            x = torch.cat([x, x.new_zeros(shape)], dim)
        env[i], env[n + i] = x, None if c is None else c[index]

    return run

"""Calls of sums, whose operands may have different channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..flow import Op
from ..plan import Channels
from ..scope import Run, Scope
from ..spread import Spread, Summand


def add(scope: Scope, op: Op, i: int) -> Run:
    n = scope.count
    a, b = (scope.op(s.name) for s in op.node.args)
    ja, jb = scope.index[a.name], scope.index[b.name]
    if a.layout == b.layout:

        def run(env: list[Any], training: bool) -> None:
            env[i] = env[ja] + env[jb]
            ca, cb = env[n + ja], env[n + jb]
            env[n + i] = cb if ca is None else ca if cb is None else ca + cb

        return run
    after = scope.channels(op)
    if after is not None:
        return _add_channels(scope, a, b, after, i)
    fa, fb = scope.full(a.name), scope.full(b.name)
    ca, cb = scope.channels(a), scope.channels(b)
    # Add a compact operand into the channels it has.
    if cb is not None and not cb.full:
        return _add_into(scope, fa, jb, b, cb, i)
    if ca is not None and not ca.full:
        return _add_into(scope, fb, ja, a, ca, i)

    def wide(env: list[Any], training: bool) -> None:
        env[i] = fa(env) + fb(env)

    return wide


def _add_into(scope: Scope, full: Callable[[list[Any]], Any], j: int, part: Op, channels: Channels, i: int) -> Run:
    assert part.layout is not None
    n = scope.count
    spread = Spread(channels.host.kept, channels.width, part.layout.dim, scope.native, scope.device)

    def run(env: list[Any], training: bool) -> None:
        env[i] = spread(env[j], env[n + j], full(env))

    return run


def _add_channels(scope: Scope, a: Op, b: Op, after: Channels, i: int) -> Run:
    """A sum of different channels: it has those that one of the operands has."""
    n, ja, jb = scope.count, scope.index[a.name], scope.index[b.name]
    first, second = (_summand(scope, op, after) for op in (a, b))
    if second.spread is None:
        ja, jb, first, second = jb, ja, second, first

    def run(env: list[Any], training: bool) -> None:
        ca, cb = env[n + ja], env[n + jb]
        env[i] = second(env[jb], cb, first(env[ja], ca, None))
        ca, cb = first.left(ca), second.left(cb)
        env[n + i] = cb if ca is None else ca if cb is None else ca + cb

    return run


def _summand(scope: Scope, op: Op, after: Channels) -> Summand:
    channels = scope.channels(op)
    assert channels is not None and op.layout is not None
    return Summand(channels, after, op.layout.dim, scope.native)

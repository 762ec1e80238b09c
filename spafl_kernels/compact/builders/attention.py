"""Calls of multi-head attention on the channels that are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..flow import Op
from ..heads import Heads, attend
from ..plan import Channels
from ..scope import Run, Scope
from ..spread import Pick, Spread


def attention(scope: Scope, op: Op, i: int) -> Run:
    attention, shape = op.data, op.shape or ()
    ops = [scope.op(name) for name in op.sources]
    # A channel that is dropped and not 0 must be there.
    known = [None if source.const else scope.channels(source) for source in ops]
    widths = (ops[0].shape or ())[2], (ops[2].shape or ())[2]
    heads = Heads([c and c.host for c in known], widths, attention.heads, scope.plan.multiple > 1)
    reads: list[Callable[[list[Any]], Tensor]] = [
        _pack(scope, source, channels, pick, place, heads.width * attention.heads)
        for source, channels, pick, place in zip(ops, known, heads.picks, heads.places)
    ]
    after, width = scope.channels(op), heads.width * attention.heads
    unpack, stored = None, shape[2] if after is None else after.stored
    if not len(heads.places[2]) == width == stored:
        unpack = Pick(heads.places[2], stored, 2, scope.native, scope.device)
    tokens = (ops[1].shape or ())[1]
    scope.macs += 6 * shape[1] * tokens * width
    fused = scope.native

    def run(env: list[Any], training: bool) -> None:
        q, k, v = (read(env) for read in reads)
        out = attend(q, k, v, attention.heads, attention.scale, fused)
        env[i] = out if unpack is None else unpack(out)

    return run


def _pack(
    scope: Scope, source: Op, channels: Channels | None, pick: Tensor, place: Tensor, width: int
) -> Callable[[list[Any]], Tensor]:
    """Reads the channels ``pick`` of a value, in their places among ``width``; both on the CPU."""
    j, stored = scope.index[source.name], (source.shape or ())[2] if channels is None else channels.stored
    read = scope.full(source.name) if channels is None else lambda env: env[j]
    if len(pick) == width == stored:
        return read
    spread = Spread(place, width, 2, scope.native, scope.device)
    if len(pick) == (stored if channels is None else len(channels.kept)):
        return lambda env: spread(read(env), None, None)
    take = Pick(pick, max(len(pick), 1), 2, scope.native, scope.device)
    return lambda env: spread(take(read(env)), None, None)

"""Calls of multi-head attention on the channels that are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..flow import Op
from ..heads import Heads, attend
from ..plan import Channels
from ..spread import Pick, Spread

if TYPE_CHECKING:
    from ..program import Program, Run


def attention(program: Program, op: Op, i: int) -> Run:
    attention, shape = op.data, op.shape or ()
    ops = [program.op(name) for name in op.sources]
    # A channel that is dropped and not 0 must be there.
    known = [None if source.const else program.channels(source) for source in ops]
    device = next(program.flow.model.parameters()).device
    widths = (ops[0].shape or ())[2], (ops[2].shape or ())[2]
    heads = Heads(known, widths, attention.heads, program.plan.multiple > 1, device)
    reads: list[Callable[[list[Any]], Tensor]] = [
        _pack(program, source, channels, pick, place, heads.width * attention.heads)
        for source, channels, pick, place in zip(ops, known, heads.picks, heads.places)
    ]
    after, width = program.channels(op), heads.width * attention.heads
    unpack, stored = None, shape[2] if after is None else after.stored
    if not len(heads.places[2]) == width == stored:
        unpack = Pick(heads.places[2], stored, 2, program.native)
    tokens = (ops[1].shape or ())[1]
    program.macs += 6 * shape[1] * tokens * width
    fused = program.native

    def run(env: list[Any], training: bool) -> None:
        q, k, v = (read(env) for read in reads)
        out = attend(q, k, v, attention.heads, attention.scale, fused)
        env[i] = out if unpack is None else unpack(out)

    return run


def _pack(
    program: Program, source: Op, channels: Channels | None, pick: Tensor, place: Tensor, width: int
) -> Callable[[list[Any]], Tensor]:
    """Reads the channels ``pick`` of a value, in their places among ``width``."""
    j, stored = program.index[source.name], (source.shape or ())[2] if channels is None else channels.stored
    read = program.full(source.name) if channels is None else lambda env: env[j]
    if len(pick) == width == stored:
        return read
    spread = Spread(place, width, 2, program.native)
    if len(pick) == (stored if channels is None else len(channels.kept)):
        return lambda env: spread(read(env), None, None)
    take = Pick(pick, max(len(pick), 1), 2, program.native)
    return lambda env: spread(take(read(env)), None, None)

"""Counts of the programs before one, in the launch that makes them: decoupled look-back (Merrill and Garland, 2016).

A program takes a ticket when it starts and works on the part of that number; it publishes its count, then adds up the
counts of the tickets before its own. So whoever waits, waits for programs that have started and that wait for none
behind them: no order of programs can hang. A count is one word, written and read by atomic operations, and nothing else
passes between programs: no order of other reads and writes matters. Words are 0 when the launch begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

WARPS = 8
LANES = 256  # counts of other programs that are read at once: one per thread, so that no atomic is done twice


@triton.jit
def _published(word, lane, mine):
    """Words of the programs ``lane`` where these are before ``mine``, else 0: waits until all of them are there."""
    before = lane < mine
    seen = tl.where(before, tl.atomic_add(word + lane, 0, mask=before, sem="relaxed"), 0)
    while tl.sum((before & (seen == 0)).to(tl.int32), 0) > 0:
        seen = tl.where(before, tl.atomic_add(word + lane, 0, mask=before, sem="relaxed"), 0)
    return seen


@triton.jit
def look_back(words, mine, count, some, LANES: tl.constexpr):
    """Sum of the counts of the programs before ``mine`` of a layer, and 1 if ``some`` is 1 in them or here, else 0.

    A word holds 1, plus 2 times ``some``, plus 4 times the count.
    """
    tl.atomic_xchg(words + mine, 1 + 2 * some + 4 * count, sem="relaxed")
    total = 0
    for first in range(0, mine, LANES):
        seen = _published(words, first + tl.arange(0, LANES), mine)
        total += tl.sum(seen >> 2, 0)
        some = tl.maximum(some, tl.max((seen >> 1) & 1, 0))
    return total, some

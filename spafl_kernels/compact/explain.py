"""What runs compact and what that brings, in words: for every layer, and for the step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .audit import measured
from .graph.flow import Flow
from .plan.conditions import rows_in_words
from .plan.estimate import expectation

__all__ = ["RowsBy", "in_words", "nothing_skipped"]

# By threshold layer: which filters are active, which rows are computed, and why more than these.
RowsBy = Mapping[str, tuple[Tensor, Tensor, str]]


def nothing_skipped(rows: RowsBy) -> str | None:
    """A sentence if filters are pruned and every one is computed all the same, with the reasons; else None."""
    pruned = sum(int((~active).sum()) for active, _, _ in rows.values())
    skipped = sum(int((~(kept | active)).sum()) for active, kept, _ in rows.values())
    if skipped or not pruned:
        return None
    reasons = dict.fromkeys(why for active, _, why in rows.values() if why and not bool(active.all()))
    return f"nothing is skipped, all {pruned} pruned filters are computed: {'; '.join(reasons) or 'they are needed'}"


def in_words(
    flow: Flow, rows: RowsBy, batch: int, compiled: bool, gathers: bool = False, measure: int = 0
) -> list[str]:
    """What is followed, what is expected of a training step, and a line for every threshold layer.

    Args:
        flow: of the model.
        rows: of the masks as they are; empty: they are not known.
        batch: samples in a step; 0: nothing is expected.
        compiled: the compiled operators run where they are there.
        gathers: the step gathers weights from the model besides, of which nothing is known.
        measure: number of samples with which every layer is timed alone; 0: none is.
    """
    lines, keep = [flow.explain()], {name: active | kept for name, (active, kept, _) in rows.items()}
    expected = None
    if rows and batch and next(flow.model.parameters()).device.type == "cpu":
        expected = expectation(flow, keep, batch, compiled)
        but = ", without its gathers" if gathers else ""
        lines.append(f"a step is expected to be {expected.gain:.2f}x as fast as masked{but}")
    audit = measured(flow, keep, measure) if rows and measure else None
    times = {} if audit is None else {a.name: a.masked_seconds / a.compact_seconds for a in audit.layers}
    for name, (active, kept, why) in rows.items():
        text = rows_in_words(name, active, kept, why)
        for edge, reason in flow.stops:
            sources, _, reader = edge.partition(" -> ")
            if name in sources.split(", "):
                text += f"; put together at full width for {reader}: {reason}"
        op = flow.layers[name].name
        if expected is not None and expected.compact.get(op):
            text += f"; expected {expected.masked[op] / expected.compact[op]:.2f}x"
        if name in times:
            text += f"; measured {times[name]:.2f}x"
        lines.append(text)
    return lines

"""Two runs compared at equal work: at a number of executed MACs that both reached."""

from __future__ import annotations

import numpy as np

from .report.run_data import Run

__all__ = ["accuracy_after", "difference_at_equal_work"]


def accuracy_after(run: Run, macs: float) -> float | None:
    """Mean accuracy over clients, a fraction, when the run had executed ``macs`` of training.

    Interpolated between the evaluated rounds before and behind it; None before the first and behind the last, and where
    the run does not know what it executed.
    """
    points, accuracies = run.curve("accuracy")
    work = [point.cost.executed_macs for point in points]
    known = [m for m in work if m is not None]  # a sum is unknown from its first unknown part on
    if not known or len(known) < len(work) or not known[0] <= macs <= known[-1]:
        return None
    return float(np.interp(macs, known, accuracies))


def difference_at_equal_work(own: Run, other: Run) -> float | None:
    """Accuracy of ``own`` minus that of ``other``, a fraction, at all the MACs of the one that executed fewer.

    None if the other run was not evaluated before that, or if one does not know what it executed.
    """
    totals = [m for m in (own.last.cost.executed_macs, other.last.cost.executed_macs) if m is not None]
    if len(totals) < 2:
        return None
    work = min(totals)
    first, second = accuracy_after(own, work), accuracy_after(other, work)
    return None if first is None or second is None else first - second

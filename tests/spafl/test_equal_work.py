"""Accuracy at equal work, with figures by hand."""

from pathlib import Path

import numpy as np
import pytest

from spafl.cost import Cost
from spafl.equal_work import accuracy_after, difference_at_equal_work
from spafl.report.run_data import Point, Run


def run(*evaluated: tuple[float | None, float | None]) -> Run:
    """A run of which these are the MACs executed so far and the accuracies, by round."""
    points = tuple(
        Point(number, Cost(executed_macs=macs), accuracy) for number, (macs, accuracy) in enumerate(evaluated)
    )
    counts = np.ones((1, 2), dtype=int)
    return Run(
        folder=Path("runs/small"), name="small", algorithm="local", model="lenet5", data="digits", config="",
        train=counts, test=counts, points=points, accuracies=None, gaps=None, masks=None, history=None, completed=True,
        environment={}, notes=(),
    )  # fmt: skip


SPARSE = run((5.0, None), (10.0, 0.5), (15.0, None), (20.0, 0.6))
DENSE = run((20.0, 0.3), (40.0, 0.7), (60.0, 0.9))


def test_accuracy_is_interpolated_between_evaluated_rounds():
    assert accuracy_after(SPARSE, 10.0) == 0.5 and accuracy_after(SPARSE, 20.0) == 0.6
    assert accuracy_after(SPARSE, 17.5) == pytest.approx(0.575)
    assert accuracy_after(DENSE, 50.0) == pytest.approx(0.8)
    assert accuracy_after(SPARSE, 5.0) is None and accuracy_after(SPARSE, 20.5) is None


def test_the_run_that_executed_less_says_at_how_much_work():
    assert difference_at_equal_work(DENSE, SPARSE) == pytest.approx(0.3 - 0.6)
    assert difference_at_equal_work(SPARSE, DENSE) == pytest.approx(0.6 - 0.3)
    longer = run((10.0, 0.2), (50.0, 0.6))
    assert difference_at_equal_work(longer, DENSE) == pytest.approx(0.6 - 0.8)


@pytest.mark.parametrize(
    "other", [run((30.0, 0.3), (60.0, 0.7)), run((10.0, 0.3), (None, 0.7)), run((10.0, None))],
    ids=["evaluated too late", "unknown work", "never evaluated"],
)  # fmt: skip
def test_there_is_no_figure_without_an_evaluation_and_known_work(other):
    assert difference_at_equal_work(SPARSE, other) is None and difference_at_equal_work(other, SPARSE) is None

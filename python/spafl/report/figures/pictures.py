"""The pictures of a report, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from ..run_data import Run
from .accuracy import (
    accuracy_by_client,
    accuracy_over_payload,
    accuracy_over_rounds,
    accuracy_over_seconds,
    accuracy_spread,
)
from .confusion import confusion
from .data import partition
from .pareto import accuracy_against_costs
from .sparsity import density_per_layer, filters_by_client, generalisation_gap, masks_and_labels
from .steering import steered
from .style import (
    evaluated,
    with_budgets,
    with_confusion,
    with_density,
    with_gaps,
    with_history,
    with_pruned_filters,
    with_varied_masks,
)


@dataclass(frozen=True)
class Picture:
    """A picture on the page: file stem, heading, how to read it, what draws it, which runs it shows and what the
    others lack."""

    stem: str
    title: str
    caption: str
    draw: Callable[[Sequence[Run]], Figure]
    shows: Callable[[Run], bool] = evaluated
    lacking: str = "not evaluated yet"


PICTURES = (
    Picture(
        "accuracy_rounds",
        "Accuracy over rounds",
        "Left the mean over all clients, each with its own model on its own test data; right the mean over the tenth "
        "of them that is worst off in that round. Below, how many have trained at all: the others still have the first "
        "model. A band spans the seeds of runs that differ in nothing else.",
        accuracy_over_rounds,
    ),
    Picture(
        "pareto",
        "What accuracy costs",
        "Up and to the left is better. Large marks are the last evaluated rounds, faint lines the way there; the "
        "dotted line joins those that no other beats in both (of several seeds, the medians). Bytes and operations are "
        "counted, time is measured.",
        accuracy_against_costs,
    ),
    Picture(
        "accuracy_payload",
        "Accuracy over payload",
        "Further left is cheaper: mean accuracy against all bytes sent so far in both directions; "
        "a level line is the last accuracy of a run that sends nothing.",
        accuracy_over_payload,
    ),
    Picture(
        "accuracy_seconds",
        "Accuracy over time",
        "Further left is faster: mean accuracy against the wall-clock time measured where the simulation ran, "
        "evaluation included.",
        accuracy_over_seconds,
    ),
    Picture(
        "accuracy_spread",
        "Accuracy spread over clients",
        "Every client's accuracy in the last evaluated round, sorted: a flat curve means that all clients fare alike.",
        accuracy_spread,
    ),
    Picture(
        "clients",
        "Accuracy, client by client",
        "Left a row per client and a column per evaluated round, brighter is more accurate: a dark row that stays is a "
        "client that is left behind. Right the last accuracy against how much data the client has.",
        accuracy_by_client,
        with_history,
        "not evaluated for all clients yet",
    ),
    Picture(
        "confusion",
        "What is taken for what",
        "A row is a class, a column what clients' models say, in percent of the class over the test data of all tested "
        "clients in the last evaluated round; the diagonal is right.",
        confusion,
        with_confusion,
        "confusion matrices not recorded; evaluation.confusion = true does",
    ),
    Picture(
        "density",
        "Density, by layer and by parameters",
        "The share of filters that are active, mean over clients: a line that falls is a layer that is being pruned. "
        "By parameters it is the share of the layers' weights that belongs to active filters.",
        density_per_layer,
        with_density,
        "no thresholds",
    ),
    Picture(
        "steering",
        "Budgets",
        "How each client's coefficient of the penalty was steered to its budget: the coefficient, the set point it "
        "asks for, and what it spent, medians over the clients of a round with their quartiles. The grey band is "
        "within 5 % of the budget.",
        steered,
        with_budgets,
        "no budgets",
    ),
    Picture(
        "filters",
        "Filters, client by client",
        "Of each run the layer in which clients differ most. A column is a client, a row a filter, coloured where the "
        "client keeps it: full rows are filters that everybody keeps, broken rows are personal.",
        filters_by_client,
        with_pruned_filters,
        "no masks recorded, or nothing pruned",
    ),
    Picture(
        "overlap",
        "Masks beside labels",
        "Do clients with like data keep like filters? Left the overlap of the filters of each pair of clients, all "
        "layers together, in the middle the cosine of their class counts, right one against the other, a point a pair.",
        masks_and_labels,
        with_varied_masks,
        "no masks that differ between clients",
    ),
    Picture(
        "gap",
        "Generalisation gap against density",
        "A point is a client; higher means more over-fitted (train minus test accuracy), further left means sparser.",
        generalisation_gap,
        with_gaps,
        "no train accuracies recorded",
    ),
    Picture(
        "partition",
        "Partition",
        "A column is a client, a row a class, darker means more samples and white none: a column with few cells "
        "is a client that has few classes.",
        partition,
        lambda run: True,
        "",
    ),
)

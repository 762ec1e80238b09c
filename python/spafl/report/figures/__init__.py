"""The pictures of a report: each a pure function of loaded runs that returns a matplotlib Figure.

A function raises :class:`ReportError` where no run has anything to show. A run keeps its colour and
line style in every picture. Nothing here touches pyplot or the user's matplotlib settings.
"""

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
from .pictures import PICTURES, Picture
from .sparsity import density_per_layer, filters_by_client, generalisation_gap, masks_and_labels
from .steering import steered
from .style import COLOURS, STYLE, in_style

__all__ = [
    "COLOURS",
    "PICTURES",
    "STYLE",
    "Picture",
    "accuracy_against_costs",
    "accuracy_by_client",
    "accuracy_over_payload",
    "accuracy_over_rounds",
    "accuracy_over_seconds",
    "accuracy_spread",
    "confusion",
    "density_per_layer",
    "filters_by_client",
    "generalisation_gap",
    "in_style",
    "masks_and_labels",
    "partition",
    "steered",
]

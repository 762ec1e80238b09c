"""The books of a run: what each round cost and brought, as the metrics and the summary record it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..algorithms import Evaluation, Training
from ..cost import Cost
from ..merge import Rejection
from .metrics import density_summary, evaluation_summary, first_layer_masks


@dataclass(frozen=True)
class FinishedRound:
    """What the round loop hands over at the end of a round.

    Attributes:
        sampled: the clients that trained, in the order they were drawn.
        trainings: the local work of those whose uploads were merged, in that order; messages are empty.
        rejected: uploads that were left out.
        cost: of this round alone.
        evaluations: of all clients, or None if the round was not evaluated.
    """

    round: int
    sampled: Sequence[int]
    trainings: Sequence[Training]
    rejected: Sequence[Rejection]
    cost: Cost
    evaluations: Sequence[Evaluation] | None


class Ledger:
    """Adds rounds up.

    Args:
        layer_weights: number of weights of each layer.
        cost, best: what was booked before, if the run is a resumed one.

    Attributes:
        cost: of all rounds booked so far.
        best: ``round`` and ``accuracy`` of the best evaluated round; empty before the first.
    """

    def __init__(
        self, layer_weights: dict[str, int], cost: Cost | None = None, best: dict[str, float] | None = None
    ) -> None:
        self._layer_weights = layer_weights
        self.cost = cost or Cost()
        self.best = dict(best or {})

    def book(self, done: FinishedRound) -> dict[str, Any]:
        """Add a round; returns its line of the metrics, whose costs are cumulative."""
        self.cost += done.cost
        line: dict[str, Any] = {
            "round": done.round,
            "sampled": list(done.sampled),
            "rejected": [asdict(rejection) for rejection in done.rejected],
            "train_loss": float(np.mean([t.loss for t in done.trainings])),
            "evaluation": None,
            "density": None,
            "first_layer": None,
            "cost": self.cost.record(),
            "figures": mean_figures([t.figures for t in done.trainings]),
        }
        if done.evaluations is not None:
            self.evaluated(line, done.evaluations)
        return line

    def evaluated(self, line: dict[str, Any], evaluations: Sequence[Evaluation]) -> None:
        """Enter the evaluation of all clients after the round that ``line`` belongs to."""
        line["evaluation"] = evaluation_summary(evaluations)
        line["density"] = density_summary(evaluations, self._layer_weights)
        line["first_layer"] = first_layer_masks(evaluations)
        accuracy = line["evaluation"]["accuracy"]["mean"]
        if accuracy > self.best.get("accuracy", -1.0):
            self.best = {"round": line["round"], "accuracy": accuracy}

    def summary(
        self, name: str, algorithm: str, lines: Sequence[dict[str, Any]], where: dict[str, Any]
    ) -> dict[str, Any]:
        """The summary of a finished run.

        Args:
            name, algorithm: of the run.
            lines: its metrics, one per round.
            where: see :func:`~spafl.simulation.metrics.environment`.
        """
        return {
            "name": name,
            "algorithm": algorithm,
            "rounds": len(lines),
            "rejected_uploads": sum(len(line.get("rejected", ())) for line in lines),
            "completed": True,
            "final": [line for line in lines if line["evaluation"] is not None][-1],
            "best": self.best,
            "environment": where,
        }


def mean_figures(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over the clients that reported it, by name."""
    names = {name for entry in figures for name in entry}
    return {n: float(np.mean([entry[n] for entry in figures if n in entry])) for n in sorted(names)}

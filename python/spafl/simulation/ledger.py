"""The books of a run: what each round cost and brought, as the metrics and the summary record it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..algorithms import Evaluation, Training
from ..config import RunConfig
from ..cost import Cost
from ..merge import Rejection
from ..system import Played
from .metrics import density_summary, evaluation_summary


@dataclass(frozen=True)
class FinishedRound:
    """What the round loop hands over at the end of a round.

    Attributes:
        sampled: the clients that trained, in the order they were drawn.
        trainings: the local work of those whose uploads were merged, in that order; messages are empty.
        rejected: uploads that were left out.
        cost: of this round alone.
        evaluations: of the clients that were tested, or None if the round was not evaluated.
        accepted: the clients of ``trainings``.
        played: what happened on the clients' devices, if they are modelled.
    """

    round: int
    sampled: Sequence[int]
    trainings: Sequence[Training]
    rejected: Sequence[Rejection]
    cost: Cost
    evaluations: Sequence[Evaluation] | None
    accepted: Sequence[int] = ()
    played: Played | None = None


class Ledger:
    """Adds rounds up.

    Args:
        layer_weights: number of weights of each layer.
        cost: what was booked before, if the run is a resumed one.

    Attributes:
        cost: of all rounds booked so far.
    """

    def __init__(self, layer_weights: dict[str, int], cost: Cost | None = None) -> None:
        self._layer_weights = layer_weights
        self.cost = cost or Cost()

    def book(self, done: FinishedRound) -> dict[str, Any]:
        """Add a round; returns its line of the metrics, whose costs are cumulative."""
        line: dict[str, Any] = {
            "round": done.round,
            "sampled": list(done.sampled),
            "rejected": [asdict(rejection) for rejection in done.rejected],
            "train_loss": float(np.mean([t.loss for t in done.trainings])) if done.trainings else None,
            **_NOT_EVALUATED,
            "cost": None,
            "figures": mean_figures([t.figures for t in done.trainings]),
            "turns": turns(done.accepted, [t.figures for t in done.trainings]),
        }
        if done.played is not None:
            line["system"] = done.played.record()
        self._add(line, done.cost)
        if done.evaluations is not None:
            self.evaluated(line, done.evaluations)
        return line

    def evaluated(self, line: dict[str, Any], evaluations: Sequence[Evaluation], cost: Cost | None = None) -> None:
        """Write an evaluation, and what it cost beyond what was booked, into the newest line."""
        if cost is not None:
            self._add(line, cost)
        line["evaluation"] = evaluation_summary(evaluations)
        line["density"] = density_summary(evaluations, self._layer_weights)

    def _add(self, line: dict[str, Any], cost: Cost) -> None:
        self.cost += cost
        line["cost"] = self.cost.record()


_NOT_EVALUATED = {"evaluation": None, "density": None}


def without_final_evaluation(line: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """A line as a run of this configuration writes it, where that of fewer rounds evaluated more after its last."""
    if not config.evaluates(line["round"]):
        return {**line, **_NOT_EVALUATED}
    final = line["round"] + 1 == config.rounds
    if line["evaluation"] is None or final or config.tests_training_data(line["round"]):
        return line
    return {**line, "evaluation": {**line["evaluation"], "train_accuracy": None}}


def run_summary(name: str, algorithm: str, lines: Sequence[dict[str, Any]], where: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished run.

    Args:
        name, algorithm: of the run.
        lines: its metrics, one per round.
        where: see :func:`~spafl.simulation.metrics.environment`.
    """
    evaluated = [line for line in lines if line["evaluation"] is not None]
    best = max(evaluated, key=lambda line: line["evaluation"]["accuracy"]["mean"])  # the first of equals
    return {
        "name": name,
        "algorithm": algorithm,
        "rounds": len(lines),
        "rejected_uploads": sum(len(line.get("rejected", ())) for line in lines),
        "completed": True,
        "final": evaluated[-1],
        "best": {"round": best["round"], "accuracy": best["evaluation"]["accuracy"]["mean"]},
        "environment": where,
    }


def turns(clients: Sequence[int], figures: Sequence[dict[str, float]]) -> dict[str, list[Any]]:
    """Figures of single turns: the clients that had them, and by name what each reported (None: nothing)."""
    names = sorted({name for entry in figures for name in entry})
    return {"clients": list(clients), **{name: [entry.get(name) for entry in figures] for name in names}}


def mean_figures(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over the clients that reported it, by name."""
    names = {name for entry in figures for name in entry}
    return {n: float(np.mean([entry[n] for entry in figures if n in entry])) for n in sorted(names)}

"""How clients with a budget were steered: paths of the penalty's coefficient, of set points, of what was spent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..budgets import FIGURES, by_class

__all__ = ["ALL", "Steering", "steering"]

ALL = "all clients"


@dataclass(frozen=True)
class Steering:
    """The clients of one budget, round by round.

    Attributes:
        clients: their class of device, or :data:`ALL`.
        kind, budget: what they may spend.
        rounds: ``(n,)`` those in which any of them took part, from 0.
        coefficient, set_point, spent: ``(n, 3)``, quartiles over their turns; ``spent`` as a share of the budget.
    """

    clients: str
    kind: str
    budget: float
    rounds: np.ndarray
    coefficient: np.ndarray
    set_point: np.ndarray
    spent: np.ndarray


def steering(
    target: Any, lines: Iterable[Mapping[str, Any]], classes: Sequence[str] | None = None
) -> tuple[Steering, ...]:
    """The budgets of a run and what became of them; nothing, where it has none.

    Args:
        target: ``algorithm.target`` as stored.
        lines: the metrics; turns that lack a figure are left out.
        classes: class of device by client, where devices are modelled.
    """
    if not isinstance(target, Mapping):
        return ()
    classed = by_class(target)
    budgets = dict(target) if classed else {ALL: target}
    found: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in budgets}
    for line in lines:
        turns = line.get("turns") or {"clients": []}
        for name, budget in budgets.items():
            ((kind, value),) = budget.items()
            columns = [turns.get(figure) or () for figure in ("coefficient", "set_point", FIGURES[kind])]
            own = [
                row
                for k, *row in zip(turns["clients"], *columns, strict=False)
                if None not in row and (not classed or (classes is not None and classes[k] == name))
            ]
            if own:
                table = np.array(own, dtype=np.float64) / [1.0, 1.0, value]
                found[name].append((line["round"], np.quantile(table, [0.25, 0.5, 0.75], axis=0)))
    made = []
    for name, path in found.items():
        if path:
            ((kind, value),) = budgets[name].items()
            rounds, parts = np.array([at for at, _ in path]), np.stack([part for _, part in path])
            made.append(Steering(name, kind, float(value), rounds, *(parts[:, :, i] for i in range(3))))
    return tuple(made)


def of_lines(target: Any, texts: Iterable[bytes], classes: Sequence[str] | None) -> tuple[Steering, ...]:
    """:func:`steering` of the lines of a file that was checked."""
    whole = (text for text in texts if text.endswith(b"\n") and text.strip())
    return steering(target, map(json.loads, whole), classes)

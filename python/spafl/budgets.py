"""Kinds of budgets, and where a turn's figures say what was spent; apart, for reports are written without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

__all__ = ["EVERYBODY", "EXECUTED", "FIGURES", "KINDS", "Kind", "by_class", "kinds_of"]

Kind = Literal["density", "macs", "seconds"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FIGURES: dict[Kind, str] = {"density": "density", "macs": "macs_share", "seconds": "turn_seconds"}
"""The name of what is measured among a turn's figures."""
EVERYBODY = "all"
"""What ``summary.json`` calls the clients of a budget that is not by class."""
EXECUTED: frozenset[Kind] = frozenset(("macs", "seconds"))
"""Kinds that count what is executed, so that pruned filters have to be left out."""


def by_class(target: Mapping[str, Any]) -> bool:
    """Whether ``algorithm.target`` has a budget for each class of device, in place of one for all clients."""
    return any(isinstance(value, Mapping) for value in target.values())


def kinds_of(target: Mapping[str, Any]) -> set[str]:
    """The kinds of the budgets of ``algorithm.target``."""
    return {kind for budget in (target.values() if by_class(target) else [target]) for kind in budget}

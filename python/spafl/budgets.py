"""Kinds of budgets, and where a turn's figures say what was spent; apart, for reports are written without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

__all__ = ["EXECUTED", "FIGURES", "KINDS", "Kind", "kinds_of"]

Kind = Literal["density", "macs", "seconds"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FIGURES: dict[Kind, str] = {"density": "density", "macs": "macs_share", "seconds": "turn_seconds"}
"""The name of what is measured among a turn's figures."""
EXECUTED: frozenset[Kind] = frozenset(("macs", "seconds"))
"""Kinds that count what is executed, so that pruned filters have to be left out."""


def kinds_of(target: Mapping[str, Any]) -> set[str]:
    """The kinds of the budgets of ``algorithm.target``: of all clients, or of each class of device."""
    tables = [value for value in target.values() if isinstance(value, Mapping)] or [target]
    return {kind for table in tables for kind in table}

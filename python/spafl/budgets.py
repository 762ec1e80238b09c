"""Kinds of budgets, and where a turn's figures say what was spent; apart, for reports are written without torch."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["FIGURES", "KINDS", "Kind"]

Kind = Literal["density", "macs", "seconds"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FIGURES: dict[Kind, str] = {"density": "density", "macs": "macs_share", "seconds": "turn_seconds"}
"""The name of what is measured among a turn's figures."""

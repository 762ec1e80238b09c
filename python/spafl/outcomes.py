"""How a client's turn on its device can end; apart, for reports are written without torch."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["OUTCOMES", "Outcome"]

Outcome = Literal["in time", "late", "failed", "left", "too large"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

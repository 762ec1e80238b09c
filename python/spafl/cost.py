"""What a run costs, counted three ways that are never added up: by formula, as sent and executed, in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

# Where each field stands in the "cost" table of a metrics line.
RECORDED = {
    "paper_bits": ("paper", "communication_bits"),
    "paper_macs": ("paper", "macs"),
    "up_bytes": ("payload", "up_bytes"),
    "down_bytes": ("payload", "down_bytes"),
    "up_frame_bytes": ("framed", "up_bytes"),
    "down_frame_bytes": ("framed", "down_bytes"),
    "executed_macs": ("executed", "macs"),
    "steps": ("executed", "steps"),
    "train_seconds": ("seconds", "train"),
    "evaluate_seconds": ("seconds", "evaluate"),
}

# The same, only there where devices are modelled.
MODELLED = {"modelled_seconds": ("modelled", "seconds"), "modelled_joules": ("modelled", "joules")}


@dataclass(frozen=True)
class Cost:
    """Costs of a client's turn, of a round, or of a run so far; they add up."""

    paper_bits: float = 0
    """Communication by the formula of the method's paper, bits."""
    paper_macs: float = 0
    """Multiply-accumulates by the formula of the method's paper."""
    executed_macs: float | None = 0
    """Multiply-accumulates carried out, or None: unknown, and so is every sum it is in."""
    steps: int = 0
    """SGD steps."""
    up_bytes: int = 0
    """Bytes of the tensors that clients sent."""
    down_bytes: int = 0
    """Bytes of the tensors that were sent to clients."""
    up_frame_bytes: int = 0
    """The same with names, shapes and checksums."""
    down_frame_bytes: int = 0
    train_seconds: float = 0
    """Wall-clock time."""
    evaluate_seconds: float = 0
    modelled_seconds: float = 0
    """Time by the model of the clients' devices; 0 without one."""
    modelled_joules: float = 0
    """Energy of the clients by it."""

    @property
    def payload_bytes(self) -> int:
        """Bytes sent in both directions."""
        return self.up_bytes + self.down_bytes

    @property
    def total_seconds(self) -> float:
        """Wall-clock time of training and evaluation."""
        return self.train_seconds + self.evaluate_seconds

    def __add__(self, other: Cost) -> Cost:
        pairs: dict[str, Any] = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        totals: dict[str, Any] = {name: None if None in pair else sum(pair) for name, pair in pairs.items()}
        return Cost(**totals)

    @staticmethod
    def sum(costs: Iterable[Cost]) -> Cost:
        """The sum, in order."""
        total = Cost()
        for cost in costs:
            total += cost
        return total

    def record(self) -> dict[str, dict[str, Any]]:
        """The "cost" table of a metrics line."""
        table: dict[str, dict[str, Any]] = {"seconds": {"total": self.total_seconds}}
        for name, (group, key) in RECORDED.items():
            table.setdefault(group, {})[key] = getattr(self, name)
        if self.modelled_seconds:
            table["modelled"] = {key: getattr(self, name) for name, (_, key) in MODELLED.items()}
        return table

"""Whether two configurations describe the same run, so that one may continue the other."""

from __future__ import annotations

from typing import Any

from ..config import RunConfig

# Settings that do not change any result, so a resumed run may have others.
_FREE = {"rounds", "simulation", "data.root"}


def first_difference(stored: RunConfig, given: RunConfig) -> str | None:
    """The first setting in which two configurations would give different results, in words; None if they agree."""

    def compare(a: Any, b: Any, path: str) -> str | None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in a.keys() | b.keys():
                where = f"{path}.{key}" if path else str(key)
                if where not in _FREE and (found := compare(a.get(key), b.get(key), where)):
                    return found
            return None
        return None if a == b else f"{path} is {a!r} there and {b!r} here"

    difference = compare(stored.model_dump(), given.model_dump(), "")
    if difference is None and stored.simulation.engine != given.simulation.engine:
        # Engines agree to rounding, not to the last bit.
        return compare(stored.simulation.engine, given.simulation.engine, "simulation.engine")
    return difference

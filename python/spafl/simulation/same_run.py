"""Whether two configurations describe the same run, so that one may continue the other."""

from __future__ import annotations

import json
from typing import Any

from ..algorithms import find_algorithm
from ..config import RunConfig
from ..later import LATER, reduced
from .files import digest


def _decisive(config: RunConfig) -> dict[str, Any]:
    """The settings that decide results: not how long a run is, what it is called, or where and how it computes."""
    settings = config.model_dump()
    del settings["rounds"], settings["name"], settings["flower"], settings["callbacks"], settings["data"]["root"]
    # Engines agree to rounding, not to the last bit.
    settings["simulation"] = {"engine": config.simulation.engine}
    return settings


def run_digest(config: RunConfig) -> str:
    """Equal for configurations of the same run, whatever settings the releases that they come from know."""
    settings = reduced(_decisive(config), LATER)
    later = find_algorithm(config.algorithm["name"]).later
    settings["algorithm"] = reduced(settings["algorithm"], later)
    return digest(json.dumps(settings, sort_keys=True, default=str).encode())


def first_difference(stored: RunConfig, given: RunConfig) -> str | None:
    """The first setting in which two configurations would give different results, in words; None if they agree."""

    def compare(a: Any, b: Any, path: str) -> str | None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                if found := compare(a.get(key), b.get(key), f"{path}.{key}" if path else str(key)):
                    return found
            return None
        return None if a == b else f"{path} is {a!r} there and {b!r} here"

    return compare(_decisive(stored), _decisive(given), "")

"""For all tests: one thread, as in the simulator's workers, and two tiers.

The fast tier (``make test``) leaves out tests marked ``slow`` and, of tests marked ``sweep``, all but a few cases. The
slow tier (``make test-all``: ``SPAFL_SLOW_TESTS=1``) runs everything.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # threads of two test processes disturb each other


def slow_tier() -> bool:
    return os.environ.get("SPAFL_SLOW_TESTS") == "1"


def pytest_report_header() -> str:
    return "tier: all tests" if slow_tier() else "tier: fast; SPAFL_SLOW_TESTS=1 runs all tests"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if slow_tier():
        return
    left_out = {item for item in items if item.get_closest_marker("slow")}
    sweeps = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep") and item not in left_out:
            sweeps[item.nodeid.split("[")[0]].append(item)
    for cases in sweeps.values():
        kept = covering([values(case) for case in cases])
        left_out.update(case for at, case in enumerate(cases) if at not in kept)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def values(case: pytest.Item) -> set[tuple[str, Any]]:
    """The values of a case's parameters, and of the fields of those that are dataclasses, by name."""
    found: set[tuple[str, Any]] = set()
    for name, value in case.callspec.params.items():  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(value):
            found |= {(f"{name}.{field.name}", repr(getattr(value, field.name))) for field in dataclasses.fields(value)}
        elif isinstance(value, (str, int, float, bool, tuple, type(None), torch.dtype)):
            found.add((name, repr(value)))
        else:
            found.add((name, id(value)))
    return found


def covering(cases: list[set[Any]]) -> set[int]:
    """Positions of few cases that together hold every value: always the one with most of those still missing."""
    kept, missing = set(), set().union(*cases)
    while missing:
        best = max(range(len(cases)), key=lambda at: (len(cases[at] & missing), -at))
        kept.add(best)
        missing -= cases[best]
    return kept

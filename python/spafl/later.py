"""Settings that came later than run folders: what a run without them did, so that it can be read and continued.

Whether two configurations are of the same run is decided by the resolved value of every setting, defaults included:
where a default changes, a run with the old one is not continued with the new one. A folder that was written before a
setting existed says nothing of it. The value that stands for what the program did then is in a table: :data:`LATER` for
sections, :attr:`spafl.algorithms.Algorithm.later` for an algorithm's options. It is that value, not the default, which
may change again. A setting at this value is left out of a run's digest, so the digest is the one of before; a setting
that is in no table makes earlier checkpoints those of another configuration, which is refused and never mistaken.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["LATER", "completed", "reduced"]

LATER: dict[str, Any] = {"training.dtype": "float32"}
"""``section.key``, or ``section`` for a whole new table, and the value that means "as before"; oldest first. ``*``
stands for every key of a table whose keys are the user's (``system.classes.*.key``)."""


def completed(settings: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings with those that did not exist then, at the value that means "as before"."""
    whole = copy.deepcopy(dict(settings))
    for path, value in later.items():
        *above, key = path.split(".")
        for table in _tables(whole, above):
            table.setdefault(key, copy.deepcopy(value))
    return whole


def reduced(settings: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that came later and are as before."""
    rest = copy.deepcopy(dict(settings))
    for path, value in reversed(list(later.items())):  # what was added to an added table first
        *above, key = path.split(".")
        for table in _tables(rest, above):
            if key in table and table[key] == value:
                del table[key]
    return rest


def _tables(value: Any, path: list[str]) -> Iterator[dict[str, Any]]:
    if not isinstance(value, dict):
        return
    if not path:
        yield value
        return
    for name in list(value) if path[0] == "*" else path[:1]:
        if name in value:
            yield from _tables(value[name], path[1:])

"""Sweeps: an experiment whose rows are the combinations of some settings' values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .config import deep_merge, parse_assignment
from .errors import UserError
from .experiment import Experiment, Row, config_of


def parse_values(texts: Iterable[str]) -> dict[str, list[str]]:
    """``section.key=1,2,3`` each, as values by key.

    Raises:
        UserError: not that.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        listed = [value.strip() for value in values.split(",")]
        if not equals or not key.strip() or not all(listed):
            raise UserError(f"--vary takes section.key=value,value,...; got {text!r}")
        found[key.strip()] = listed
    return found


def swept(experiment: Experiment, values: Mapping[str, Sequence[Any]]) -> Experiment:
    """The experiment with a row for each method and combination of values, checked like any other.

    The first combination of the reference is the new reference.

    Args:
        values: by dotted key, as text or as TOML holds them.

    Raises:
        UserError: nothing varies, or a combination is not a valid configuration.
    """
    if not values:
        raise UserError(f"{experiment.name}: a sweep needs --vary section.key=value,value or a table [sweep]")
    rows = []
    for row in experiment.rows:
        for combination in itertools.product(*values.values()):
            chosen = [f"{key}={_text(value)}" for key, value in zip(values, combination, strict=True)]
            tables = row.tables
            for assignment in chosen:
                tables = deep_merge(tables, parse_assignment(assignment))
            new = Row(f"{row.label} {' '.join(chosen)}", tables, row.note)
            config_of(new, 1, f"{experiment.name}: {new.label}")
            rows.append(new)
    first = [row.label for row in rows if row.label.startswith(f"{experiment.reference} ")]
    reference = (first or [rows[0].label])[0]
    return replace(
        experiment, name=f"{experiment.name}-sweep", rows=tuple(rows), reference=reference, published={}, note=""
    )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

"""What clients take for what: confusion matrices of a round in which they were recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..client_results import results_path
from .run_data import ReportError, Run


def confusions(folder: Path, round: int, classes: int) -> dict[int, np.ndarray]:
    """Matrices int64 ``(classes, classes)`` of the clients that were tested in a round, rows are the true classes.

    Args:
        round: as recorded, from 0.

    Returns:
        By client; empty if they were not recorded.

    Raises:
        ReportError: a damaged file.
    """
    path = results_path(folder, round)
    found: dict[int, np.ndarray] = {}
    if not path.exists():
        return found
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(text)
            if record.get("confusion") is None:
                continue
            matrix = np.zeros((classes, classes), dtype=np.int64)
            for label, predicted, count in record["confusion"]:
                if not 0 <= label < classes or not 0 <= predicted < classes or type(count) is not int or count < 1:
                    raise ValueError(f"{[label, predicted, count]} is no count of a class and a predicted class")
                matrix[label, predicted] = count
            found[int(record["client"])] = matrix
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReportError(f"{path} line {number}: confusion is damaged: {error}") from None
    return found


def last_confusions(run: Run) -> dict[int, np.ndarray]:
    """Those of the last evaluated round of a run."""
    if run.evaluated is None:
        return {}
    return confusions(run.folder, run.evaluated.round, run.train.shape[1])


def confusion_rows(run: Run) -> Iterator[dict[str, Any]]:
    """A dict for each client, class and predicted class that occurred in the last evaluated round: ``round`` (from 1),
    ``client``, ``class``, ``predicted``, ``samples``; classes by their names where the run records them."""
    names = run.class_names or [str(k) for k in range(run.train.shape[1])]
    for client, matrix in last_confusions(run).items():
        for label, predicted in zip(*matrix.nonzero()):
            assert run.evaluated is not None
            yield {
                "round": run.evaluated.round + 1,
                "client": client,
                "class": names[label],
                "predicted": names[predicted],
                "samples": int(matrix[label, predicted]),
            }

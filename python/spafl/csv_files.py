"""Tables as files: CSV of rows that are dicts."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """A header of all keys in the order in which they first appear, and a line per row; None is an empty field."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write :func:`csv_text` whole or not at all; folders are made.

    Raises:
        WriteError: it cannot be written.
    """
    from .simulation.files import write_atomic, writing  # imports torch, which a report does without

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, csv_text(rows))

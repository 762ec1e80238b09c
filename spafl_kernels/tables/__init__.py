"""What was measured on GPUs, as data: one JSON file per device and subject, next to the module that reads it.

:mod:`~spafl_kernels.tables.choices`: how a layer runs. :mod:`~spafl_kernels.tables.tiles`: with which tile sizes.
:mod:`~spafl_kernels.tables.classes`: which layers share times.
The environment variable ``SPAFL_TABLES`` names another folder to read from.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

FOLDER = pathlib.Path(__file__).parent


def file_name(device: str, subject: str) -> str:
    """Name of a device's file: its name in lower case, other characters than letters and digits as dashes."""
    words = "".join(c if c.isalnum() else " " for c in device.lower()).split()
    return f"{'-'.join(words)}.{subject}.json"


def path_of(device: str, subject: str) -> pathlib.Path:
    """Where the file of a device is looked for."""
    return pathlib.Path(os.environ.get("SPAFL_TABLES") or FOLDER) / file_name(device, subject)


def read(path: pathlib.Path) -> Any:
    """Contents of a file.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None

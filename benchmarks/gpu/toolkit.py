"""Programs of the CUDA toolkit, and the kernels' tests, where a benchmark needs them."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys

TESTS = pathlib.Path(__file__).resolve().parents[2] / "tests" / "kernels" / "gpu"


def program(name: str) -> str | None:
    """Path of a program, from the path or from the toolkit; None if it is not there."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return shutil.which(name) or next(
        (found for home in homes if home and (found := shutil.which(name, path=f"{home}/bin"))), None
    )


def import_from_tests() -> None:
    """From now on ``support`` and the modules of tests can be imported, as pytest has them."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))

"""Every environment variable of the project, read in one place by one convention. Needs nothing but Python.

A switch is on for ``1``, ``true``, ``yes`` and ``on``, off for ``0``, ``false``, ``no``, ``off`` and nothing, in any
case; what has a third state says ``auto``. Anything else is an error that names the variable. ``setup.py`` reads the
variables of the build by the same functions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

# Variable, values (the first is the default), meaning. docs/settings.md has this table.
VARIABLES: tuple[tuple[str, str, str], ...] = (
    ("SPAFL_STRICT", "off, on", "a fallback is an error: of a layer on a GPU, and of the compact engine"),
    ("SPAFL_BACKEND", "auto, reference, triton, narrow", "what a layer alone runs; read at import"),
    (
        "SPAFL_NATIVE",
        "auto, on, off",
        "the compiled extension: if it is there; an error if not; left unloaded",
    ),
    ("SPAFL_CPU_ISA", "(the best), scalar, avx2, avx512", "instruction set of the CPU kernels"),
    ("SPAFL_TABLES", "(the package's), a folder", "where tables of measured times are read"),
    ("SPAFL_DATA", "(none), a folder", "where the simulator looks for data sets"),
    ("SPAFL_BUILD_CPP", "auto, on, off", "building: the C++ extension"),
    ("SPAFL_BUILD_CUDA", "auto, on, off", "building: its CUDA kernels"),
    ("SPAFL_CUDA_ARCHS", "90a;90+PTX, a list", "building: compute capabilities"),
    ("SPAFL_SLOW_TESTS", "off, on", "testing: the slow tests too"),
)


def _refuse(name: str, allowed: str, value: str) -> ValueError:
    return ValueError(f"{name} must be {allowed}; got {value!r}")


def switch(name: str) -> bool:
    """A variable that is on or off.

    Raises:
        ValueError: it is neither.
    """
    value = os.environ.get(name, "")
    if value.lower() in ON:
        return True
    if value.lower() in ("", *OFF):
        return False
    raise _refuse(name, f"on ({', '.join(ON)}) or off ({', '.join(OFF)})", value)


def switch_or_auto(name: str) -> bool | None:
    """A variable that is on, off or ``auto``, which is None and the default.

    Raises:
        ValueError: it is none of these.
    """
    value = os.environ.get(name, "")
    if value.lower() in ("", "auto"):
        return None
    if value.lower() in (*ON, *OFF):
        return value.lower() in ON
    raise _refuse(name, f"auto, on ({', '.join(ON)}) or off ({', '.join(OFF)})", value)


def one_of(name: str, values: Sequence[str]) -> str:
    """A variable with these values, the first of which is the default.

    Raises:
        ValueError: it is none of these.
    """
    value = os.environ.get(name) or values[0]
    if value not in values:
        raise _refuse(name, f"one of {', '.join(values)}", value)
    return value


def text(name: str) -> str | None:
    """A variable of any value; None where it is not set or empty."""
    return os.environ.get(name) or None


def strict() -> bool:
    """``SPAFL_STRICT``: whether what cannot be run as asked is an error rather than run otherwise."""
    return switch("SPAFL_STRICT")

"""Tables of measured times, from which ``auto`` picks how a layer runs on a GPU.

A table belongs to one device. It is written by ``python -m benchmarks.gpu --tables`` from measured rows:

.. code-block:: json

    {"format": 1, "device": "NVIDIA H200", "made": {"commit": "...", "torch": "...", "triton": "...", "time": "..."},
     "entries": {"conv3x3/1 in64 out64 positions131072": {"bf16": {"graph": {"0.5": "triton", "1": "reference"}}}}}

``entries`` maps a shape class, a dtype (``bf16``, ``fp16``, ``tf32``, ``fp32``) and a way to run (``eager``; ``graph``,
which compiled code counts as) to the choice at densities up to the one named: ``triton``, the packed kernels;
``narrow``, dense operators on the active filters, eager only; or ``reference``, the masked dense operator. A choice
other than ``reference`` is written only where it was measured to be faster than the masked dense operator beyond the
spread of both, on every layer of the class.

The rule of a look-up, and the reason it gives:

1. no table for the device: that of :data:`INSTEAD`; if the folder lacks it too, the packed kernels, "not measured on
   this device";
2. the class or dtype is not in the table: the masked dense operator, for no margin was measured;
3. otherwise the choice at the smallest measured density that is not below the layer's; a density above all measured
   ones counts as not measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from . import Shelf

Choice = Literal["triton", "narrow", "reference"]
# How a choice is called in a reason.
WORDS = {"triton": "the packed kernels", "narrow": "dense operators on the active filters"}
Way = Literal["eager", "graph"]
DTYPES = ("bf16", "fp16", "tf32", "fp32")


@dataclasses.dataclass(frozen=True)
class Table:
    """The choices of one device; see the module for the format."""

    device: str
    made: Mapping[str, str]
    entries: Mapping[str, Mapping[str, Mapping[str, Mapping[float, Choice]]]]

    def look_up(self, shape: str, dtype: str, way: Way, density: float) -> tuple[Choice, str]:
        """The choice, and the reason in words; see the rule in the module."""
        row = self.entries.get(shape, {}).get(dtype, {}).get(way)
        if not row:
            return "reference", f"{shape} in {dtype}, {way}, is not in the table of {self.device}: dense is kept"
        at = min((d for d in row if d >= density - 1e-9), default=None)
        if at is None:
            return "reference", f"{shape} was measured up to density {max(row):g}, this layer has {density:.3g}"
        where = f"at density {at:g} for {shape} in {dtype}, {way}, on {self.device}"
        said = f"{WORDS[row[at]]} were" if row[at] in WORDS else "nothing was"
        commit = self.made.get("commit", "unknown")
        return row[at], f"{said} measured to be faster than masked dense {where} (commit {commit})"

    def to_json(self) -> dict[str, Any]:
        """Entries as a file has them."""
        return {
            shape: {
                dtype: {way: {f"{d:g}": c for d, c in sorted(row.items())} for way, row in sorted(ways.items())}
                for dtype, ways in sorted(dtypes.items())
            }
            for shape, dtypes in sorted(self.entries.items())
        }


def _allowed(way: str) -> tuple[str, ...]:
    """Choices that a way to run may have: a graph cannot wait for a count."""
    return tuple(choice for choice in get_args(Choice) if way == "eager" or choice != "narrow")


def _parse(device: str, made: dict[str, str], found: dict[str, Any]) -> Table:
    entries: dict[str, dict[str, dict[str, dict[float, Choice]]]] = {}
    for shape, dtypes in found.items():
        for dtype, ways in dtypes.items():
            if dtype not in DTYPES:
                raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
            for way, row in ways.items():
                if way not in get_args(Way):
                    raise ValueError(f"a way to run must be one of {', '.join(get_args(Way))}; got {way!r}")
                for density, choice in row.items():
                    if choice not in _allowed(way):
                        raise ValueError(f"a choice must be one of {', '.join(_allowed(way))}; got {choice!r}")
                    if not 0 < float(density) <= 1:
                        raise ValueError(f"a density must be in (0, 1]; got {density}")
                    places = entries.setdefault(shape, {}).setdefault(dtype, {}).setdefault(way, {})
                    places[float(density)] = cast(Choice, choice)
    return Table(device, made, entries)


# The device with the most complete table. The kernels lose to cuDNN on wide layers by more than two devices differ, so
# that a neighbour's choices are the better guess.
INSTEAD = "NVIDIA H200"

SHELF = Shelf("choices", "a table of measured choices", 1, _parse, INSTEAD)

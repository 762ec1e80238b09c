"""Measured speeds of simulations on a GPU and on the CPU beside it, by which ``simulation.device = "auto"`` chooses.

A file belongs to one GPU. Its speeds are SGD steps per second of a simulation as ``engine = "auto"`` runs it there,
clients' turns included; ``made`` tells commit, versions and the CPU:

.. code-block:: json

    {"format": 1, "device": "NVIDIA H200", "made": {"commit": "...", "torch": "...", "cpu": "...", "time": "..."},
     "entries": {"lenet5": {"64": {"1": {"gpu": 300.0, "cpu": 110.0}, "0.5": {"gpu": 310.0, "cpu": 240.0}}}}}

``entries`` maps a model's name, a batch size and a density to ``gpu``, one worker process on the GPU, and ``cpu``, one
worker process of one thread. Nothing stands in for a device that has no file: a simulation takes the CPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from . import Shelf


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Steps per second of one worker process."""

    gpu: float
    cpu: float


@dataclasses.dataclass(frozen=True)
class Table:
    """The speeds of one device; see the module for the format."""

    device: str
    made: Mapping[str, str]
    entries: Mapping[str, Mapping[int, Mapping[float, Speeds]]]

    def gpu_is_faster(self, model: str, batch: int, workers: int) -> tuple[bool, str]:
        """Whether a run is faster on the GPU, and the reason in words.

        The largest measured batch counts that is not larger than the run's, because a GPU gains with the batch. The GPU
        has to be faster at every density that was measured: masks change in a run.

        Args:
            model: its name.
            batch: the training's batch size.
            workers: processes that the run would have on the CPU; their speeds are taken to add up.
        """
        origin = f"({self.device}, commit {self.made.get('commit', 'unknown')})"
        measured = self.entries.get(model, {})
        at = max((size for size in measured if size <= batch), default=None)
        if at is None:
            return False, f"no speed of {model} was measured at batch {batch} or below {origin}"
        density, speeds = min(measured[at].items(), key=lambda item: item[1].gpu / item[1].cpu)
        cpu = speeds.cpu * workers
        faster = speeds.gpu > cpu
        said = "faster" if faster else "not faster"
        return faster, (
            f"{model} at batch {at} and density {density:g} was measured to be {said} on the GPU: {speeds.gpu:.4g} "
            f"steps/s, and {cpu:.4g} of {workers} CPU worker{'s' if workers > 1 else ''} {origin}"
        )

    def to_json(self) -> dict[str, Any]:
        """Entries as a file has them."""
        return {
            model: {
                str(batch): {f"{d:g}": dataclasses.asdict(speeds) for d, speeds in sorted(row.items())}
                for batch, row in sorted(batches.items())
            }
            for model, batches in sorted(self.entries.items())
        }


def _number(text: str, what: str, allowed: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{what} must be {allowed}; got {text!r}") from None


def _speeds(data: Any) -> Speeds:
    if not isinstance(data, dict) or set(data) != {"gpu", "cpu"}:
        raise ValueError(f"speeds need gpu and cpu; got {data!r}")
    for name, value in data.items():
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be steps per second, a number > 0; got {value!r}")
    return Speeds(float(data["gpu"]), float(data["cpu"]))


def _parse(device: str, made: dict[str, str], found: dict[str, Any]) -> Table:
    entries: dict[str, dict[int, dict[float, Speeds]]] = {}
    for model, batches in found.items():
        for batch, row in batches.items():
            size = _number(batch, "a batch size", "an integer >= 1", int)
            if size < 1:
                raise ValueError(f"a batch size must be an integer >= 1; got {batch!r}")
            if not row:
                raise ValueError(f"{model}, batch {batch}: no density was measured")
            for density, speeds in row.items():
                share = _number(density, "a density", "in (0, 1]", float)
                if not 0 < share <= 1:
                    raise ValueError(f"a density must be in (0, 1]; got {density}")
                entries.setdefault(model, {}).setdefault(size, {})[share] = _speeds(speeds)
    return Table(device, made, entries)


SHELF = Shelf("engines", "a table of measured speeds", 1, _parse)

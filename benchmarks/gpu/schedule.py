"""What is measured, the most telling cells first, so that a run that is stopped early has what matters."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

from spafl_kernels.gpu.tables.tiles import Operation

from . import layers, steps, tiles
from .clock import Device, tf32
from .results import Recorder, Row
from .roofline import Machine
from .shapes import MODEL_NAMES, Layer, layers_of

BOTH, GRAPH, EAGER = (True, False), (True,), (False,)
MAIN, ALL = (1.0, 0.5, 0.25, 0.1), (1.0, 0.75, 0.5, 0.25, 0.1)
OPERATIONS, WHOLE, EVERY = ("forward", "dgrad", "wgrad"), ("whole", "module"), layers.MODES


@dataclasses.dataclass(frozen=True)
class Pass:
    """Cells that belong together. ``batch`` 0 is the published one; ``seconds`` is the most the pass may take."""

    kind: Literal["layer", "step", "cohort", "tile"]
    models: tuple[str, ...]
    batch: int
    dtype: str
    densities: tuple[float, ...] = MAIN
    modes: tuple[str, ...] = WHOLE
    graphs: tuple[bool, ...] = GRAPH
    seconds: float = 60.0

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Those of the modes that are single products."""
        return tuple(o for o in get_args(Operation) if o in self.modes)


OURS, IMAGENET = MODEL_NAMES, ("resnet50",)
SCHEDULE = (
    Pass("cohort", ("lenet5", "conv4"), 0, "tf32", graphs=BOTH, seconds=50),
    Pass("layer", OURS, 128, "bf16"),
    Pass("step", OURS, 128, "tf32", (1.0, 0.5, 0.25), graphs=BOTH, seconds=50),
    Pass("layer", IMAGENET, 64, "bf16"),
    Pass("layer", OURS, 128, "tf32"),
    Pass("layer", OURS, 128, "bf16", ALL, graphs=EAGER),
    Pass("layer", OURS, 128, "bf16", MAIN, OPERATIONS),
    Pass("layer", IMAGENET, 64, "bf16", ALL, graphs=EAGER),
    Pass("layer", IMAGENET, 64, "bf16", MAIN, OPERATIONS),
    Pass("layer", OURS, 16, "bf16", ALL, graphs=BOTH),
    Pass("step", OURS, 0, "tf32", (1.0, 0.5, 0.25), graphs=BOTH, seconds=40),
    Pass("layer", OURS, 128, "bf16", (1.0, 0.75), EVERY),
    Pass("layer", IMAGENET, 64, "bf16", (1.0, 0.75), EVERY),
    Pass("layer", OURS, 128, "tf32", ALL, EVERY, BOTH),
    Pass("layer", OURS, 128, "bf16", ALL, OPERATIONS, EAGER),
    Pass("layer", OURS, 16, "bf16", ALL, OPERATIONS, BOTH),
    Pass("layer", IMAGENET, 64, "bf16", ALL, OPERATIONS, EAGER),
)
# Whose speed-ups are said while a run goes on.
SHOWN = ("ours", "compact-fixed", "cohort", "cohort-torch", "compact-graph", "compact-streams")
# Measured before the rest, whose times depend on it.
TUNING = (
    Pass("tile", OURS, 128, "bf16", (0.5, 0.25), OPERATIONS, seconds=120),
    Pass("tile", OURS, 128, "tf32", (0.5, 0.25), OPERATIONS, seconds=120),
    Pass("tile", IMAGENET, 64, "bf16", (0.5, 0.25), OPERATIONS, seconds=120),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One layer of a pass, or one model of it."""

    part: Pass
    model: str
    layer: Layer | None
    batch: int

    @property
    def label(self) -> str:
        what = f"{self.layer.name} {self.layer.shape}" if self.layer else self.part.kind
        return f"{self.model} {what} batch {self.batch} {self.part.dtype}"

    @property
    def kernels(self) -> tuple[object, ...]:
        """What decides which kernels have to be compiled."""
        return (self.part.kind, self.model, self.layer, self.batch, self.part.dtype)

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """In which products of float32 are what the pass calls them; others do not change."""
        return tf32(self.part.dtype != "fp32")

    def rows(self, device: Device, machine: Machine | None, kernels: Any = None) -> Iterator[Row]:
        p = self.part
        if self.layer is not None and p.kind == "tile":
            return tiles.tile_rows(device, self.layer, self.batch, p.dtype, p.densities, p.operations, kernels)
        if self.layer is not None:
            return layers.layer_rows(
                device, machine, self.layer, self.batch, p.dtype, p.densities, p.modes, p.graphs, kernels
            )
        if p.kind == "step":
            return steps.model_rows(device, self.model, self.batch, p.dtype, p.densities, p.graphs)
        return steps.cohort_rows(device, self.model, steps.CLIENTS, self.batch, p.dtype, p.densities, p.graphs)

    def warm(self, device: Device) -> None:
        """Run every kernel of the job once."""
        if self.layer is not None and self.part.kind == "tile":
            tiles.warm(self.layer, self.batch, self.part.dtype, self.part.operations, device.where)
        elif self.layer is not None:
            layers.Case(self.layer, self.batch, self.part.dtype, 0.5, device.where).ours("whole")
        else:
            steps.warm(self.part.kind, self.model, self.batch, device.where)
        device.settle()


def jobs(schedule: Sequence[Pass], models: Sequence[str] | None = None) -> list[Job]:
    """All jobs in order; of some models only, if named."""
    found: list[Job] = []
    for part in schedule:
        for model in part.models:
            if models is not None and model not in models:
                continue
            batch = part.batch or steps.SETTINGS[model].batch
            if part.kind in ("layer", "tile"):
                found += [Job(part, model, layer, batch) for layer in layers_of(model)]
            else:
                found.append(Job(part, model, None, batch))
    return found


@dataclasses.dataclass
class Outcome:
    """How a run went: rows written, jobs with a red gate or an error, jobs that no time was left for."""

    rows: int = 0
    red: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)


def run(
    work: Sequence[Job],
    device: Device,
    machine: Machine | None,
    recorder: Recorder,
    seconds: float,
    kernels: Any = None,
    now: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Measure jobs in order until the time is over; every row is on disk as soon as it is there.

    A job is not begun after ``seconds``, nor after its pass has had its own; one that runs is given up at its next row
    once ``seconds`` are over by a tenth.
    """
    outcome, began, spent = Outcome(), now(), dict[Pass, float]()
    for job in work:
        start = now()
        if start - began >= seconds or spent.get(job.part, 0.0) >= job.part.seconds:
            outcome.left_out.append(job.label)
            continue
        shown, bad = [], False
        try:
            with job.arithmetic():
                for row in job.rows(device, machine, kernels):
                    recorder.add([row])
                    outcome.rows += 1
                    bad = bad or bool(row.get("error")) or str(row["gate"]).startswith("fail")
                    if row["provider"] in SHOWN and row["mode"] in ("whole", "step"):
                        way = "graph" if row["graph"] else "eager"
                        name = "" if row["provider"] == "ours" else f"{row['provider']} "
                        shown.append(f"{name}{row['density']}:{row.get('speedup_vs_dense', '-')} ({way})")
                    if now() - began > 1.1 * seconds:
                        outcome.left_out.append(f"{job.label} (the rest of it)")
                        break
        except Exception as error:
            bad = True
            print(f"{job.label}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if bad:
            outcome.red.append(job.label)
        spent[job.part] = spent.get(job.part, 0.0) + now() - start
        say(f"{now() - began:4.0f} s  {job.label}  {' '.join(shown)}{'  RED' if bad else ''}")
    return outcome

"""The device that the stages of a visit measure, and what they need to know of it."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from spafl_kernels.gpu import closed_form
from spafl_kernels.gpu.geometry import Geometry
from spafl_kernels.gpu.packing import Selection

from .. import results, roofline
from ..clock import Call, Cuda, Device
from .folder import Folder, Rows


class Pretended:
    """This machine's CPU in place of a GPU, for a rehearsal: everything runs, kernels in Triton's interpreter."""

    where, name = "cpu", "rehearsal on a CPU"

    def settle(self) -> None:
        pass

    def times(self, call: Call, graph: bool) -> list[float]:
        found = []
        for _ in range(2):
            began = time.perf_counter()
            call()
            found.append(1e6 * (time.perf_counter() - began))
        return found


class Closed:
    """The launchers of the kernels in plain PyTorch, for the layers of a rehearsal."""

    def select_layer(self, weight: Tensor, threshold: Tensor, estimator: Any) -> tuple[Selection, Tensor, None]:
        self.weight = weight
        data, packed = closed_form.selection_and_packed(weight, threshold, estimator, weight.dtype)
        return Selection(data, weight.shape[1]), packed, None

    def layer_forward(self, x: Tensor, packed: Tensor, selection: Selection, bias: None, g: Geometry, tf32: bool,
                      tile: object = None) -> Tensor:  # fmt: skip
        return closed_form.forward(x, self.weight, selection, bias, False, g)

    def layer_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, packed: Tensor, selection: Selection, bias: None, g: Geometry,
        tf32: bool, need_input: bool, need_weight: bool, tile: object = None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        dx, dw, dtau, _ = closed_form.backward(grad, x, weight, selection, bias, False, g)
        return dx if need_input else None, *((dw, dtau) if need_weight else (None, None)), None


@dataclasses.dataclass
class Visit:
    """What a stage gets.

    Attributes:
        stage: its name.
        folder: where rows go.
        seconds: how long the stage may take; it is killed soon after.
        rehearsal: no GPU; small cases, to see that everything runs.
    """

    stage: str
    folder: Folder
    seconds: float
    rehearsal: bool
    began: float = dataclasses.field(default_factory=time.monotonic)
    red: list[str] = dataclasses.field(default_factory=list)

    def left(self) -> float:
        """Seconds before the stage should end, with some to spare for its end."""
        return self.began + 0.92 * self.seconds - time.monotonic()

    def add(self, kind: str, **facts: Any) -> None:
        """A line of the report, at once on disk; printed too."""
        self.folder.add(self.stage, kind, **facts)
        print(kind, *(f"{k}={_short(v)}" for k, v in facts.items()), flush=True)

    def wrong(self, what: str) -> None:
        """Something is not as it should be; the stage goes on, and ends red."""
        self.red.append(what)
        self.folder.add(self.stage, "red", what=what)
        print(f"RED: {what}", flush=True)

    def device(self) -> Device:
        """What is measured on."""
        return Pretended() if self.rehearsal else Cuda(repeats=5, slice_ms=1.5)

    def rows(self, device: Device) -> tuple[Rows, roofline.Machine | None]:
        """Where benchmark rows of the device go, and its floors."""
        machine = roofline.machine(device.name)
        source = machine.source if machine else "unknown device: no floors"
        return Rows(self.folder, self.stage, results.environment(device.name, source)), machine


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def ready(rehearsal: bool) -> None:
    """Make this process fit for a stage.

    Raises:
        SystemExit: there is no GPU and this is no rehearsal.
    """
    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // 2)))
    if not rehearsal and not torch.cuda.is_available():
        raise SystemExit("error: the report measures a CUDA GPU and this machine has none (--rehearse works)")


def median_us(device: Device, call: Call, graph: bool = False) -> float:
    """Microseconds of a call."""
    return statistics.median(device.times(call, graph))

"""What a visit to a GPU does, in this order: first what makes everything else worthless if it is wrong.

A stage is a module with ``run(visit)`` that gets a process of its own. Its seconds are the most it may take.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of a visit.

    Attributes:
        name: how ``--stages`` calls it.
        seconds: the most it may take.
        about: what it tells, in words.
        module: of this package, with a function ``run(visit, *arguments)``.
        arguments: handed to it.
        only_if_red: it runs only where this other stage failed.
        environment: variables of its process.
        interpreted: in a rehearsal its kernels run, in Triton's interpreter.
    """

    name: str
    seconds: float
    about: str
    module: str
    arguments: tuple[Any, ...] = ()
    only_if_red: str | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    interpreted: bool = False

    def load(self) -> Callable[..., None]:
        return importlib.import_module(f"{__package__}.{self.module}").run


STAGES = (
    Stage("environment", 60, "what is installed, the extension, ceilings, the host's cost of a launch", "environment"),
    Stage(
        "compile", 90, "kernels that no cache holds, on all cores", "compile",
        ("values", "steps-lenet5", "cohort-lenet5", "steps-conv4", "cohort-conv4", "steps-conv4-128",
         "steps-resnet18-128", "layers"),
        interpreted=True,
    ),
    Stage("values", 60, "every kernel against the definition, and the same bits in every run", "values",
          interpreted=True),
    Stage(
        "values-ptxas", 60, "red values once more with the CUDA toolkit's own assembler", "values",
        only_if_red="values", environment={"SPAFL_TOOLKIT_PTXAS": "1"},
    ),
    Stage("steps-lenet5", 45, "steps of LeNet-5, batch 64", "timing", ("step", "lenet5", 0)),
    Stage("cohort-lenet5", 30, "a cohort of ten clients, LeNet-5, batch 64", "timing", ("cohort", "lenet5", 0)),
    Stage("steps-conv4", 45, "steps of Conv4, batch 16", "timing", ("step", "conv4", 0)),
    Stage("cohort-conv4", 30, "a cohort of ten clients, Conv4, batch 16", "timing", ("cohort", "conv4", 0)),
    Stage("steps-conv4-128", 45, "steps of Conv4, batch 128", "timing", ("step", "conv4", 128)),
    Stage("steps-resnet18-128", 60, "steps of ResNet-18, batch 128", "timing", ("step", "resnet18-full", 128)),
    Stage("layers", 75, "eight layers, product by product, against cuDNN", "timing", ("layers",)),
    Stage("choices", 90, "layers as a user calls them, for a table of choices", "timing", ("choices",)),
    Stage("kernels", 90, "steps and layers, kernel by kernel; steps in bfloat16", "kernels"),
    Stage("tests", 120, "the tests that need a GPU, in parallel", "tests"),
    Stage("simulator", 120, "federated runs on the device and on the CPU", "simulator"),
    Stage("speeds", 120, "steps per second of simulations, here and on the CPU, for a table of engines", "speeds"),
    Stage("tune", 120, "tile sizes for Conv4 and ResNet-18", "timing", ("tune",)),
    Stage("memcheck", 60, "compute-sanitizer looks for accesses outside of tensors", "sanitizer", ("memcheck",)),
    Stage("racecheck", 60, "the same for races, as information", "sanitizer", ("racecheck",)),
)  # fmt: skip
NAMES = tuple(stage.name for stage in STAGES)


def command(name: str, arguments: list[str]) -> list[str]:
    """The command of a stage's process."""
    return [sys.executable, "-X", "faulthandler", "-m", f"{__package__}", "--stage", name, *arguments]

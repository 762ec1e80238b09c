"""The code whose kernels are compiled ahead, by name: what a visit to a GPU runs."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

import torch

from spafl_kernels.ops import backend

from .. import schedule, steps
from ..clock import tf32
from .pretend import Cpu

Work = Callable[[Cpu], None]
TESTS = pathlib.Path(__file__).resolve().parents[3] / "tests" / "kernels" / "triton"


def _tests(name: str) -> ModuleType:
    """A module of the kernels' tests, which pytest imports from their folder."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    path = TESTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(_: Cpu) -> None:
    """Forward and backward of every shape, number type and density of the tests on a device."""
    tests = _tests("test_gpu")
    from support import cases  # type: ignore[import-not-found]

    for dtype, allowed, _bound in tests.KINDS.values():
        with tf32(allowed):
            for out, geometry, n in tests.SHAPES.values():
                for seed, count in enumerate(cases.counts(out)):
                    case = cases.make(out, geometry, n, count, 2, dtype, seed)
                    tests.run(case, ("identity", "window")[seed % 3 == 1], bool(seed % 2))


def step(kind: str, model: str, batch: int, device: Cpu) -> None:
    """A training step of a model, or of a cohort of clients."""
    with tf32(True):
        steps.warm(kind, model, batch, device.where)


def jobs(parts: Iterable[schedule.Pass], models: Iterable[str] | None, device: Cpu) -> None:
    """What the benchmark runs to compile the kernels of its passes."""
    with tf32(True):
        for job in schedule.jobs(list(parts), None if models is None else list(models)):
            job.warm(device)


def smoke(device: Cpu) -> None:
    """What runs under compute-sanitizer."""
    module = _tests("support/smoke")
    with backend.requesting("triton"), torch.no_grad():
        for run in (module.layers, module.model_pass):
            run(device.where)


STEPS = (
    ("step", "lenet5", 64), ("cohort", "lenet5", 64), ("step", "conv4", 16), ("cohort", "conv4", 16),
    ("step", "conv4", 128), ("step", "resnet18-full", 128),
)  # fmt: skip
LAYERS = (schedule.Pass("layer", schedule.OURS, 128, "bf16"),)
WORK: dict[str, Work] = {
    "values": values,
    **{f"{kind}-{model}-{batch}": functools.partial(step, kind, model, batch) for kind, model, batch in STEPS},
    "layers": functools.partial(jobs, LAYERS, None),
    "tuning-conv4": functools.partial(jobs, schedule.TUNING, ("conv4",)),
    "tuning-resnet18": functools.partial(jobs, schedule.TUNING, ("resnet18-full",)),
}

"""The code whose kernels are compiled ahead, by name: what a visit to a GPU runs.

A piece of work is called with the device that it would be called with there, :class:`pretend.Cpu` in its place.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import pathlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from .. import layers
from ..clock import tf32
from ..report import timing
from ..report.environment import layer_calls
from ..report.stages import STAGES
from ..shapes import layers_of
from ..toolkit import TESTS, import_from_tests
from .pretend import Cpu, cuda_calls

Work = Callable[[Cpu], None]


def _from_tests(name: str) -> ModuleType:
    """A module of the kernels' tests, which pytest imports from their folder."""
    import_from_tests()
    spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, TESTS / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(_: Cpu) -> None:
    """Forward and backward of every shape, arithmetic and density of the tests, as operators and as launchers."""
    tests = _from_tests("test_gpu.py")
    from support import cases  # type: ignore[import-not-found]

    for dtype, allowed, _bound in tests.KINDS.values():
        for out, geometry, n in tests.SHAPES.values():
            for seed, count in enumerate(cases.counts(out)):
                case = cases.make(out, geometry, n, count, 2, dtype, seed)
                estimator, mask_bias = ("identity", "window")[seed % 3 == 1], bool(seed % 2)
                with tf32(allowed):
                    tests.run(case, estimator, mask_bias)
                    cases.run(case, estimator, True, mask_bias, allowed)


class _Endings:
    """A plugin of pytest: why tests ended that did not end by comparing what no kernel has computed."""

    def __init__(self) -> None:
        self.ran, self.early = 0, list[str]()

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.when == "call":
            self.ran += 1
        if call.excinfo is not None and (not call.excinfo.errisinstance(AssertionError) or "CUDA" in str(call.excinfo)):
            self.early.append(f"{item.name}: {call.excinfo.exconly()[:150]}")


def tests(_: Cpu) -> None:
    """The tests that need a GPU, each up to the first comparison of values; but for those that :func:`values` stands
    for, and those of ``torch.compile``, which does not trace what stands for the device here.

    Raises:
        RuntimeError: no test ran.
    """
    import pytest

    endings = _Endings()
    command = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", "not compiled and not values"]
    with cuda_calls(), contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*command, str(TESTS / "test_gpu.py")], plugins=[endings])
    if not endings.ran:
        raise RuntimeError("no test ran: nothing is known of their kernels")
    for line in endings.early:
        print(f"  ended early, kernels may be missing: {line}")


def smoke(_: Cpu) -> None:
    """What runs under compute-sanitizer, but for the planted fault."""
    module = _from_tests(os.path.join("support", "smoke.py"))
    finite = mock.patch.object(torch.Tensor, "isfinite", lambda x: torch.ones_like(x, dtype=torch.bool))
    with cuda_calls(), finite:
        module.layers("cuda")
        with contextlib.suppress(AssertionError):  # of counts that no kernel has written
            module.model_pass("cuda")


def timed(arguments: tuple[Any, ...], device: Cpu) -> None:
    """What a stage of the report times, but for layers, whose modes launch kernels of their own."""
    with tf32(True):
        for job in timing.jobs(*arguments):
            job.warm(device)


def some_layers(wanted: Iterable[tuple[str, str]], dtypes: Iterable[str], batch: int, device: Cpu) -> None:
    """Layers by model and name: every mode of the benchmark's own kernels, and the layer as a user calls it."""
    for model, name in wanted:
        (layer,) = (layer for layer in layers_of(model) if layer.name == name)
        for dtype in dtypes:
            case = layers.Case(layer, batch, dtype, 0.5, device.where)
            with tf32(True):
                for mode in ("whole", "forward", "dgrad", "wgrad"):
                    case.ours(mode)
                case.module("ours")


def choices(device: Cpu) -> None:
    """Layers as a user calls them."""
    for job in timing.jobs("choices"):
        assert job.layer is not None
        with job.arithmetic():
            layers.Case(job.layer, job.batch, job.part.dtype, 0.5, device.where).module("ours")


def environment(device: Cpu) -> None:
    """The small layers whose calls are timed on the host."""
    with cuda_calls():
        for _, both, forward in layer_calls(device.where):
            both()
            forward()


TIMED = {
    s.name: functools.partial(timed, s.arguments)
    for s in STAGES
    if s.module == "timing" and s.name not in ("layers", "choices")
}
WORK: dict[str, Work] = {
    "environment": environment,
    "values": values,
    "layers": functools.partial(some_layers, timing.LAYERS, ("bf16", "tf32"), 128),
    "choices": choices,
    **TIMED,
    "tests": tests,
    "smoke": smoke,
}

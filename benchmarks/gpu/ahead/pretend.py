"""A CPU that launching code takes for a GPU: host code, operators and autograd run unchanged, kernels do not run.

Tensors are real and on the CPU, so sizes, strides and alignment are what they are; what a kernel would have written is
whatever was in memory. The library's operators run their CUDA implementations. Give ``"cpu"`` where a device is asked
for, or open :func:`cuda_calls` too. Needs a process without ``TRITON_INTERPRET``; not safe between threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from .spec import HOPPER


class NoDevice:
    """What ``triton.runtime.driver`` asks of a driver, answered for a target without hardware."""

    _ids: ClassVar[dict[GPUTarget, int]] = {}

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self._id = self._ids.setdefault(target, len(self._ids))  # kernel caches are per device: one id per target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._id

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        def run_once(fn: Any, quantiles: Any = None, **_: Any) -> list[float]:
            fn()
            return [0.0, 0.0, 0.0]

        return run_once

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: Any) -> None:
        pass

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "int"


@contextlib.contextmanager
def driver(target: GPUTarget) -> Iterator[None]:
    """Triton's driver is :class:`NoDevice` for ``target`` while the context is open."""
    active, previous = triton.runtime.driver, getattr(triton.runtime.driver, "_active", None)
    active.set_active(NoDevice(target))  # type: ignore[arg-type]
    try:
        yield
    finally:
        active._active = previous


class _CudaImplementations(TorchDispatchMode):
    """Operators of the library run what they have for CUDA tensors."""

    CUDA = torch._C.DispatchKey.CUDA

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "spafl" and func.has_kernel_for_dispatch_key(self.CUDA):
            return func.redispatch(torch._C.DispatchKeySet(self.CUDA), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Cpu:
    """In the place of :class:`benchmarks.gpu.clock.Cuda`: calls run once and take no time."""

    where, name = "cpu", "no GPU"

    def times(self, call: Any, graph: bool) -> list[float]:
        call()
        return [1.0] * 5

    def settle(self) -> None:
        pass


@contextlib.contextmanager
def gpu(target: GPUTarget = HOPPER) -> Iterator[Cpu]:
    """Launches compile, or load from Triton's cache, and do not run; yields the device to hand to the code.

    Raises:
        RuntimeError: Triton's interpreter is in use.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and never compiled")

    run = JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool = False, **named: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **named)

    with driver(target), _CudaImplementations():
        JITFunction.run = launch
        torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[misc,assignment]
        try:
            yield Cpu()
        finally:
            JITFunction.run = run
            del torch.Tensor.is_cuda


class _Here(TorchFunctionMode):
    """Where PyTorch is told "cuda", it takes the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def here(value: Any) -> Any:
            return "cpu" if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value

        return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


# What the library and its tests call of torch.cuda, and what they are told.
_ANSWERS: dict[str, Any] = {
    "is_available": True,
    "is_current_stream_capturing": False,
    "get_device_capability": (9, 0),
    "get_device_name": Cpu.name,
}
_WITHOUT_EFFECT = (
    "CUDAGraph", "Stream", "current_stream", "graph", "set_sync_debug_mode", "stream", "synchronize",
)  # fmt: skip


@contextlib.contextmanager
def cuda_calls() -> Iterator[None]:
    """For code that asks for CUDA by name: ``"cuda"`` is the CPU, and streams and graphs have no effect."""
    cuda, autocast = torch.cuda, torch.autocast
    with contextlib.ExitStack() as patches:
        for name in _WITHOUT_EFFECT:
            patches.enter_context(mock.patch.object(cuda, name, mock.MagicMock()))
        for name, answer in _ANSWERS.items():
            patches.enter_context(mock.patch.object(cuda, name, mock.Mock(return_value=answer)))
        for kind in (torch.Tensor, torch.nn.Module):
            patches.enter_context(mock.patch.object(kind, "cuda", lambda self, *_, **__: self))
        patches.enter_context(mock.patch.object(torch, "autocast", lambda _, **named: autocast("cpu", **named)))
        patches.enter_context(_Here())
        yield

"""A CPU that launching code takes for a GPU: host code, operators and autograd run unchanged, kernels do not run.

Tensors are real and on the CPU, so sizes, strides and alignment are what they are; what a kernel would have written is
whatever was in memory. The library's operators run their CUDA implementations. Give ``"cpu"`` where a device is asked
for. Needs a process without ``TRITON_INTERPRET``; not safe between threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import triton
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

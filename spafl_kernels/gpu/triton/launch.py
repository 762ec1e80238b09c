"""Launches of which only the addresses change: what Triton found out about the others once is remembered.

``kernel[grid](...)`` binds arguments, reads their dtypes, values and alignment, makes a key of them as text and looks
up the compiled kernel, in 30 to 50 microseconds of Python a launch. A :class:`Launch` is made for given sizes: its
grid, integers and constants are fixed, and so are the dtypes of its tensors. Of what Triton compiles for, only whether
an address is a multiple of 16 is left; by that, it remembers the compiled kernel that Triton itself took, and calls
the kernel's C launcher.

That uses parts of Triton which are not its interface; :func:`why_not` says whether they are as expected here. Where
they are not, and in the interpreter, with another driver than Triton's own for NVIDIA GPUs, or with hooks on launches
(profilers), every launch is a plain one.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..geometry import Memory

ALIGNMENT = 16  # bytes; Triton compiles for addresses and sizes that are multiples of it
# What a C launcher of Triton's NVIDIA driver takes before the kernel's arguments: grid, stream, function, cooperative,
# programmatic dependence, two scratch memories, metadata of kernel and launch, two hooks.
_EXPECTED = "iiiKKppOOOOOO"
_address = Tensor.data_ptr
# Bytes of which scratch memories begin at a multiple, as tensors of their own would.
LINE = 512
Known = tuple[Callable[..., None], tuple[int, ...], tuple[Any, ...], tuple[Any, ...]]
# Sizes for which launches are remembered, per kind of call; a program whose shapes never repeat forgets the oldest.
REMEMBERED = 1024


@functools.cache
def why_not() -> str | None:
    """Why launches cannot be remembered with the Triton that is installed, or None if they can."""
    try:
        from triton import knobs
        from triton.backends.nvidia import driver
        from triton.runtime import driver as active
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    found = getattr(driver, "_BASE_ARGS_FORMAT", None)
    if found != _EXPECTED:
        return f"its C launchers take {found!r} before the arguments of a kernel; known is {_EXPECTED!r}"
    for owner, name in ((active, "_active"), (knobs.runtime.launch_enter_hook, "calls"), (driver, "CudaLauncher")):
        if not hasattr(owner, name):
            return f"{owner!r} has no {name}"
    return None


class _Quick:
    """The parts of Triton that launches in a row ask for, and the driver they were remembered for."""

    def __init__(self) -> None:
        from triton import knobs
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher
        from triton.runtime import driver

        self.driver, self.runtime, self.kind, self.launcher = driver, knobs.runtime, CudaDriver, CudaLauncher

    def stream(self, device: int) -> int | None:
        active, runtime = self.driver._active, self.runtime
        if type(active) is not self.kind or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            return None
        return active.get_current_stream(device)  # type: ignore[no-any-return]


@functools.cache
def _quick() -> _Quick | None:
    return _Quick() if why_not() is None else None


def current_stream(device: int) -> int | None:
    """The stream for launches on a CUDA device, ``Tensor.get_device()``; None where all have to be plain."""
    quick = _quick()
    return None if quick is None else quick.stream(max(device, 0))


class Launch:
    """A kernel with everything but its tensors.

    Args:
        kernel: whose first parameters are the tensors, then the integers, then constants.
        grid: of three numbers at most.
        integers: the kernel's parameters behind the tensors, in order.
        constants: the other parameters, and ``num_warps`` and ``num_stages``, by name.

    The dtypes of the tensors must be the same in every call, and their device.

    Attributes:
        known: the C launcher and its arguments before and behind the addresses, for addresses that are all multiples of
            16; None before such a launch.
    """

    __slots__ = ("_kept", "_others", "constants", "grid", "integers", "kernel", "known")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], integers: tuple[int, ...], constants: Mapping[str, Any]
    ) -> None:
        self.kernel, self.grid, self.integers, self.constants = kernel, grid, integers, constants
        self.known: Known | None = None
        self._others: dict[Hashable, Known] = {}
        self._kept: list[Any] = []  # compiled kernels whose functions are known

    def __call__(self, stream: int | None, *tensors: Tensor) -> None:
        """Launch on ``stream``, as :func:`current_stream` gave it."""
        if stream is not None:
            addresses = tuple(map(_address, tensors))
            known = self.known
            if unaligned(addresses):
                known = self._others.get(tuple(address % ALIGNMENT == 0 for address in addresses))
            if known is not None:
                run, grid, rest, values = known
                run(*grid, stream, *rest, *addresses, *values)
                return
        kernel = self.kernel[self.grid](*tensors, *self.integers, **self.constants)
        if stream is not None:
            self._remember(kernel, tensors)

    def _remember(self, kernel: Any, tensors: tuple[Tensor, ...]) -> None:
        """Keep what Triton took for these tensors, if its parts are as expected."""
        quick = _quick()
        assert quick is not None
        run: Any = getattr(kernel, "run", None)
        jit = self.kernel
        if (
            type(run) is not quick.launcher
            or run.global_scratch_size
            or run.profile_scratch_size
            or jit.pre_run_hooks
            or kernel.function is None
        ):
            return
        device = quick.driver.active.get_current_device()
        if any(t.is_cuda and t.get_device() != device for t in tensors):
            return
        # In the order of the parameters; the C launcher counts constants and ignores them.
        values = (*self.integers, *(self.constants[name] for name in jit.arg_names if name in self.constants))
        if len(tensors) + len(values) != len(jit.arg_names):
            return
        rest = (
            kernel.function, run.launch_cooperative_grid, run.launch_pdl, None, None, kernel.packed_metadata,
            None, None, None,
        )  # fmt: skip
        self._kept.append(kernel)
        known = run.launch, (*self.grid, 1, 1)[:3], rest, values
        aligned = tuple(t.data_ptr() % ALIGNMENT == 0 for t in tensors)
        if all(aligned):
            self.known = known
        else:
            self._others[aligned] = known


def unaligned(addresses: Iterable[int]) -> int:
    """Not 0 where one of them is not a multiple of 16."""
    bits = 0
    for address in addresses:
        bits |= address
    return bits % ALIGNMENT


class Program:
    """Launches one after the other over one list of tensors.

    Args:
        stages: each launch, and which tensors it takes, by their places in the list; at least two.
        scratch: the last tensors of the list: memory that the launches pass on and nobody sees.
        device: of the scratch memory.
    """

    __slots__ = ("_bytes", "_device", "_offsets", "_ready", "scratch", "stages")

    def __init__(
        self, stages: Sequence[tuple[Launch, tuple[int, ...]]], scratch: Sequence[Memory], device: torch.device
    ) -> None:
        self.stages = [(launch, operator.itemgetter(*places)) for launch, places in stages]
        self.scratch, self._device = scratch, device
        self._ready: list[tuple[Any, ...]] | None = None
        ends = [0, *itertools.accumulate(-(-memory.bytes // LINE) * LINE for memory in scratch)]
        self._offsets, self._bytes = tuple(ends[:-1]), ends[-1]

    def __call__(self, stream: int | None, *tensors: Tensor) -> None:
        """Launch all on ``stream``, as :func:`current_stream` gave it; ``tensors``: all but the scratch memory."""
        if stream is not None and self._ready is not None:
            addresses = tuple(map(_address, tensors))
            if not unaligned(addresses):
                # All scratch memory at once. It may be used again as soon as it is given back, by what comes later on
                # the same stream.
                memory = torch.empty_strided((self._bytes,), (1,), dtype=torch.uint8, device=self._device)
                base = memory.data_ptr()
                addresses += tuple([base + offset for offset in self._offsets])
                for run, grid, rest, values, pick in self._ready:
                    run(*grid, stream, *rest, *pick(addresses), *values)
                return
        self.apart(stream, *tensors)
        if stream is not None and self._ready is None and all(launch.known for launch, _ in self.stages):
            self._ready = [(*launch.known, pick) for launch, pick in self.stages if launch.known is not None]

    def apart(self, stream: int | None, *tensors: Tensor) -> list[Tensor]:
        """The same launches one by one, with scratch memory of tensors of their own, which are returned."""
        device = self._device
        scratch = [
            torch.empty_strided(size, strides, dtype=dtype, device=device) for size, strides, dtype in self.scratch
        ]
        tensors = (*tensors, *scratch)
        for launch, pick in self.stages:
            launch(stream, *pick(tensors))
        return scratch

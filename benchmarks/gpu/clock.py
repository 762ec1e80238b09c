"""Time on a CUDA device, eager or replayed from a graph."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

Call = Callable[[], object]


class Device(Protocol):
    """What is measured on. Tests put a CPU in its place."""

    where: str  # a torch device
    name: str

    def times(self, call: Call, graph: bool) -> list[float]:
        """Microseconds per call, one figure per repeat."""
        ...

    def settle(self) -> None:
        """Wait until the device has done everything; raise what it failed with."""
        ...


class Cuda:
    """The current CUDA device.

    Eager calls are timed back to back, so that where the host is slower than the device the figure is the host's: that
    is what an eager user waits for. Graphs hold several calls, so that a figure is not the cost of one graph launch.
    """

    where = "cuda"

    def __init__(self, repeats: int = 5, slice_ms: float = 2.0) -> None:
        self.name = torch.cuda.get_device_name()
        self.repeats, self.slice_ms = repeats, slice_ms
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def settle(self) -> None:
        torch.cuda.synchronize()

    def _stretch(self, call: Call, count: int) -> float:
        """Milliseconds of ``count`` calls."""
        self._start.record()
        for _ in range(count):
            call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    def _eager(self, call: Call) -> list[float]:
        self._stretch(call, 2)
        count = max(1, min(200, int(self.slice_ms / max(self._stretch(call, 3) / 3, 1e-3))))
        return [1e3 * self._stretch(call, count) / count for _ in range(self.repeats)]

    def times(self, call: Call, graph: bool) -> list[float]:
        if not graph:
            return self._eager(call)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        # An upper bound on the device's time, as the host may be slower: at worst the graph holds too few calls.
        inner = max(1, min(20, int(0.3 / max(self._stretch(call, 3) / 3, 1e-3))))
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            kept: Any = None
            for _ in range(inner):
                kept = call()
        found = [t / inner for t in self._eager(captured.replay)]
        del captured, kept
        return found


@contextlib.contextmanager
def tf32(allowed: bool, benchmark: bool | None = None) -> Iterator[None]:
    """float32 products with or without tf32; ``benchmark``: let cuDNN choose by trial, None: as it is.

    By cuDNN's own context manager: plain assignment is an error once anything called ``disable_global_flags``, as
    PyTorch's testing modules do when imported.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32
    trial = cudnn.benchmark if benchmark is None else benchmark
    with cudnn.flags(enabled=True, benchmark=trial, allow_tf32=allowed):
        matmul.allow_tf32 = allowed
        try:
            yield
        finally:
            matmul.allow_tf32 = before


def in_words(error: Exception) -> str:
    """Its kind and first line, short enough for a cell."""
    words = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {words}"[:160]


def measure(device: Device, call: Call, graph: bool) -> dict[str, object]:
    """Median, 20th and 80th percentile in microseconds, or the error in words."""
    try:
        times = device.times(call, graph)
    except Exception as error:  # one broken provider must not lose the others
        device.settle()
        return {"error": in_words(error)}
    pick = statistics.quantiles(times, n=5, method="inclusive")
    return {"us": statistics.median(times), "us_p20": pick[0], "us_p80": pick[3]}

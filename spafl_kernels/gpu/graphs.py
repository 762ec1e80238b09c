"""Recording what runs on a CUDA device, and running it again at the cost of one launch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

__all__ = ["CudaRecorder", "Recorder", "era"]

WAITS = "called a synchronizing CUDA operation"

_era = 0


def era() -> int:
    """Changes when recordings that were made before draw random numbers no longer as the device's generator says."""
    return _era


class Recorder(Protocol):
    """Records device work."""

    def watching(self) -> contextlib.AbstractContextManager[list[str]]:
        """A context around what is to be recorded next; the list gets what in it waits for the device."""
        ...

    def __call__(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record, and run nothing. The body must have run as it is before.

        Returns:
            What runs the body's device work, and what the body returned: tensors that hold its results after each such
            run.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: what one wrote there is gone when another one has run.

    Args:
        device: on which everything that is recorded lies, whichever is current.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        """See :class:`Recorder`."""
        before, found, others = torch.cuda.get_sync_debug_mode(), list[str](), list[warnings.WarningMessage]()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            del caught[:]  # that this mode is a prototype
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
                for warning in caught:
                    waits = WAITS in str(warning.message)
                    found.append(f"line {warning.lineno} of {warning.filename}") if waits else others.append(warning)
        for w in others:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)

    def __call__(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See :class:`Recorder`."""
        with torch.cuda.device(self._device):
            return self._record(body)

    def _record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self._stream is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would also collect garbage and give memory back, a tenth of a second each time.
        torch.cuda.synchronize()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        kept = generator.clone_state()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            try:
                result = body()
                graph.capture_end()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                # It believes that the capture goes on, and would refuse to draw. Recordings know it by its old state.
                generator.graphsafe_set_state(kept)
                global _era
                _era += 1
                raise
        return graph.replay, result

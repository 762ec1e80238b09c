"""Recording what runs on a CUDA device, and running it again at the cost of one launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["CudaRecorder", "Recorder"]

Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""``recorder(body)`` runs nothing, and returns what runs the body's device work, and what the body returned: tensors
that hold its results after each such run. The body must have run as it is before."""


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: what one wrote there is gone when another one has run."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See :data:`Recorder`.

        Raises:
            RuntimeError: the body waits for the device, or does something else that a graph cannot hold.
        """
        if self._stream is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would also collect garbage and give memory back, a tenth of a second each time.
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            try:
                result = body()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay, result

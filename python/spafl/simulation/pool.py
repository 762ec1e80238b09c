"""Runs tasks in this process or in worker processes; results come back in the order of the tasks either way."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from .tasks import EvaluateTask, TrainTask, Worker, WorkerSetup

_worker: Worker | None = None  # of this worker process


def _start(setup: WorkerSetup) -> None:
    global _worker
    _worker = Worker(setup)


def _run(task: TrainTask | EvaluateTask) -> Any:
    assert _worker is not None
    return _worker.run(task)


class WorkerDied(RuntimeError):
    """A worker process ended without an answer (killed, or out of memory)."""


class Pool:
    """``workers`` processes of one thread each; one worker means this process itself.

    Processes are spawned, not forked: a fork after torch has started threads can hang, and CUDA forbids it.
    """

    def __init__(self, setup: WorkerSetup, workers: int) -> None:
        self._own: Worker | None = None
        self._executor: ProcessPoolExecutor | None = None
        if workers == 1:
            self._own = Worker(setup)
        else:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(setup,))

    def run(self, tasks: Sequence[TrainTask] | Sequence[EvaluateTask], weights: Sequence[float]) -> list[Any]:
        """Results of the tasks, in their order.

        Args:
            tasks: independent of one another.
            weights: expected relative length of each; long ones are started first, so that no worker idles at the end.
        """
        if self._own is not None:
            return [self._own.run(task) for task in tasks]
        assert self._executor is not None
        order = sorted(range(len(tasks)), key=lambda i: -weights[i])
        try:
            futures = {i: self._executor.submit(_run, tasks[i]) for i in order}
            return [futures[i].result() for i in range(len(tasks))]
        except BrokenProcessPool as error:
            raise WorkerDied("a worker process died (killed, or out of memory); the last checkpoint is kept") from error

    def close(self) -> None:
        """Stop the workers; tasks that have not started are dropped."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

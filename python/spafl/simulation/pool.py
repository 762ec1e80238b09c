"""Runs tasks in this process or in worker processes; results come back in the order of the tasks either way."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from ..signals import held, released
from .process import Gone, WorkerProcess, write_setup
from .progress import say
from .tasks import EvaluateTask, TrainTask, Worker, WorkerSetup

# So many workers may die over one task, or before they are ready, one after another: then it is no accident.
_DEATHS = 3

# Idle workers end by themselves within this time, or are killed.
_PATIENCE = 3.0


class WorkerDied(RuntimeError):
    """Worker processes ended without an answer (killed, or out of memory), again and again."""


@contextmanager
def spare_processes() -> Iterator[list[WorkerProcess]]:
    """A list for processes that are started before there is a pool for them; those still in it are ended at the end."""
    spare: list[WorkerProcess] = []
    try:
        yield spare
    finally:
        with held():
            for process in spare:
                process.end()


class Pool:
    """``workers`` processes of one thread each; one worker means this process itself.

    A worker that dies is replaced, and its task is carried out again; tasks write nothing that another one reads, so
    the results are those of an undisturbed run. If none can be started, the run goes on with fewer. The workers end
    with this process, and with the thread that made the pool: the kernel knows no other parent.

    Args:
        spare: processes that were started already; the pool takes them out of the list.
    """

    def __init__(self, setup: WorkerSetup, workers: int, spare: list[WorkerProcess] | None = None) -> None:
        self._own: Worker | None = None
        self._processes: list[WorkerProcess] = []
        self._setup: int | None = None
        self._store = setup.store
        self._spare = spare if spare is not None else []
        self._failed_starts = 0
        if workers == 1:
            self._own = Worker(setup)
            return
        self._setup = write_setup(setup)
        try:
            for _ in range(workers):
                self._start()
        except BaseException:
            self.close(patience=0)
            raise

    def _start(self) -> None:
        assert self._setup is not None, "the pool is closed"
        with held():  # somebody owns it at every moment
            process = self._spare.pop() if self._spare else WorkerProcess()
            self._processes.append(process)
        process.set_up(self._setup, self._store)

    def run(self, tasks: Sequence[TrainTask] | Sequence[EvaluateTask], weights: Sequence[float]) -> list[Any]:
        """Results of the tasks, in their order.

        Args:
            tasks: independent of one another.
            weights: expected relative length of each; long ones are started first, so that no worker idles at the end.

        Raises:
            WorkerDied: three workers died over one task, or none is left and none can be started.
            Exception: what the first task that fails raises; first in their order, whoever is faster.
        """
        with released():  # what is lost by a signal here are tasks that can be carried out again
            if self._own is not None:
                return [self._own.run(task) for task in tasks]
            try:
                return self._share_out(tasks, weights)
            except BaseException:
                self.close(patience=0)
                raise

    def _share_out(self, tasks: Sequence[TrainTask | EvaluateTask], weights: Sequence[float]) -> list[Any]:
        waiting = deque(sorted(range(len(tasks)), key=lambda i: -weights[i]))
        left = set(waiting)  # tasks without an answer whose answer matters
        results: dict[int, Any] = {}
        failed: dict[int, Exception] = {}
        deaths: Counter[int] = Counter()
        while left:
            for process in self._processes:
                while process.idle and waiting:
                    number = waiting.popleft()
                    if number in left and not process.give(number, tasks[number]):
                        waiting.appendleft(number)
                        break
            connections = {process.connection: process for process in self._processes}
            for connection in wait(list(connections)):
                process = connections[connection]  # type: ignore[index]
                begun = process.task
                try:
                    well, outcome = process.answer()
                except Gone as how:
                    if begun is not None:
                        deaths[begun] += 1
                        if deaths[begun] == _DEATHS:
                            raise WorkerDied(
                                f"{tasks[begun]}: {_DEATHS} worker processes died over it, the last one {how}; "
                                "if memory is short, fewer simulation.workers need less"
                            ) from None
                        waiting.appendleft(begun)
                    self._replace(process, how, None if begun is None else tasks[begun])
                    continue
                if begun is None:
                    if not well:
                        raise outcome
                    self._failed_starts = 0
                    continue
                left.discard(begun)
                if well:
                    results[begun] = outcome
                else:
                    failed[begun] = outcome
                    left = {i for i in left if i < begun}
        if failed:
            raise failed[min(failed)]
        return [results[number] for number in range(len(tasks))]

    def _replace(self, process: WorkerProcess, how: Gone, task: TrainTask | EvaluateTask | None) -> None:
        self._processes.remove(process)
        self._failed_starts = 0 if process.ready else self._failed_starts + 1
        if self._failed_starts < _DEATHS:
            self._start()
            again = f"; {task} is carried out again" if task is not None else ""
            say(f"worker process {process.pid} {how}, another one takes its place{again}")
        elif self._processes:
            self._failed_starts = 0
            say(f"worker process {process.pid} {how} before it was ready; the run goes on with {len(self._processes)}")
        else:
            raise WorkerDied(f"no worker process can be started: the last one {how} before it was ready")

    def close(self, patience: float = _PATIENCE) -> None:
        """End the workers: idle ones by themselves, and past ``patience`` seconds all of them by force."""
        deadline = time.monotonic() + patience
        for process in self._processes:
            process.connection.close()
        while self._processes:
            self._processes[-1].end(max(0.0, deadline - time.monotonic()))
            self._processes.pop()
        if self._setup is not None:
            os.close(self._setup)
            self._setup = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(_PATIENCE if kind is None else 0.0)

"""One worker process, from both ends.

It is a fresh interpreter that imports this package and never the user's main module, so scripts need no
``if __name__ == "__main__"`` and notebooks and standard input will do; what is defined there travels by value
(cloudpickle). Not forked: a fork after torch has started threads can hang, and CUDA forbids it. It can be started
before there is a set-up: importing takes seconds, in which the parent reads and cuts the data. The kernel ends it with
its parent (:mod:`.boot`); while it is idle, the end of the connection does.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle

from ..signals import blocked, held
from .store import StoreFile
from .tasks import EvaluateTask, TrainTask, Worker, WorkerSetup

_BOOT = Path(__file__).with_name("boot.py")


class Gone(Exception):
    """The process ended without an answer; the text says how."""


class WorkerProcess:
    """A worker process, and the task it has; it can do nothing before :meth:`set_up`.

    Attributes:
        connection: readable when there is an answer, or none will come.
        ready: it has answered that it can work.
        task: number of the task it works on, or None.
    """

    def __init__(self) -> None:
        self.ready = False
        self.task: int | None = None
        # Held, so that no process is started without an owner who ends it.
        with held():
            self.connection, theirs = multiprocessing.Pipe()
            with theirs:
                end = theirs.fileno()
                flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing
                command = [sys.executable, *flags, "-P", str(_BOOT), json.dumps([os.getpid(), end, _path()])]
                with blocked():
                    self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(end,))
        self.pid = self._process.pid

    def set_up(self, setup: int, store: StoreFile | None) -> None:
        """Have it make ready.

        Args:
            setup: descriptor of a file made by :func:`write_setup`.
            store: the one that the set-up mentions; an open file is another number in another process.
        """
        descriptors = [setup, store.descriptor if store is not None else setup]
        # A process that is gone says so where its answer is looked for.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            reduction.sendfds(end, descriptors)

    @property
    def idle(self) -> bool:
        """Whether it can be given a task."""
        return self.ready and self.task is None

    def give(self, number: int, task: TrainTask | EvaluateTask) -> bool:
        """Give it a task; False: it is gone, and the task was not begun."""
        try:
            self.connection.send_bytes(pickle.dumps(task, pickle.HIGHEST_PROTOCOL))
        except OSError:
            return False
        self.task = number
        return True

    def answer(self) -> tuple[bool, Any]:
        """What came: whether it went well, and the outcome (None when it has just become ready) or the exception.

        Raises:
            Gone: nothing came and nothing will.
        """
        try:
            content = self.connection.recv_bytes()
        except (EOFError, OSError):
            self.end(5.0)
            raise Gone(self._how()) from None
        self.ready, self.task = True, None
        return pickle.loads(content)

    def _how(self) -> str:
        status = self._process.returncode
        if status >= 0:
            return f"ended with status {status}"
        return f"was killed by {signal.Signals(-status).name}" + (" (out of memory?)" if status == -9 else "")

    def end(self, patience: float = 0.0) -> None:
        """Let it end by itself if it is idle or ending, and past ``patience`` seconds kill it, whatever it does."""
        self.connection.close()
        with held():
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _path() -> list[str]:
    return [entry for entry in sys.path if isinstance(entry, str)]


def write_setup(setup: WorkerSetup) -> int:
    """The descriptor of an unnamed file in memory that holds the set-up; gone when every process has closed it."""
    descriptor = os.memfd_create("setup")
    with open(descriptor, "wb", closefd=False) as file:
        # The path has grown, perhaps, since the process was started, and what is unpickled may need it.
        pickle.dump((_path(), cloudpickle.dumps(setup, pickle.HIGHEST_PROTOCOL)), file, pickle.HIGHEST_PROTOCOL)
    return descriptor


def _receive_setup(connection: Connection) -> tuple[int, int]:
    """The descriptors that :meth:`WorkerProcess.set_up` sent; EOFError: nothing came and nothing will."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        setup, store = reduction.recvfds(end, 2)
    for received in (setup, store):  # not for processes that an algorithm may start
        os.set_inheritable(received, False)
    return setup, store


def _read_setup(descriptor: int, store: int) -> WorkerSetup:
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
        sys.path[:], pickled = pickle.loads(content)
    os.close(descriptor)
    setup: WorkerSetup = pickle.loads(pickled)
    if setup.store is None:
        os.close(store)
        return setup
    return replace(setup, store=replace(setup.store, descriptor=store))


def _failure(error: Exception) -> bytes:
    """An exception as an answer, with where it came from; one that does not survive the journey is told in words."""
    error.add_note(f"in worker process {os.getpid()}:\n{traceback.format_exc()}")
    try:
        content = cloudpickle.dumps((False, error))
        pickle.loads(content)
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        told.__notes__ = error.__notes__
        content = cloudpickle.dumps((False, told))
    return content


def serve(descriptor: int) -> None:
    """A worker process's life: make ready, then a task at a time until the connection is closed."""
    # Not for processes that an algorithm may start: the connection has to close with this one.
    os.set_inheritable(descriptor, False)
    try:
        _answer_tasks(Connection(descriptor))
    except (EOFError, ConnectionError):
        return  # nobody is listening any more, perhaps in the middle of an answer


def _answer_tasks(connection: Connection) -> None:
    setup, store = _receive_setup(connection)
    try:
        worker = Worker(_read_setup(setup, store))
    except Exception as error:
        connection.send_bytes(_failure(error))
        return
    connection.send_bytes(cloudpickle.dumps((True, None)))
    while True:
        task = pickle.loads(connection.recv_bytes())
        try:
            answer = cloudpickle.dumps((True, worker.run(task)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            answer = _failure(error)
        connection.send_bytes(answer)

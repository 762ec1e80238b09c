"""What a worker can be asked to do, and the process-wide state it needs. Runs in the main process too (one worker)."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..algorithms import Algorithm, Client, Evaluation, Samples, Training
from ..wire import decode, encode
from .resident import ClientSetting, Resident
from .store import ClientStore

STORE_FILE = "clients.bin"
DATA_PARTS = ("train_x", "train_y", "test_x", "test_y")


@dataclass(frozen=True)
class WorkerSetup:
    """Everything a worker process needs to build its half of the run; small and picklable."""

    algorithm: Algorithm
    model: nn.Module
    """The initial model, prepared by the algorithm."""
    engine: str
    setting: ClientSetting
    clients: int
    scratch: Path
    """Folder with the client store, the data arrays (``.npy``) and the parts (``.npz``)."""


@dataclass(frozen=True)
class Announced:
    """Announcements a client has not received yet: ``(round, frame)``, oldest first."""

    items: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True)
class TrainTask:
    round: int
    client: int
    frame: bytes
    announced: Announced


@dataclass(frozen=True)
class TrainOutcome:
    client: int
    samples: int
    frame: bytes
    training: Training
    """Its message is emptied: the frame carries it."""
    seconds: float


@dataclass(frozen=True)
class EvaluateTask:
    """Bring clients up to date and, if ``evaluate``, test them."""

    round: int
    clients: tuple[int, ...]
    announced: tuple[Announced, ...]
    frame: bytes
    evaluate: bool
    train_data: bool


@dataclass(frozen=True)
class EvaluateOutcome:
    clients: tuple[int, ...]
    evaluations: tuple[Evaluation | None, ...]
    changed: tuple[bool, ...]
    """Whether the client's own tensors may have changed."""
    seconds: float


class Worker:
    """One process's resident model, its view of the store and of the data."""

    def __init__(self, setup: WorkerSetup) -> None:
        torch.set_num_threads(1)
        self.setup = setup
        self.algorithm = setup.algorithm
        model = copy.deepcopy(setup.model)
        initial = self.algorithm.client_state(model)
        self.store = ClientStore(setup.scratch / STORE_FILE, initial, setup.clients) if initial else None
        tensors = self.store.tensors if self.store else {}
        self.resident = Resident(self.algorithm, model, setup.engine, setup.setting, tensors)
        # Copy-on-write maps: shared between processes, and torch may call them writable.
        self._data = {part: np.load(setup.scratch / f"{part}.npy", mmap_mode="c") for part in DATA_PARTS}
        parts = np.load(setup.scratch / "partition.npz")
        self._parts = {split: np.split(parts[f"{split}_index"], parts[f"{split}_cut"]) for split in ("train", "test")}

    def _samples(self, split: str, client: int) -> Samples:
        index = self._parts[split][client]
        x, y = self._data[f"{split}_x"][index], self._data[f"{split}_y"][index]
        return Samples(torch.from_numpy(x), torch.from_numpy(y))

    def _lend(self, k: int, announced: Announced) -> Client:
        """Client ``k``'s turn: its tensors are in place and it has heard everything."""
        if self.store:
            self.store.load(k)
        client = self.resident.lend(k, self._samples("train", k), self._samples("test", k))
        for round, frame in announced.items:
            self.algorithm.receive(client, decode(frame), round)
        return client

    def _keep(self, k: int) -> None:
        self.resident.take_back()
        if self.store:
            self.store.save(k)

    def run(self, task: TrainTask | EvaluateTask) -> TrainOutcome | EvaluateOutcome:
        """Carry out a task; with one worker this is called directly."""
        return self._train(task) if isinstance(task, TrainTask) else self._evaluate(task)

    def _train(self, task: TrainTask) -> TrainOutcome:
        start = time.perf_counter()
        client = self._lend(task.client, task.announced)
        training = self.algorithm.train(client, decode(task.frame), task.round)
        self._keep(task.client)
        frame = encode(training.message)
        seconds = time.perf_counter() - start
        return TrainOutcome(task.client, len(client.train), frame, replace(training, message={}), seconds)

    def _evaluate(self, task: EvaluateTask) -> EvaluateOutcome:
        start = time.perf_counter()
        message = decode(task.frame)
        evaluations: list[Evaluation | None] = []
        changed: list[bool] = []
        for k, announced in zip(task.clients, task.announced, strict=True):
            client = self._lend(k, announced)
            evaluation = self.algorithm.evaluate(client, message, task.train_data) if task.evaluate else None
            if evaluation is not None and not math.isfinite(evaluation.loss):
                raise FloatingPointError(
                    f"the test loss of client {k} became {evaluation.loss} in round {task.round}; a smaller "
                    "training.lr or a training.max_grad_norm may help"
                )
            evaluations.append(evaluation)
            changed.append(bool(announced.items) or (evaluation is not None and evaluation.changed))
            if changed[-1]:
                self._keep(k)
        return EvaluateOutcome(task.clients, tuple(evaluations), tuple(changed), time.perf_counter() - start)

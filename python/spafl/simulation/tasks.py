"""What a worker can be asked to do, and the process-wide state it needs. Runs in the main process too (one worker)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spafl_kernels import SGDOptions
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.functional import threshold_layers

from ..algorithms import Algorithm, Client, Evaluation, Training
from ..errors import UserError
from ..system import Usage
from ..wire import Uplink, decode
from .announcements import Announcement
from .resident import ClientSetting, Resident
from .rows import Turn
from .spool import map_samples
from .store import ClientStore, StoreFile


@dataclass(frozen=True)
class WorkerSetup:
    """Everything a worker process needs to build its half of the run; small and picklable."""

    algorithm: Algorithm
    model: nn.Module
    """The initial model, prepared by the algorithm."""
    engine: str
    setting: ClientSetting
    uplink: Uplink
    client_state: dict[str, Tensor]
    """Initial tensors of a row."""
    scratch: Path
    """Folder of :mod:`.spool`."""
    store: StoreFile | None
    """The rows of the clients, if they keep anything."""
    rows: int


@dataclass(frozen=True)
class TrainTask:
    round: int
    client: int
    frame: bytes
    announced: tuple[Announcement, ...]
    """What the client has not heard yet, oldest first."""
    turn: Turn | None
    """Where its row is and goes, if there are any."""
    carries: bool = True
    """Whether there is anything in the frame; an empty one is not sent."""

    def __str__(self) -> str:
        return f"the training of client {self.client} in round {self.round + 1}"


@dataclass(frozen=True)
class TrainOutcome:
    client: int
    samples: int
    frame: bytes
    training: Training
    """Its message is emptied: the frame carries it."""
    seconds: float
    usage: Usage | None = None
    """What the turn took of the client's device, where devices are modelled."""


@dataclass(frozen=True)
class EvaluateTask:
    """Test clients, on copies that have heard everything."""

    round: int
    clients: tuple[int, ...]
    announced: tuple[tuple[Announcement, ...], ...]
    turns: tuple[Turn | None, ...]
    """Where their rows are, if there are any; none is written."""
    frame: bytes
    train_data: bool

    def __str__(self) -> str:
        return f"the evaluation of clients {self.clients[0]} to {self.clients[-1]} in round {self.round + 1}"


@dataclass(frozen=True)
class EvaluateOutcome:
    clients: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]
    seconds: float


def verified(setup: WorkerSetup) -> WorkerSetup:
    """``setup`` with what verification of the compact engine finds of the model on a first batch of client 0.

    So it is paid for once, by the parent, while its workers import, and not by each of them. Not on a GPU, which is the
    workers' alone.
    """
    setting = setup.setting
    adam = not isinstance(setting.local.options_at(0), SGDOptions)
    if setting.device.type != "cpu" or (adam and list(threshold_layers(setup.model))):
        return setup
    model, state = copy.deepcopy(setup.model), copy.deepcopy(setup.client_state)
    resident = Resident(setup.algorithm, model, setup.engine, setting, state)
    samples, trainer = map_samples(setup.scratch), resident.trainer
    if not isinstance(trainer, CompactTrainer):
        return setup
    x, _ = next(iter(resident.lend(0, state, samples["train"][0], samples["test"][0]).training_batches(0)))
    return replace(setup, setting=replace(setting, verdicts=trainer.verdicts_on(x)))


class Worker:
    """One process's resident model, its view of the store and of the data."""

    def __init__(self, setup: WorkerSetup) -> None:
        torch.set_num_threads(1)
        self.setup = setup
        self.algorithm = setup.algorithm
        model = copy.deepcopy(setup.model)
        initial = setup.client_state
        self.store = ClientStore(setup.store, initial, setup.rows) if setup.store else None
        self.resident = Resident(self.algorithm, model, setup.engine, setup.setting, initial)
        self._samples = map_samples(setup.scratch)

    def _lend(self, k: int, tensors: Mapping[str, Tensor], announced: tuple[Announcement, ...]) -> Client:
        """Client ``k``'s turn on its tensors: it has heard everything."""
        client = self.resident.lend(k, tensors, self._samples["train"][k], self._samples["test"][k])
        for announcement in announced:
            self.algorithm.receive(client, self._read(announcement.frame, announcement.round), announcement.round)
        return client

    def _read(self, frame: bytes, round: int) -> dict[str, Tensor]:
        return decode(frame, round, self.setup.uplink.model)

    def run(self, task: TrainTask | EvaluateTask) -> TrainOutcome | EvaluateOutcome:
        """Carry out a task; with one worker this is called directly."""
        return self._train(task) if isinstance(task, TrainTask) else self._evaluate(task)

    def _train(self, task: TrainTask) -> TrainOutcome:
        start = time.perf_counter()
        store, turn = self.store, task.turn
        tensors = store.take(turn.source, turn.written) if store and turn else {}
        client = self._lend(task.client, tensors, task.announced)
        training = self.algorithm.train(client, self._read(task.frame, task.round), task.round)
        rounding = client.stream("rounding", task.round)
        frame = self.setup.uplink.pack(training.message, task.frame, task.round, client.memory, rounding)
        usage, figures = None, training.figures
        if (system := self.setup.setting.system) is not None:
            usage = self._usage(client, task, len(frame) if training.message else 0, training)
            figures = figures | self.algorithm.timed(client, system.seconds(usage))
        self.resident.take_back()
        if store and turn:
            store.keep(turn.written)
        seconds = time.perf_counter() - start
        training = replace(training, message={}, figures=figures)
        return TrainOutcome(task.client, len(client.train), frame, training, seconds, usage)

    def _usage(self, client: Client, task: TrainTask, up: int, training: Training) -> Usage:
        if training.cost.executed_macs is None:
            raise UserError("system: this algorithm does not tell how many multiply-accumulates it has executed")
        down = sum(len(a.frame) for a in task.announced) + (len(task.frame) if task.carries else 0)
        return Usage(client.id, training.cost.executed_macs, down, up, client.peak_bytes())

    def _evaluate(self, task: EvaluateTask) -> EvaluateOutcome:
        start = time.perf_counter()
        message = self._read(task.frame, task.round)
        evaluations: list[Evaluation] = []
        for k, announced, turn in zip(task.clients, task.announced, task.turns, strict=True):
            # On a copy: what happens to it is not kept.
            client = self._lend(k, self.store.load(turn.source) if self.store and turn else {}, announced)
            evaluation = self.algorithm.evaluate(client, message, task.train_data)
            if not math.isfinite(evaluation.loss):
                raise FloatingPointError(
                    f"the test loss of client {k} became {evaluation.loss} in round {task.round + 1}; a smaller "
                    "training.lr or a training.max_grad_norm may help"
                )
            evaluations.append(evaluation)
        return EvaluateOutcome(task.clients, tuple(evaluations), time.perf_counter() - start)

"""One client as an algorithm sees it, and the local work that most algorithms share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from spafl_kernels.functional import threshold_layers
from spafl_kernels.layers import ThresholdLayer
from spafl_kernels.training import AdamOptions, MaskedTrainer, Options, SGDOptions, Trainer, TrainResult

from .. import rng
from ..data import Transform
from .objective import CLASSES, Confusion, Objective


class Samples:
    """Raw samples of one client: rows of a data set, copied out of it only when asked for.

    Args:
        x: ``(m, channels, height, width)`` as stored.
        y: ``(m,)`` int64 classes, or float32 numbers ``(m, outputs)``.
        index: ``(n,)`` int64, the rows that are meant; all by default.
    """

    def __init__(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> None:
        self._x, self._y, self._index = x, y, index

    def __len__(self) -> int:
        return self._y.shape[0] if self._index is None else self._index.shape[0]

    def __getitem__(self, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        """``(x, y)`` of some of these samples: their numbers, int64, or a range of them."""
        rows = chosen if self._index is None else self._index[chosen]
        return self._x[rows], self._y[rows]

    def on(self, device: torch.device) -> Samples:
        """These samples in the device's memory; on a CPU, where they are."""
        return self if device.type == "cpu" else Samples(self.x.to(device), self.y.to(device))

    @property
    def x(self) -> Tensor:
        """All images ``(n, channels, height, width)``."""
        return self._x if self._index is None else self._x[self._index]

    @property
    def y(self) -> Tensor:
        """All targets: classes ``(n,)``, or numbers ``(n, outputs)``."""
        return self._y if self._index is None else self._y[self._index]


@dataclass(frozen=True)
class LocalTraining:
    """Settings of local training that all algorithms share (the ``[training]`` section).

    Args:
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum, nesterov: of ``sgd``.
        betas, eps: of the other two.
        epochs: passes over a client's samples in a turn; a fraction is rounded to batches, at least one.
        steps: so many batches instead, passing over the samples again and again.
        early_stopping, min_improvement: a turn ends after so many passes in a row whose mean training loss was not
            below ``(1 - min_improvement)`` times the lowest mean of a pass before. None: never early.
        schedule, lr_decay, lr_floor, step_rounds, cosine_rounds, warmup_rounds: see :meth:`lr_at`.
        threshold_lr: learning rate of the thresholds, scheduled as ``lr`` is; None: ``lr``.
        dtype: of weights, activations and messages; of stored samples it is not.
    """

    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    epochs: float
    lr_decay: float
    lr_floor: float
    max_grad_norm: float | None
    drop_last: bool
    shuffle: bool = True
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    threshold_lr: float | None = None
    steps: int | None = None
    early_stopping: int | None = None
    min_improvement: float = 0.0
    schedule: Literal["exponential", "step", "cosine"] = "exponential"
    step_rounds: int | None = None
    cosine_rounds: int | None = None
    warmup_rounds: int = 0
    dtype: Literal["float32", "float64"] = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as PyTorch's."""
        return getattr(torch, self.dtype)

    def lr_at(self, round: int) -> float:
        """Learning rate of a round.

        In round r < ``warmup_rounds`` it is ``lr (r + 1) / (warmup_rounds + 1)``. With r counted from there it is then

        * ``exponential``: ``max(lr * lr_decay ** r, lr_floor)``;
        * ``step``: ``max(lr * lr_decay ** (r // step_rounds), lr_floor)``;
        * ``cosine``: ``lr_floor + (lr - lr_floor) (1 + cos(pi r / cosine_rounds)) / 2``, and ``lr_floor`` afterwards.
        """
        if round < self.warmup_rounds:
            return self.lr * (round + 1) / (self.warmup_rounds + 1)
        round -= self.warmup_rounds
        if self.schedule == "cosine":
            assert self.cosine_rounds is not None
            share = (1 + math.cos(math.pi * min(round / self.cosine_rounds, 1.0))) / 2
            return self.lr_floor + (self.lr - self.lr_floor) * share
        if self.schedule == "step":
            assert self.step_rounds is not None
            round //= self.step_rounds
        return max(self.lr * self.lr_decay**round, self.lr_floor)

    def options_at(self, round: int) -> Options:
        """The trainer's options in a round, without what a method adds to them."""
        lr = self.lr_at(round)
        own = None if self.threshold_lr is None else self.threshold_lr * (lr / self.lr)
        if self.optimizer == "sgd":
            return SGDOptions(
                lr, self.momentum, self.weight_decay, self.max_grad_norm, nesterov=self.nesterov, threshold_lr=own
            )
        return AdamOptions(
            lr,
            self.betas,
            self.eps,
            self.weight_decay,
            self.max_grad_norm,
            decoupled=self.optimizer == "adamw",
            threshold_lr=own,
        )


def steps_of_momentum(steps: int, momentum: float, nesterov: bool = False) -> float:
    """How many times ``lr g`` SGD from fresh momentum moves in so many steps of a constant gradient ``g``."""
    if not momentum:
        return steps
    if nesterov:  # every step is what plain momentum does one step later
        return steps_of_momentum(steps + 1, momentum) - 1
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


class SavedBytes:
    """Counts what a step keeps for its backward pass, every storage once, without the model's own tensors.

    Attributes:
        bytes: of what was kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        # A detached alias: a result that is kept for its own derivative would own itself.
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda t: t)
        self._kept: list[Tensor] = []  # so that no address is used twice while it is counted

    def _keep(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
            self._kept.append(t.detach())
        return t.detach()

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._kept.clear()


class EarlyStop:
    """Watches the mean losses of the passes of a turn.

    Args:
        patience, min_improvement: see :class:`LocalTraining`.
    """

    def __init__(self, patience: int, min_improvement: float) -> None:
        self.patience, self.min_improvement = patience, min_improvement
        self.best = math.inf
        self.since = 0

    def due(self, loss: float) -> bool:
        """Whether to stop after another pass with this mean loss."""
        if loss < self.best * (1 - self.min_improvement):
            self.best, self.since = loss, 0
        else:
            self.since += 1
        return self.since >= self.patience


@dataclass
class Evaluation:
    """One client's test result; fractions in [0, 1]."""

    samples: int
    loss: float
    """Mean over batches of the mean loss of a batch, as published."""
    accuracy: float
    train_accuracy: float | None = None
    densities: dict[str, float] | None = None
    """Share of each layer that the client's model keeps, or None for a method that prunes nothing."""
    masks: dict[str, str] | None = None
    """Which filters of a layer are kept, one character 0 or 1 each, where whole filters are pruned."""
    confusion: list[list[int]] | None = None
    """``[class, predicted class, how many]`` of the test samples, where they are counted."""


class Client:
    """The client whose turn it is: its tensors are in ``model`` and ``memory``, in place.

    Attributes:
        id: number of the client, from 0.
        model: holds the client's own tensors while it is this client's turn.
        memory: the client's other tensors, by the names of ``Algorithm.client_state``; change them in place.
        train, test: the client's data.
        trainer: runs SGD steps on ``model``.
        layers: the threshold layers of ``model`` by name, in registration order.
        local: shared settings of local training.
        objective: what is learned, by which loss.
        macs: dense multiply-accumulates per sample of each layer (published counting: a linear layer counts once per
            sample, whatever the number of tokens).
        device_class: of the device it is on, if devices are modelled.
        samples_done: samples of the last :meth:`run_sgd`, each as often as it was in a batch.
        evaluation_batch: batch size of evaluations; it only matters for the loss (a mean over batches) and the speed.
    """

    def __init__(
        self,
        id: int,
        model: nn.Module,
        memory: dict[str, Tensor],
        train: Samples,
        test: Samples,
        trainer: Trainer,
        local: LocalTraining,
        transform: Transform,
        macs: dict[str, int],
        seed: int,
        device: torch.device,
        layers: Mapping[str, ThresholdLayer] | None = None,
        others: dict[Hashable, tuple[nn.Module, Trainer]] | None = None,
        make_trainer: Callable[[nn.Module], Trainer] = MaskedTrainer,
        counts: dict[str, float] | None = None,
        device_class: str | None = None,
        objective: Objective = CLASSES,
    ) -> None:
        self.id = id
        self.model = model
        self.memory = memory
        self.train = train
        self.test = test
        self.trainer = trainer
        self.local = local
        self.macs = macs
        self.objective = objective
        self.layers = dict(threshold_layers(model)) if layers is None else layers
        self.evaluation_batch = max(local.batch_size, 256)
        self._transform = transform
        self._seed = seed
        self._device = device
        self._dtype = local.torch_dtype
        self._others = {} if others is None else others
        self._make_trainer = make_trainer
        self._counts = {} if counts is None else counts
        self.device_class = device_class
        self.samples_done = 0

    def stream(self, purpose: str, round: int) -> np.random.Generator:
        """This client's random numbers for a purpose in a round."""
        return rng.numpy_stream(self._seed, purpose, round, self.id)

    def torch_stream(self, purpose: str, round: int) -> torch.Generator:
        """The same as a torch generator, on the CPU."""
        return rng.torch_stream(self._seed, purpose, round, self.id)

    def as_input(self, x: Tensor) -> Tensor:
        """Raw images as the model takes them: on the device, normalised, not augmented."""
        return self._transform(x.to(self._device), self._dtype, None)

    def as_target(self, y: Tensor) -> Tensor:
        """Classes, or numbers to predict, on the device; numbers in the dtype of the model."""
        return y.to(self._device, self._dtype if y.is_floating_point() else None)

    def training_batches(self, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a turn: shuffled anew each pass, augmented, normalised, on the device."""
        n, size = len(self.train), self.local.batch_size
        shuffle = self.stream("shuffle", round)
        augment = None
        if self._transform.augment:
            augment = rng.torch_stream(self._seed, "augment", round, self.id)
        # Dropout and the like draw from the device's global generator. torch.manual_seed would seed every backend there
        # might be, and takes a millisecond to remember where it was called from.
        seed = rng.stream_seed(self._seed, "model", round, self.id)
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)
        last = n - n % size if self.local.drop_last and n >= size else n
        left = self.planned_steps
        data = self.train.on(self._device)  # a copy for each batch would keep the device waiting
        while left:
            order = torch.from_numpy(shuffle.permutation(n)) if self.local.shuffle else torch.arange(n)
            order = order.to(self._device)
            for start in range(0, last, size)[:left]:
                left -= 1
                chosen = order[start : min(start + size, last)]
                x, y = data[chosen]
                yield self._transform(x.to(self._device), self._dtype, augment), self.as_target(y)

    def batches_per_epoch(self) -> int:
        """Number of batches of one local epoch."""
        n, size = len(self.train), self.local.batch_size
        return n // size if self.local.drop_last and n >= size else -(-n // size)

    @property
    def planned_steps(self) -> int:
        """Batches of a turn, unless it ends early."""
        if self.local.steps is not None:
            return self.local.steps
        return max(1, round(self.local.epochs * self.batches_per_epoch()))

    def epochs_of(self, steps: int) -> float:
        """Passes over the client's samples that so many batches are."""
        return steps / self.batches_per_epoch()

    def run_sgd(self, round: int, batches: Iterable[tuple[Tensor, Tensor]] | None = None) -> tuple[float, int]:
        """Batches with the trainer, which must have begun: ``(mean batch loss, steps)``; by default those of the turn.

        Fewer where ``early_stopping`` says so.

        Raises:
            FloatingPointError: the loss of a batch is not finite; names the client and the round.
        """
        losses: list[Tensor] = []
        self.samples_done = 0
        stop, length = None, self.batches_per_epoch()
        if self.local.early_stopping is not None:
            stop = EarlyStop(self.local.early_stopping, self.local.min_improvement)
        for x, y in batches or self.training_batches(round):
            if self.device_class is not None and not losses:
                with SavedBytes(self.trainer.model) as saved:
                    losses.append(self.trainer.step(x, y))
                self._counts["saved"] = max(self._counts.get("saved", 0), saved.bytes)
            else:
                losses.append(self.trainer.step(x, y))
            self.samples_done += len(y)
            complete = stop is not None and len(losses) % length == 0
            if complete and stop.due(torch.stack(losses[-length:]).mean().item()):  # type: ignore[union-attr]
                break
        # One look at the end: a non-finite loss stays non-finite, and asking every step would stall a GPU.
        values = torch.stack(losses).tolist() if losses else [0.0]
        for step, value in enumerate(values):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss of client {self.id} became {value} in round {round + 1}, step {step + 1}; "
                    "a smaller training.lr or a training.max_grad_norm may help"
                )
        return math.fsum(values) / len(values), len(losses)

    def peak_bytes(self) -> int:
        """Bytes that the turn has held at its peak, by count: the model, a gradient and the optimiser's state for every
        parameter, and what the largest first step kept for its backward pass. Only where devices are modelled."""
        model = self.trainer.model
        tensors = [*model.parameters(), *model.buffers()]
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        copies = 1 + {"sgd": int(self.local.momentum > 0), "adam": 2, "adamw": 2}[self.local.optimizer]
        held = sum(t.numel() * t.element_size() for t in tensors) + copies * trained
        return held + int(self._counts.pop("saved", 0))

    def dense_macs(self) -> float:
        """Multiply-accumulates of a training step per sample, forward and backward, of the model without pruning."""
        if "dense macs" not in self._counts:
            x, y = self.train[torch.zeros(2, dtype=torch.int64)]
            counter = MaskedTrainer(copy.deepcopy(self.model), self.trainer.loss)
            counter.begin(SGDOptions(lr=0.0))
            counter.step(self.as_input(x), self.as_target(y))
            self._counts["dense macs"] = counter.finish().macs / 2
        return self._counts["dense macs"]

    def sgd_options(self, round: int) -> Options:
        """The trainer's options for a round."""
        return self.local.options_at(round)

    def on(self, key: Hashable, build: Callable[[nn.Module], nn.Module]) -> Client:
        """This client's turn on another model, with a trainer of its own.

        Args:
            key: of the other model in this process; who asks for it again gets the same one, with what is in it.
            build: makes it from a copy of ``model`` when it is first asked for.
        """
        if key not in self._others:
            other = build(copy.deepcopy(self.model))
            self._others[key] = other, self._make_trainer(other)
        turn = copy.copy(self)
        turn.model, turn.trainer = self._others[key]
        turn.layers = dict(threshold_layers(turn.model))
        return turn

    def _test_on(self, data: Samples) -> tuple[float, float]:
        losses, correct, batch_size = [], 0, self.evaluation_batch
        for start in range(0, len(data), batch_size):
            x, y = data[start : start + batch_size]
            loss, right = self.trainer.evaluate(self.as_input(x), self.as_target(y))
            losses.append(loss.item() / len(y))
            correct += int(right)
        return sum(losses) / len(losses), correct / len(data)

    def evaluate_model(
        self, train_data: bool, options: Options | None = None, densities: dict[str, float] | None = None
    ) -> tuple[Evaluation, TrainResult]:
        """Test ``model`` as it stands, on the test data and, if ``train_data``, on the training data.

        ``options`` and ``densities`` are the trainer's, for methods whose evaluations depend on them.
        """
        self.trainer.begin(options or self.sgd_options(0), densities=densities)
        counted = Confusion(self.objective.confusion) if self.objective.confusion else None
        if counted is not None:
            self.trainer.hits = counted.hits
        loss, accuracy = self._test_on(self.test)
        self.trainer.hits = self.objective.hits
        evaluation = Evaluation(len(self.test), loss, accuracy)
        if counted is not None:
            evaluation.confusion = counted.triples()
        if train_data:
            evaluation.train_accuracy = self._test_on(self.train)[1]
        return evaluation, self.trainer.finish()

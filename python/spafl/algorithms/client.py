"""One client as an algorithm sees it, and the local work that most algorithms share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spafl_kernels.functional import threshold_layers
from spafl_kernels.training import SGDOptions, Trainer, TrainResult

from .. import rng
from ..data import Transform


@dataclass(frozen=True)
class Samples:
    """Raw samples: ``x`` ``(n, channels, height, width)`` as stored, ``y`` ``(n,)`` int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class LocalTraining:
    """Settings of local SGD that all algorithms share (the ``[training]`` section)."""

    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    epochs: int
    lr_decay: float
    lr_floor: float
    max_grad_norm: float | None
    drop_last: bool
    shuffle: bool = True

    def lr_at(self, round: int) -> float:
        """Learning rate of a round: ``max(lr * lr_decay ** round, lr_floor)``."""
        return max(self.lr * self.lr_decay**round, self.lr_floor)


@dataclass
class Evaluation:
    """One client's test result; fractions in [0, 1]."""

    samples: int
    loss: float
    """Mean over batches of the mean loss of a batch, as published."""
    accuracy: float
    train_accuracy: float | None = None
    densities: dict[str, float] | None = None
    """Active share per threshold layer, or None for a model without."""
    first_layer: str | None = None
    """The first threshold layer's mask, one character 0 or 1 per filter."""
    changed: bool = False
    """Whether the evaluation changed the client's own tensors; otherwise they are not written back."""


class Client:
    """The client whose turn it is: its tensors are in ``model`` and ``memory``, in place.

    Attributes:
        id: number of the client, from 0.
        model: holds the client's own tensors while it is this client's turn.
        memory: the client's other tensors, by the names of ``Algorithm.client_state``; change them in place.
        train, test: the client's data.
        trainer: runs SGD steps on ``model``.
        local: shared settings of local training.
        macs: dense multiply-accumulates per sample of each layer (published counting: a linear layer counts once per
            sample, whatever the number of tokens).
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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.id = id
        self.model = model
        self.memory = memory
        self.train = train
        self.test = test
        self.trainer = trainer
        self.local = local
        self.macs = macs
        self.evaluation_batch = max(local.batch_size, 256)
        self._transform = transform
        self._seed = seed
        self._device = device
        self._dtype = dtype

    def stream(self, purpose: str, round: int) -> np.random.Generator:
        """This client's random numbers for a purpose in a round."""
        return rng.numpy_stream(self._seed, purpose, round, self.id)

    def as_input(self, x: Tensor) -> Tensor:
        """Raw images as the model takes them: on the device, normalised, not augmented."""
        return self._transform(x.to(self._device), self._dtype, None)

    def training_batches(self, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of all local epochs of a round: shuffled anew each epoch, augmented, normalised, on the device."""
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
        for _ in range(self.local.epochs):
            order = torch.from_numpy(shuffle.permutation(n)) if self.local.shuffle else torch.arange(n)
            for start in range(0, last, size):
                chosen = order[start : min(start + size, last)]
                x = self.train.x[chosen].to(self._device)
                yield self._transform(x, self._dtype, augment), self.train.y[chosen].to(self._device)

    def batches_per_epoch(self) -> int:
        """Number of batches of one local epoch."""
        n, size = len(self.train), self.local.batch_size
        return n // size if self.local.drop_last and n >= size else -(-n // size)

    def run_sgd(self, round: int) -> tuple[float, int]:
        """All local epochs with the trainer, which must have begun: ``(mean batch loss, steps)``.

        Raises:
            FloatingPointError: the loss of a batch is not finite; names the client and the round.
        """
        losses = [self.trainer.step(x, y) for x, y in self.training_batches(round)]
        values = torch.stack(losses) if losses else torch.zeros(1)
        # One look at the end: a non-finite loss stays non-finite, and asking every step would stall a GPU.
        if not torch.isfinite(values).all():
            step = int((~torch.isfinite(values)).nonzero()[0])
            raise FloatingPointError(
                f"the loss of client {self.id} became {values[step].item()} in round {round}, step {step}; "
                "a smaller training.lr or a training.max_grad_norm may help"
            )
        return values.double().mean().item(), len(losses)

    def sgd_options(self, round: int, penalty: float = 0.0, collapse_floor: float | None = None) -> SGDOptions:
        """The trainer's options for a round."""
        return SGDOptions(
            lr=self.local.lr_at(round),
            momentum=self.local.momentum,
            weight_decay=self.local.weight_decay,
            max_grad_norm=self.local.max_grad_norm,
            penalty=penalty,
            collapse_floor=collapse_floor,
        )

    def _test_on(self, data: Samples) -> tuple[float, float]:
        losses, correct, batch_size = [], 0, self.evaluation_batch
        for start in range(0, len(data), batch_size):
            x, y = data.x[start : start + batch_size], data.y[start : start + batch_size].to(self._device)
            loss, right = self.trainer.evaluate(self.as_input(x), y)
            losses.append(loss.item() / len(y))
            correct += int(right)
        return sum(losses) / len(losses), correct / len(data)

    def evaluate_model(
        self, train_data: bool, collapse_floor: float | None = None, densities: dict[str, float] | None = None
    ) -> tuple[Evaluation, TrainResult]:
        """Test ``model`` as it stands, on the test data and, if ``train_data``, on the training data.

        ``collapse_floor`` and ``densities`` are the guard's, which in the published code also acts here; the result
        holds the densities of the last forward pass.
        """
        self.trainer.begin(self.sgd_options(0, collapse_floor=collapse_floor), densities=densities)
        loss, accuracy = self._test_on(self.test)
        evaluation = Evaluation(len(self.test), loss, accuracy)
        if train_data:
            evaluation.train_accuracy = self._test_on(self.train)[1]
        result = self.trainer.finish()
        layers = list(threshold_layers(self.model))
        if layers:
            masks = {name: layer.mask() for name, layer in layers}
            evaluation.densities = {name: mask.double().mean().item() for name, mask in masks.items()}
            evaluation.first_layer = "".join("1" if active else "0" for active in masks[layers[0][0]].tolist())
        return evaluation, result

"""What clients learn: classes or numbers, by which loss, and what counts as right when they are tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Literal["cross-entropy", "mse", "mae", "huber"]

_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "mae": F.l1_loss,
    "huber": F.huber_loss,
}


@dataclass(frozen=True)
class Objective:
    """Settings of a run that its trainers and tests share.

    Attributes:
        loss: ``cross-entropy`` of classes; of numbers ``mse``, ``mae`` or ``huber`` (delta 1), each the mean over all
            entries.
        tolerance: of numbers: a prediction counts as right if each of its entries is at most so far from the target.
        confusion: number of classes if tests count what is taken for what, else 0.
    """

    loss: Loss = "cross-entropy"
    tolerance: float = 0.0
    confusion: int = 0

    @property
    def of_classes(self) -> bool:
        return self.loss == "cross-entropy"

    @property
    def function(self) -> Callable[[Tensor, Tensor], Tensor]:
        """``loss(outputs, targets)``, a scalar."""
        return _LOSSES[self.loss]

    def hits(self, out: Tensor, y: Tensor) -> Tensor:
        """Number of right predictions of a batch.

        Args:
            out: ``(n, outputs)``.
            y: ``(n,)`` classes, or ``(n, outputs)`` numbers.
        """
        if self.of_classes:
            return (out.argmax(dim=1) == y).sum()
        return ((out - y).abs() <= self.tolerance).all(dim=1).sum()


CLASSES = Objective()


class Confusion:
    """Counts a test's samples by class and predicted class.

    Args:
        classes: how many there are.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._counts = torch.zeros(classes * classes, dtype=torch.int64)

    def hits(self, out: Tensor, y: Tensor) -> Tensor:
        """As :meth:`Objective.hits`, of classes."""
        predicted = out.argmax(dim=1)
        pairs = (y * self._classes + predicted).cpu()
        self._counts += torch.bincount(pairs, minlength=len(self._counts))
        return (predicted == y).sum()

    def triples(self) -> list[list[int]]:
        """``[class, predicted class, how many]``, of those that occurred, in order."""
        found = self._counts.nonzero().flatten().tolist()
        return [[at // self._classes, at % self._classes, int(self._counts[at])] for at in found]

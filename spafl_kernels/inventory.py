"""A model's parameters and threshold layers by name, without a walk through the model at every look."""

from __future__ import annotations

from typing import Any

from torch import nn

from .functional import threshold_layers

__all__ = ["Inventory"]


class Inventory:
    """Walks the model once, and again in :meth:`refresh` if a module or a parameter was added, removed or replaced.

    A walk costs more than a small training step's bookkeeping; comparing identities costs a few microseconds.

    Attributes:
        parameters: as ``named_parameters`` gives them.
        thresholds: ``(name, layer)``, as :func:`~spafl_kernels.threshold_layers` gives them.
    """

    parameters: dict[str, nn.Parameter]
    thresholds: list[tuple[str, Any]]

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._walk()

    def refresh(self) -> bool:
        """True if the model was walked again because its modules or parameters are not what they were."""
        if all(_same(m._parameters, a) and _same(m._modules, b) for m, a, b in self._seen):
            return False
        self._walk()
        return True

    def _walk(self) -> None:
        self.parameters = dict(self.model.named_parameters())
        self.thresholds = list(threshold_layers(self.model))
        self._seen = [(m, dict(m._parameters), dict(m._modules)) for m in self.model.modules()]


def _same(now: dict[str, Any], then: dict[str, Any]) -> bool:
    """The same keys and the very same values; values are not compared, for tensors compare by element."""
    return len(now) == len(then) and all(name in now and now[name] is value for name, value in then.items())

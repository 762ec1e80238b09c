"""Layers whose weight is computed in every forward: masks that are sampled, scores, factors.

The compact engine runs their products as those of any layer, in models without threshold layers. It knows them by their
``forward``, so a subclass says what the weight is and leaves that alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ComputedConv2d", "ComputedLinear", "ComputedWeight", "plain_kind", "weight_of"]


class ComputedWeight(nn.Module):
    """What such layers have in common.

    Attributes:
        weight: a tensor, parameter or buffer, that only these methods read.
        bias: the same, or None.
    """

    weight: Tensor
    bias: Any

    def computed_weight(self) -> Tensor:
        """The weight of this forward, contiguous, with its graph; called once in each. Random numbers may be drawn."""
        raise NotImplementedError

    def computed_bias(self) -> Tensor | None:
        """The bias of this forward; by default ``bias``."""
        return self.bias  # type: ignore[no-any-return]

    def like(self) -> Tensor:
        """A tensor of the form that the weight has now, whatever is in it; by default ``weight``."""
        return self.weight


class ComputedConv2d(ComputedWeight, nn.Conv2d):
    """A convolution: ``(out, in / groups, *kernel)``."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.computed_weight(), self.computed_bias())


class ComputedLinear(ComputedWeight, nn.Linear):
    """A linear layer: ``(out, in)``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.computed_weight(), self.computed_bias())


_PLAIN: dict[type[ComputedWeight], type[nn.Module]] = {ComputedConv2d: nn.Conv2d, ComputedLinear: nn.Linear}


def weight_of(module: nn.Module) -> Tensor:
    """A tensor of the form that a layer's weight has, plain layers' own weight."""
    return module.like() if isinstance(module, ComputedWeight) else module.weight  # type: ignore[return-value]


def plain_kind(module: nn.Module) -> type[nn.Module] | None:
    """The plain layer that ``module`` is but for its weight; None if it is anything else."""
    for kind, plain in _PLAIN.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return plain
    return None

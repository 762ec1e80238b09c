"""Layers whose weight is computed in every forward: masks that are sampled, scores, factors.

The compact engine runs their products as those of any layer, in models without threshold layers. It knows them by their
``forward``, so a subclass says what the weight is and leaves that alone.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ComputedConv2d", "ComputedLinear", "ComputedWeight", "plain_kind"]


class ComputedWeight(nn.Module):
    """What such layers have in common.

    Attributes:
        weight: a tensor of the weight's shape and dtype, a parameter or a buffer; what is in it only
            :meth:`computed_weight` reads.
    """

    weight: Tensor

    def computed_weight(self) -> Tensor:
        """The weight of this forward, with its graph; called once in each. Random numbers may be drawn."""
        raise NotImplementedError


class ComputedConv2d(ComputedWeight, nn.Conv2d):
    """A convolution: ``(out, in / groups, *kernel)``."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.computed_weight(), self.bias)


class ComputedLinear(ComputedWeight, nn.Linear):
    """A linear layer: ``(out, in)``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.computed_weight(), self.bias)


_PLAIN: dict[type[ComputedWeight], type[nn.Module]] = {ComputedConv2d: nn.Conv2d, ComputedLinear: nn.Linear}


def plain_kind(module: nn.Module) -> type[nn.Module] | None:
    """The plain layer that ``module`` is but for its weight; None if it is anything else."""
    for kind, plain in _PLAIN.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return plain
    return None

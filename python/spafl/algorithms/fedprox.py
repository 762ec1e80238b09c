"""FedProx (Li et al., MLSys 2020): FedAvg whose clients are held near the global model.

A client minimises ``loss + mu / 2 * |w - w_global|^2``; everything else is FedAvg's.
"""

from __future__ import annotations

from pydantic import Field

from spafl_kernels.training import Extra

from ..wire import Message
from .aggregate import AggregationOptions
from .dense import proximal
from .fedavg import FedAvg


class FedProxOptions(AggregationOptions):
    """Settings of FedProx."""

    mu: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    """Strength of the proximal term; the paper tries .001, .01, .1 and 1."""


class FedProx(FedAvg):
    """FedAvg with a proximal term, whose gradient is clipped with the loss's."""

    Options = FedProxOptions
    options: FedProxOptions

    def extra(self, message: Message) -> Extra | None:
        return proximal(message, self.options.mu) if self.options.mu else None

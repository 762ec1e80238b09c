"""``torch.optim.SGD`` whose rates are tensors: a recorded step reads at each replay what they are then."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .optimisers import SGDOptions

__all__ = ["TensorSGD"]


class TensorSGD:
    """Plain SGD, with momentum or Nesterov's, as :class:`torch.optim.SGD` without dampening.

    Args:
        parameters: those that are trained, by name; on one device.
        thresholds: names of those that ``threshold_lr`` is for.
        momentum: a buffer for every parameter, by name, written in place; empty without momentum.
        options: all but the rates are read here.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        thresholds: Collection[str],
        momentum: Mapping[str, Tensor],
        options: SGDOptions,
    ) -> None:
        apart = [name for name in parameters if name in thresholds]
        self._groups = [name for name in parameters if name not in thresholds], apart
        self._parameters, self._momentum = parameters, momentum
        self._decay, self._factor, self._nesterov = options.weight_decay, options.momentum, options.nesterov
        first = next(iter(parameters.values()))
        self._rates = torch.zeros(2, dtype=first.dtype, device=first.device)

    def set_rates(self, options: SGDOptions) -> None:
        """Take the learning rates of these options; nothing waits."""
        for rate, value in zip(self._rates.unbind(), (options.lr, options.rate_of_thresholds), strict=True):
            rate.fill_(-value)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self._parameters.values():
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for names, rate in zip(self._groups, self._rates.unbind(), strict=True):
            moved = [name for name in names if self._parameters[name].grad is not None]
            if moved:
                self._move(moved, rate)

    def _move(self, names: list[str], rate: Tensor) -> None:
        parameters = [self._parameters[name] for name in names]
        steps: list[Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
        if self._decay:
            steps = list(torch._foreach_add(steps, parameters, alpha=self._decay))
        if self._factor:
            buffers = [self._momentum[name] for name in names]
            torch._foreach_mul_(buffers, self._factor)
            torch._foreach_add_(buffers, steps)
            steps = list(torch._foreach_add(steps, buffers, alpha=self._factor)) if self._nesterov else buffers
        torch._foreach_add_(parameters, torch._foreach_mul(steps, rate))

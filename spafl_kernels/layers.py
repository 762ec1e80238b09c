"""Drop-in layers: ``nn.Conv2d`` and ``nn.Linear`` with one trainable threshold per filter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import functional, reference
from .reference import Estimator


class ThresholdLayer:
    """What both layers share: the threshold parameter and the view of the filters it gives.

    ``isinstance(module, ThresholdLayer)`` finds every threshold layer of a model.
    """

    weight: Tensor
    bias: Any
    threshold: nn.Parameter
    estimator: Estimator
    mask_bias: bool
    # What the host knows of the density; see spafl_kernels.observe. Not part of the state: any value gives the same.
    known_density: float = 1.0

    def _init_threshold(self, estimator: Estimator, mask_bias: bool) -> None:
        reference.check_estimator(estimator)
        self.estimator = estimator
        self.mask_bias = mask_bias
        weight = self.weight
        self.threshold = nn.Parameter(torch.zeros(weight.shape[0], device=weight.device, dtype=weight.dtype))

    def reset_parameters(self) -> None:
        """Initialise as the plain layer does, and set every threshold to 0 (nothing pruned)."""
        super().reset_parameters()  # type: ignore[misc]
        # The plain layer's constructor calls this before the threshold exists.
        if "threshold" in self._parameters:  # type: ignore[attr-defined]
            nn.init.zeros_(self.threshold)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        given, errors = state_dict.get(f"{prefix}threshold"), rest[-1]
        if isinstance(given, Tensor) and not given.is_meta and not given.isfinite().all():
            wrong = (~given.isfinite()).nonzero().flatten().tolist()
            errors.append(f"{prefix}threshold must be finite; NaN or infinite at filters {wrong[:8]}")
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]

    @torch.no_grad()
    def scores(self) -> Tensor:
        """``mean|w|`` of every filter: ``(out,)``, no gradient."""
        return reference.filter_scores(self.weight)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Which filters are active now: bool, ``(out,)``."""
        return self.scores() > self.threshold

    def density(self) -> float:
        """Share of active filters, in [0, 1]."""
        return self.mask().double().mean().item()

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, estimator={self.estimator}"  # type: ignore[misc]
        return text + (", mask_bias=True" if self.mask_bias else "")


class ThresholdConv2d(ThresholdLayer, nn.Conv2d):
    """``nn.Conv2d`` whose filters are pruned, whole, while ``mean|w| <= threshold``.

    Args:
        estimator: straight-through rule of the comparison, ``"identity"`` (SpaFL, arXiv 2406.00431) or ``"window"``
            (the published CIFAR code).
        mask_bias: prune a filter's bias with it; by default a pruned filter still adds its bias.

    All other arguments, shapes and the state dict are those of :class:`torch.nn.Conv2d`; the state dict also holds
    ``threshold``, shape ``(out_channels,)``, initially 0.
    """

    def __init__(self, *args: Any, estimator: Estimator = "identity", mask_bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_threshold(estimator, mask_bias)

    def forward(self, input: Tensor) -> Tensor:
        padding: Any = self.padding
        stride: Any = self.stride
        dilation: Any = self.dilation
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.threshold_conv2d(
            input, self.weight, self.threshold, self.bias, stride, padding, dilation, self.groups,
            self.estimator, self.mask_bias, self.known_density,
        )  # fmt: skip


class ThresholdLinear(ThresholdLayer, nn.Linear):
    """``nn.Linear`` whose neurons are pruned, whole, while ``mean|w| <= threshold``.

    Args:
        estimator: straight-through rule of the comparison, ``"identity"`` (SpaFL, arXiv 2406.00431) or ``"window"``
            (the published CIFAR code).
        mask_bias: prune a neuron's bias with it; by default a pruned neuron still adds its bias.

    All other arguments, shapes and the state dict are those of :class:`torch.nn.Linear`; the state dict also holds
    ``threshold``, shape ``(out_features,)``, initially 0.
    """

    def __init__(self, *args: Any, estimator: Estimator = "identity", mask_bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_threshold(estimator, mask_bias)

    def forward(self, input: Tensor) -> Tensor:
        return functional.threshold_linear(
            input, self.weight, self.threshold, self.bias, self.estimator, self.mask_bias, self.known_density
        )

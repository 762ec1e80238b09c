"""What the threshold layers share, without what they compute: whoever looks at a model's filters needs no more."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import reference
from .reference import Estimator


class Selected(NamedTuple):
    """What a threshold pass made for a layer, on the device: its selection and its packed active filters."""

    selection: Tensor
    packed: Tensor


def check_layer(weight: Tensor, threshold: Tensor, estimator: str, transposed_groups: int | None = None) -> None:
    """The threshold of one layer, without clients; ``transposed_groups``: see :func:`spafl_kernels.reference.filters`.

    Raises:
        ValueError: unknown estimator, or a threshold of another shape, dtype or device than the weight asks for.
    """
    reference.check_estimator(estimator)
    filters = weight.shape[0] if transposed_groups is None else weight.shape[1] * transposed_groups
    if threshold.shape != (filters,):
        raise ValueError(
            f"threshold must have one value per filter: expected shape ({filters},) for a weight of shape "
            f"{tuple(weight.shape)}; got {tuple(threshold.shape)}"
        )
    if threshold.device != weight.device:
        raise ValueError(f"threshold is on {threshold.device} but weight is on {weight.device}")
    if threshold.dtype != weight.dtype:
        raise ValueError(f"threshold has dtype {threshold.dtype} but weight has {weight.dtype}")


class ThresholdLayer:
    """Base of the threshold layers: the threshold parameter and the view of the filters it gives.

    ``isinstance(module, ThresholdLayer)`` finds every threshold layer of a model.
    """

    weight: Tensor
    bias: Any
    threshold: nn.Parameter
    estimator: Estimator
    mask_bias: bool
    # What the host knows of the density; see spafl_kernels.observe. Not part of the state: any value gives the same.
    known_density: float = 1.0
    # Set by spafl_kernels.shared_pass while a forward of the whole model runs; None: the layer makes its own pass.
    selected: Selected | None = None

    def __init__(self, *args: Any, estimator: Estimator = "identity", mask_bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_threshold(estimator, mask_bias)

    def _init_threshold(self, estimator: Estimator, mask_bias: bool) -> None:
        reference.check_estimator(estimator)
        self.estimator = estimator
        self.mask_bias = mask_bias
        weight = self.weight
        count = reference.filters(weight.detach(), self.transposed_groups).shape[0]
        self.threshold = nn.Parameter(torch.zeros(count, device=weight.device, dtype=weight.dtype))

    @property
    def transposed_groups(self) -> int | None:
        """Where the filters lie in the weight, see :func:`spafl_kernels.reference.filters`."""
        return None

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
        return reference.filter_scores(self.weight, self.transposed_groups)

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

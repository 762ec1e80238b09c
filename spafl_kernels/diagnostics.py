"""Which implementation a layer runs, and why."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from . import backend
from .cpu import skip
from .gpu import choice
from .threshold_layer import ThresholdLayer

__all__ = ["explain"]


def explain(module: Any, x: Tensor) -> backend.Explanation:
    """Which implementation ``module(x)`` would use, and why; nothing is run.

    Args:
        module: a threshold layer. On a GPU the density it is judged by is ``module.known_density``: what
            :func:`spafl_kernels.observe` last saw; on a CPU its filters are looked at.
        x: an input of it.

    Raises:
        ValueError: ``module`` is not a threshold layer.
    """
    if not isinstance(module, ThresholdLayer):
        raise ValueError(f"module must be a threshold layer; got {type(module).__name__}")
    weight, density = module.weight, module.known_density
    if not weight.is_cuda:
        if getattr(module, "padding_mode", "zeros") != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)  # type: ignore[attr-defined]
        skips, reason = skip.explain(_layer(module), x, weight, module.threshold, module.bias)
        return backend.Explanation("narrow" if skips else "reference", reason)
    if isinstance(module, nn.ConvTranspose2d):
        return backend.Explanation("reference", choice.NO_TRANSPOSED, fallback=True)
    if isinstance(module, nn.Conv1d):
        (stride,), (dilation,), padding = module.stride, module.dilation, module.padding
        pads = padding if isinstance(padding, str) else (0, *padding)
        x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
        work = choice.conv_work(x, weight, (1, stride), pads, (1, dilation), density)
        return choice.choose(x, weight, module.groups, work)
    if isinstance(module, nn.Conv2d):
        work = choice.conv_work(x, weight, module.stride, module.padding, module.dilation, density)
        return choice.choose(x, weight, module.groups, work)
    return choice.choose(x, weight, 1, choice.linear_work(x, weight, density))


def _layer(module: Any) -> skip.Layer:
    """The layer as the CPU would compute it; asked about, not run."""

    def masked(*_: Any) -> Tensor:
        raise AssertionError("nothing is run")

    estimator, mask_bias = module.estimator, module.mask_bias
    if isinstance(module, nn.Linear):
        return skip.linear(masked, estimator, mask_bias)
    extra = module.output_padding if isinstance(module, nn.ConvTranspose2d) else None
    padding = module.padding if module.padding_mode == "zeros" else 0
    return skip.convolution(
        masked, module.weight, module.stride, padding, module.dilation, module.groups, estimator, mask_bias, extra,
    )  # fmt: skip

"""Which implementation a layer runs, and why."""

from __future__ import annotations

from torch import Tensor, nn

from .ops import backend
from .threshold_layer import ThresholdLayer

__all__ = ["explain"]


def explain(module: nn.Module, x: Tensor) -> backend.Explanation:
    """Which implementation ``module(x)`` would use, and why; nothing is run.

    Args:
        module: a threshold layer. The density it is judged by is ``module.known_density``: what
            :func:`spafl_kernels.observe` last saw.
        x: an input of it.

    Raises:
        ValueError: ``module`` is not a threshold layer.
    """
    if not isinstance(module, ThresholdLayer):
        raise ValueError(f"module must be a threshold layer; got {type(module).__name__}")
    weight, density = module.weight, module.known_density
    if not weight.is_cuda:
        reason = f"{weight.device.type} tensors run the dense operator on masked weights"
        return backend.Explanation("reference", reason)
    if isinstance(module, nn.ConvTranspose2d):
        return backend.Explanation("reference", backend.NO_TRANSPOSED, fallback=True)
    if isinstance(module, nn.Conv1d):
        (stride,), (dilation,), padding = module.stride, module.dilation, module.padding
        pads = padding if isinstance(padding, str) else (0, *padding)
        x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
        work = backend.conv_work(x, weight, (1, stride), pads, (1, dilation), density)
        return backend.choose(x, weight, module.groups, work)
    if isinstance(module, nn.Conv2d):
        work = backend.conv_work(x, weight, module.stride, module.padding, module.dilation, density)
        return backend.choose(x, weight, module.groups, work)
    return backend.choose(x, weight, 1, backend.linear_work(x, weight, density))

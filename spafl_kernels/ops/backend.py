"""Which implementation a layer uses, and why: nothing falls back without saying so.

``SPAFL_STRICT=1`` in the environment turns every fallback on a GPU into an error. On a CPU the masked reference is the
implementation, not a fallback. There is no automatic choice by density or shape: no timing on a GPU has been measured.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

Backend = Literal["reference", "triton"]
# Present does not mean imported: importing triton is left to the first kernel launch.
HAS_TRITON = importlib.util.find_spec("triton") is not None
LOWEST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The implementation a layer uses on an input (``backend``), and ``reason`` in words."""

    backend: Backend
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def strict() -> bool:
    """Whether ``SPAFL_STRICT`` is set to anything but 0 or nothing."""
    return os.environ.get("SPAFL_STRICT", "0") not in ("", "0")


def unsupported(input: Tensor, weight: Tensor, groups: int = 1) -> str | None:
    """Why the Triton kernels cannot run this layer on this GPU tensor, or None if they can."""
    if not HAS_TRITON:
        return "triton is not installed (pip install 'spafl-kernels[triton]')"
    if torch.version.hip is not None:
        return "the kernels are written for CUDA, this is a ROCm build of PyTorch"
    if groups != 1:
        return f"groups must be 1 for the packed kernels; got groups={groups}"
    for name, tensor in (("input", input), ("weight", weight)):
        if tensor.dtype not in DTYPES:
            return f"{name} must be float32, float16 or bfloat16 for the kernels; got {tensor.dtype}"
    if torch.cuda.is_available() and not torch.compiler.is_compiling():
        capability = torch.cuda.get_device_capability(input.device)
        if capability < LOWEST_CAPABILITY:
            return f"the kernels need compute capability 8.0 or newer; this device has {capability[0]}.{capability[1]}"
    return None


def decide(input: Tensor, weight: Tensor, groups: int = 1) -> Explanation:
    """The choice for one call; raises nothing and warns about nothing."""
    if not weight.is_cuda:
        return Explanation("reference", f"{weight.device.type} tensors run the dense operator on masked weights")
    reason = unsupported(input, weight, groups)
    if reason is not None:
        return Explanation("reference", reason)
    return Explanation("triton", "CUDA tensors run the packed kernels, which skip pruned filters")


_warned: set[str] = set()


def fall_back(reason: str) -> None:
    """Say, once per reason, that a layer on a GPU runs the dense operator; an error in strict mode.

    Raises:
        RuntimeError: ``SPAFL_STRICT`` is set.
    """
    message = f"a threshold layer on the GPU runs the dense operator on masked weights, without skipping: {reason}"
    if strict():
        raise RuntimeError(f"SPAFL_STRICT is set, and {message}")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(message, stacklevel=4)


def explain(module: nn.Module, x: Tensor) -> Explanation:
    """Which implementation ``module(x)`` would use, and why; nothing is run.

    Args:
        module: a threshold layer.
        x: an input of it.

    Raises:
        ValueError: ``module`` is not a threshold layer.
    """
    from ..layers import ThresholdLayer

    if not isinstance(module, ThresholdLayer):
        raise ValueError(f"module must be a ThresholdConv2d or a ThresholdLinear; got {type(module).__name__}")
    return decide(x, module.weight, getattr(module, "groups", 1))

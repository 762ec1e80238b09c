"""The choice between a compiled kernel and its twin, and how kernels come to a derivative.

The operators ``torch.ops.spafl.*`` of a CPU compute, and nothing more. Their derivatives are written once, in autograd
functions ``Direct...`` beside the checked functions, which call them. So do training engines that have checked
everything once: only after :func:`ready` has said yes; the operators themselves still refuse tensors that they cannot
read. ``torch.compile`` traces these functions; under transforms of ``torch.func`` the checked ones take the twin.

Nothing is registered with the dispatcher beyond shapes: a derivative there is Python around every call of the kernel,
also of those without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import native

# What ``backend`` asks of an operator: the compiled kernel, its twin, or whichever applies.
Kernel = Literal["auto", "native", "torch"]

_FLOATS = (torch.float32, torch.float64)

# Functions that give the compiled operators their shapes for tracing; run once, after loading.
_registrations: list[Callable[[], None]] = []


def registers(function: Callable[[], None]) -> Callable[[], None]:
    """Decorator: run this once, as soon as the extension is loaded."""
    _registrations.append(function)
    return function


def ready() -> bool:
    """True if the compiled operators can be used and traced. Loads them on the first call."""
    if not native.available():
        return False
    while _registrations:
        _registrations.pop()()
    return True


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: three seconds for everybody.
ready._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(*tensors: Tensor) -> str | None:
    """Why no CPU kernel serves these tensors, or None: they must be dense, on the CPU, and all float32 or float64."""
    if torch._C._are_functorch_transforms_active():
        return "the kernels' derivatives are not for transforms of torch.func"
    dtype = tensors[0].dtype
    if dtype not in _FLOATS:
        return f"the kernels take float32 and float64, not {dtype}"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"the kernels run on the CPU, not on {tensor.device}"
        if tensor.dtype != dtype:
            return f"the tensors have different dtypes, {dtype} and {tensor.dtype}"
        if tensor.layout != torch.strided:
            return f"the kernels take dense tensors, not {tensor.layout}"
    return None


def check_channels(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse a convolution whose weight ``(out, in, ...)`` or bias does not fit its input ``(N, in, ...)``.

    Raises:
        ValueError: says what was expected and what was given.
    """
    if input.shape[1] != weight.shape[1]:
        raise ValueError(f"weight expects {weight.shape[1]} input channels but input has {input.shape[1]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}")


def use_native(op: str, backend: str, reason: Callable[[], str | None]) -> bool:
    """True for the compiled kernel. ``reason()`` says why it does not apply, or None; asked only if it matters.

    Raises:
        ValueError: ``backend`` is unknown.
        RuntimeError: ``backend="native"`` and the kernel cannot be used.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        return ready() and reason() is None
    if backend != "native":
        raise ValueError(f"backend must be one of {', '.join(get_args(Kernel))}; got {backend!r}")
    problem = reason() if ready() else native.why_not()
    if problem:
        raise RuntimeError(f"{op}: backend='native' cannot be used: {problem}")
    return True

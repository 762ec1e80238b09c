"""Convolution, ReLU and max-pool in one pass, for layers with few input channels; and ReLU with max-pool.

A first layer has so few multiply-adds per output that a general convolution spends its time elsewhere, and its output
is the largest activation of the network. The fused kernel writes only the pooled map, and its backward pass visits only
the pool winners that ReLU lets through, 1 / pool^2 of the positions at most. The gradients are those of
``max_pool2d(relu(conv2d(x)))``: the first of equal values wins, relu'(0) = 0, NaN is carried on. (Only where the input
is not finite can the weight gradients differ: the dense operators also compute 0 * inf = NaN at positions without
gradient, which are never visited here.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

from . import compiled
from .compiled import Kernel

# What the kernel accepts, and up to where "auto" takes it: the gain is in small channel counts (forward and backward
# against torch, measured: 2 -> 5 channels x0.40, 10 -> 25 x0.44, 16 -> 32 x0.66, 20 -> 50 x0.42; 32 -> 32 about equal).
KERNEL_IN_CHANNELS = 64
MAX_IN_CHANNELS = 24
MAX_KERNEL = 11
POOLS = (2, 3)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _check(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: int | tuple[int, int], pool: int
) -> tuple[int, int]:
    if input.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            "input and weight must have 4 dimensions, (N, in, H, W) and (out, in, kH, kW); got shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    compiled.check_channels(input, weight, bias)
    if pool not in POOLS:
        raise ValueError(f"pool must be 2 or 3; got {pool!r}")
    pad_h, pad_w = _pair(padding)
    if pad_h < 0 or pad_w < 0:
        raise ValueError(f"padding must not be negative; got {padding!r}")
    for size, pad, kernel, name in ((2, pad_h, 2, "height"), (3, pad_w, 3, "width")):
        if input.shape[size] + 2 * pad - weight.shape[kernel] + 1 < pool:
            raise ValueError(
                f"input {name} {input.shape[size]} is too small for kernel {weight.shape[kernel]}, padding {pad} and "
                f"pool {pool}"
            )
    return pad_h, pad_w


def _unsupported(input: Tensor, weight: Tensor, bias: Tensor | None, backend: Kernel) -> str | None:
    if backend == "auto" and weight.shape[1] > MAX_IN_CHANNELS:
        return f"it pays up to {MAX_IN_CHANNELS} input channels, not {weight.shape[1]}"
    if weight.shape[1] > KERNEL_IN_CHANNELS:
        return f"the kernel takes up to {KERNEL_IN_CHANNELS} input channels, not {weight.shape[1]}"
    if max(weight.shape[2:]) > MAX_KERNEL:
        return f"the kernel takes kernels up to {MAX_KERNEL}x{MAX_KERNEL}, not {tuple(weight.shape[2:])}"
    if 0 in weight.shape:
        return "the weight is empty"
    return compiled.unsupported(input, weight, *(() if bias is None else (bias,)))


def conv_relu_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | tuple[int, int] = 0,
    pool: int = 2,
    backend: Kernel = "auto",
) -> Tensor:
    """``max_pool2d(relu(conv2d(input, weight, bias, padding=padding)), pool)``, differentiable.

    Args:
        input: ``(N, in, H, W)``.
        weight: ``(out, in, kH, kW)``, dtype of ``input``. Stride and dilation are 1.
        bias: ``(out,)`` or None.
        padding: zeros on each side, one number or ``(vertical, horizontal)``.
        pool: 2 or 3; window and stride of the pooling, rows and columns that fill no window are dropped.
        backend: see :mod:`spafl_kernels.ops`. The compiled kernel serves float32 and float64 on the CPU, ``in`` up to
            64, kernels up to 11x11; ``"auto"`` takes it for ``in`` up to 24.

    Returns:
        ``(N, out, H', W')`` with ``H' = (H + 2 padding - kH + 1) // pool``.

    Raises:
        ValueError: shapes that do not fit, a pool other than 2 or 3, an input smaller than one window.
        RuntimeError: ``backend="native"`` where the kernel cannot be used.
    """
    pad_h, pad_w = _check(input, weight, bias, padding, pool)
    if compiled.use_native("conv_relu_pool", backend, lambda: _unsupported(input, weight, bias, backend)):
        return DirectConvReluPool.apply(
            input.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), pad_h, pad_w, pool
        )
    return F.max_pool2d(F.relu(F.conv2d(input, weight, bias, padding=(pad_h, pad_w))), pool)


def relu_pool(input: Tensor, pool: int = 2, backend: Kernel = "auto") -> Tensor:
    """``max_pool2d(relu(input), pool)``, differentiable.

    Args:
        input: ``(N, C, H, W)``.
        pool: 2 or 3; window and stride.
        backend: see :mod:`spafl_kernels.ops`. The compiled kernel serves float32 and float64 on the CPU.

    Returns:
        ``(N, C, H // pool, W // pool)``.

    Raises:
        ValueError: not four dimensions, a pool other than 2 or 3, an input smaller than one window.
        RuntimeError: ``backend="native"`` where the kernel cannot be used.
    """
    if input.dim() != 4:
        raise ValueError(f"input must have 4 dimensions, (N, C, H, W); got shape {tuple(input.shape)}")
    if pool not in POOLS:
        raise ValueError(f"pool must be 2 or 3; got {pool!r}")
    if min(input.shape[2:]) < pool:
        raise ValueError(f"input of {input.shape[2]}x{input.shape[3]} is too small for pool {pool}")
    if compiled.use_native("relu_pool", backend, lambda: compiled.unsupported(input)):
        return DirectReluPool.apply(input.contiguous(), pool)
    return F.max_pool2d(F.relu(input), pool)


class DirectConvReluPool(torch.autograd.Function):
    """``DirectConvReluPool.apply(input, weight, bias, pad_h, pad_w, pool)``: the compiled kernel and its derivative,
    see :mod:`spafl_kernels.cpu.compiled`.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, pad_h: int, pad_w: int, pool: int
    ) -> Tensor:
        output, argmax = torch.ops.spafl.conv_relu_pool(input, weight, bias, pad_h, pad_w, pool)
        ctx.save_for_backward(input, weight, argmax)
        ctx.options, ctx.with_bias = (pad_h, pad_w, pool), bias is not None
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (input, weight, argmax), options = ctx.saved_tensors, ctx.options
        spafl, grad = torch.ops.spafl, grad_outputs[0].contiguous()
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = spafl.conv_relu_pool_grad_input(grad, input, weight, argmax, *options)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = spafl.conv_relu_pool_grad_weight(grad, input, weight, argmax, *options)
        return grad_input, grad_weight, grad_bias if ctx.with_bias else None, None, None, None


class DirectReluPool(torch.autograd.Function):
    """``DirectReluPool.apply(input, pool)``: the compiled kernel and its derivative."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, pool: int) -> Tensor:
        output, argmax = torch.ops.spafl.relu_pool(input, pool)
        ctx.save_for_backward(argmax)
        ctx.options = (*input.shape[2:], pool)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (argmax,) = ctx.saved_tensors
        return torch.ops.spafl.relu_pool_grad(grad_outputs[0].contiguous(), argmax, *ctx.options), None


@compiled.registers
def _register() -> None:
    """Shapes for tracing."""

    @library.register_fake("spafl::conv_relu_pool")
    def _(input: Tensor, weight: Tensor, bias: Tensor | None, pad_h: int, pad_w: int, pool: int) -> Any:
        height = (input.shape[2] + 2 * pad_h - weight.shape[2] + 1) // pool
        width = (input.shape[3] + 2 * pad_w - weight.shape[3] + 1) // pool
        shape = (input.shape[0], weight.shape[0], height, width)
        return input.new_empty(shape), input.new_empty(shape, dtype=torch.uint8)

    @library.register_fake("spafl::conv_relu_pool_grad_weight")
    def _(grad: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, pad_h: int, pad_w: int, pool: int) -> Any:
        return torch.empty_like(weight), weight.new_empty(weight.shape[0])

    @library.register_fake("spafl::conv_relu_pool_grad_input")
    def _(grad: Tensor, input: Tensor, weight: Tensor, argmax: Tensor, pad_h: int, pad_w: int, pool: int) -> Any:
        return torch.empty_like(input)

    @library.register_fake("spafl::relu_pool")
    def _(input: Tensor, pool: int) -> Any:
        shape = (*input.shape[:2], input.shape[2] // pool, input.shape[3] // pool)
        return input.new_empty(shape), input.new_empty(shape, dtype=torch.uint8)

    @library.register_fake("spafl::relu_pool_grad")
    def _(grad: Tensor, argmax: Tensor, height: int, width: int, pool: int) -> Any:
        return grad.new_empty((*grad.shape[:2], height, width))

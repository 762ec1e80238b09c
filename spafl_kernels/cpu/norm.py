"""BatchNorm and ReLU in one operator, with or without the max-pool behind them.

PyTorch passes over the activation for the mean, the variance, the normalised values and ReLU, and in the gradient for
ReLU, the sums and the input's gradient. The compiled kernel reads it twice and writes it once in each direction, in
NCHW and in channels-last order, and keeps nothing but the statistics: ReLU's sign and the winners of the pool are
computed again from the input. relu'(0) = 0, the first of equal values wins, NaN is carried on. (Only where the input is
not finite can the gradients of a pooled call differ: the dense operators also compute 0 * inf = NaN at positions that
did not win.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

from . import compiled
from .compiled import Kernel

# Pooled calls want their channels in blocks of this many.
POOL_CHANNELS = 8
POOLS = (1, 2, 3)


def _check(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    pool: int,
) -> None:
    if not 2 <= input.dim() <= 4:
        raise ValueError(f"input must have 2 to 4 dimensions, (N, C, ...); got shape {tuple(input.shape)}")
    channels = input.shape[1]
    for name, tensor in (("running_mean", mean), ("running_var", var), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},); got {tuple(tensor.shape)}")
    if (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must both be tensors or both be None")
    if mean is None and not training:
        raise ValueError("running_mean and running_var are needed unless training=True")
    if training and input.numel() == channels:
        raise ValueError(f"training needs more than 1 value per channel; got input of shape {tuple(input.shape)}")
    if pool not in POOLS:
        raise ValueError(f"pool must be 1 (none), 2 or 3; got {pool!r}")
    if pool > 1 and (input.dim() != 4 or min(input.shape[2:]) < pool):
        raise ValueError(f"pool {pool} needs an input (N, C, H, W) of that size at least; got {tuple(input.shape)}")


def pools(input: Tensor, pool: int) -> bool:
    """Whether the kernel takes the pooling in: channels last, 8, 16, ... channels, sides that are multiples of it."""
    return (
        input.dim() == 4
        and input.shape[1] % POOL_CHANNELS == 0
        and input.shape[2] % pool == 0
        and input.shape[3] % pool == 0
        and input.is_contiguous(memory_format=torch.channels_last)
        and not input.is_contiguous()
    )


def _unsupported(
    input: Tensor, pool: int, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> str | None:
    if input.numel() == 0:
        return "the input is empty"
    if any(t is not None and not t.is_contiguous() for t in (mean, var)):
        return "the running statistics, which it updates in place, are not contiguous"
    if pool > 1 and not pools(input, pool):
        return (
            f"with a pool the kernel takes channels-last inputs of {POOL_CHANNELS}, {2 * POOL_CHANNELS}, ... channels, "
            f"their sides multiples of {pool}"
        )
    return compiled.unsupported(input, *(t for t in (mean, var, weight, bias) if t is not None))


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: int = 1,
    backend: Kernel = "auto",
) -> Tensor:
    """``relu(batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps))``, differentiable;
    and ``max_pool2d(..., pool)`` of it.

    Args:
        input: ``(N, C)``, ``(N, C, L)`` or ``(N, C, H, W)``; the last also in channels-last order, which is kept.
        running_mean: ``(C,)`` or None. With ``training`` it is updated in place, else it takes the batch's place.
        running_var: ``(C,)`` or None, as ``running_mean``; the update takes the unbiased variance.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        training: normalise by the statistics of the batch.
        momentum: share of the batch in the update of the running statistics.
        eps: added to the variance.
        pool: 2 or 3; window and stride of the pooling. 1: none.
        backend: see :mod:`spafl_kernels.ops`. The compiled kernel serves float32 and float64 on the CPU; with a pool,
            where :func:`pools` says so.

    Returns:
        A tensor like ``input``; with a pool, ``(N, C, H // pool, W // pool)``.

    Raises:
        ValueError: shapes that do not fit; one of the running statistics without the other, or none in eval;
            ``training`` with one value per channel; a pool other than 1, 2 or 3, or larger than the input.
        RuntimeError: ``backend="native"`` where the kernel cannot be used.
    """
    _check(input, running_mean, running_var, weight, bias, training, pool)
    reason = lambda: _unsupported(input, pool, running_mean, running_var, weight, bias)  # noqa: E731
    if not compiled.use_native("batch_norm_relu", backend, reason):
        return _torch(input, running_mean, running_var, weight, bias, training, momentum, eps, pool)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    return DirectBatchNormRelu.apply(input, running_mean, running_var, weight, bias, training, momentum, eps, pool)


def _torch(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    pool: int,
) -> Tensor:
    output = F.relu(F.batch_norm(input, mean, var, weight, bias, training, momentum, eps))
    return output if pool == 1 else F.max_pool2d(output, pool)


class DirectBatchNormRelu(torch.autograd.Function):
    """``DirectBatchNormRelu.apply(input, running_mean, running_var, weight, bias, training, momentum, eps, pool)``: the
    compiled kernel and its derivative, see :mod:`spafl_kernels.cpu.compiled`.

    ``input`` must not be empty, have more than one value per channel in training, and with a pool be one that
    :func:`pools` takes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        pool: int,
    ) -> Tensor:
        spafl, input = torch.ops.spafl, _dense(input)
        if training:
            output, stats = spafl.batch_norm_relu_train(
                input, weight, bias, running_mean, running_var, momentum, eps, pool
            )
        else:
            output, stats = spafl.batch_norm_relu(input, weight, bias, running_mean, running_var, eps, pool)
        ctx.save_for_backward(input, weight, bias, stats)
        ctx.training, ctx.eps, ctx.pool = training, eps, pool
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        grad, (input, weight, bias, stats) = grad_outputs[0], ctx.saved_tensors
        if torch.is_grad_enabled():
            # A graph of the gradient is wanted: PyTorch's operators make it.
            given = [t for t in (input, weight, bias) if t is not None and t.requires_grad]
            mean, var = (None, None) if ctx.training else (stats[0], stats[2])
            output = _torch(input, mean, var, weight, bias, ctx.training, 0.0, ctx.eps, ctx.pool)
            found = iter(torch.autograd.grad(output, given, grad, create_graph=True))
            dx, dw, db = (next(found) if t is not None and t.requires_grad else None for t in (input, weight, bias))
        else:
            order = torch.contiguous_format if input.is_contiguous() else torch.channels_last
            dx, dw, db = torch.ops.spafl.batch_norm_relu_grad(
                grad.contiguous(memory_format=order), input, weight, bias, stats, ctx.training, ctx.pool
            )
            dw, db = None if weight is None else dw, None if bias is None else db
        return dx, None, None, dw, db, None, None, None, None


def _dense(input: Tensor) -> Tensor:
    """``input``, or a copy of it in an order that the kernel reads."""
    if input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)):
        return input
    return input.contiguous()


@compiled.registers
def _register() -> None:
    """Shapes for tracing."""

    def forward(input: Tensor, *rest: Any) -> Any:
        stats, pool = input.new_empty(3, input.shape[1]), rest[-1]
        if pool == 1:
            return torch.empty_like(input), stats
        n, c, h, w = input.shape
        return input.new_empty(n, h // pool, w // pool, c).permute(0, 3, 1, 2), stats

    for name in ("batch_norm_relu", "batch_norm_relu_train"):
        library.register_fake(f"spafl::{name}", forward)

    @library.register_fake("spafl::batch_norm_relu_grad")
    def _(
        grad: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        training: bool,
        pool: int,
    ) -> Any:
        return torch.empty_like(input), input.new_empty(input.shape[1]), input.new_empty(input.shape[1])

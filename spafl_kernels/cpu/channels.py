"""Compact channels put back among all channels, onto a tensor of full width if there is one, in one pass.

A residual stream has all channels, the layers that write to it only some. Expanding with torch's operators takes a pass
for the constants, one for the copy and one for the sum; ``index_add`` takes one per channel where channels are last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from . import compiled
from .compiled import Kernel


def _check(
    input: Tensor, kept: Tensor, width: int, dim: int, constants: Tensor | None, stream: Tensor | None
) -> tuple[int, ...]:
    """Shape of the result."""
    if not 0 <= dim < input.dim():
        raise ValueError(f"dim must be in [0, {input.dim()}); got {dim!r}")
    if kept.dim() != 1 or kept.dtype != torch.int64:
        raise ValueError(f"kept must be a vector of int64; got shape {tuple(kept.shape)} of {kept.dtype}")
    count = len(kept)
    if not max(count, 1) <= input.shape[dim]:
        raise ValueError(f"input has {input.shape[dim]} channels; kept names {count}, and one at least must be there")
    if count and (int(kept[0]) < 0 or int(kept[-1]) >= width or bool((kept[1:] <= kept[:-1]).any())):
        raise ValueError(f"kept must ascend within [0, {width}); got {kept.tolist()}")
    if constants is not None and constants.shape != (width - count,):
        raise ValueError(f"constants must have shape ({width - count},); got {tuple(constants.shape)}")
    shape = (*input.shape[:dim], width, *input.shape[dim + 1 :])
    if stream is not None and stream.shape != shape:
        raise ValueError(f"stream must have shape {shape}; got {tuple(stream.shape)}")
    return shape


def expand_channels(
    input: Tensor,
    kept: Tensor,
    width: int,
    dim: int = 1,
    constants: Tensor | None = None,
    stream: Tensor | None = None,
    backend: Kernel = "auto",
) -> Tensor:
    """``stream`` plus ``input`` in its channels and ``constants`` in the others, differentiable.

    Args:
        input: ``(..., stored, ...)``: along ``dim`` the kept channels, then any number of channels that are not read.
        kept: ``(K,)``, int64, ascending: which channel each of the first ``K`` stored ones is.
        width: number of channels of the result.
        dim: the channel dimension, counted from the front.
        constants: ``(width - K,)``: what the channels that are not stored hold at every position, ascending; None: 0.
        stream: shape of the result; None: 0.
        backend: see :mod:`spafl_kernels.ops`. The compiled kernel serves float32 and float64 on the CPU.

    Returns:
        ``(..., width, ...)``; channels-last where a 4-dimensional ``input`` is (and not contiguous), else contiguous.

    Raises:
        ValueError: shapes that do not fit, ``kept`` not ascending or out of range.
        RuntimeError: ``backend="native"`` where the kernel cannot be used.
    """
    shape = _check(input, kept, width, dim, constants, stream)
    tensors = [t for t in (input, constants, stream) if t is not None]
    if compiled.use_native("expand_channels", backend, lambda: compiled.unsupported(*tensors)):
        c = None if constants is None else constants.contiguous()
        return DirectExpandChannels.apply(input, kept.contiguous(), width, dim, c, stream)
    if constants is None:
        base = input.new_zeros(shape)
    else:
        dropped = torch.ones(width, dtype=torch.bool, device=input.device).index_fill(0, kept, False)
        row = constants.new_zeros(width).masked_scatter(dropped, constants)
        base = row.view([-1 if d == dim else 1 for d in range(input.dim())]).expand(shape).contiguous()
    out = base.index_copy(dim, kept, input.narrow(dim, 0, len(kept)))
    if is_channels_last(input):
        out = out.contiguous(memory_format=torch.channels_last)
    return out if stream is None else stream + out


class DirectExpandChannels(torch.autograd.Function):
    """``DirectExpandChannels.apply(input, kept, width, dim, constants, stream)``: the compiled kernel and its
    derivative, see :mod:`spafl_kernels.cpu.compiled`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        kept: Tensor,
        width: int,
        dim: int,
        constants: Tensor | None,
        stream: Tensor | None,
    ) -> Tensor:
        order = _order(input, dim)
        ctx.save_for_backward(kept)
        ctx.options = input.shape[dim], dim, constants is not None
        ctx.set_materialize_grads(False)
        base = None if stream is None else stream.contiguous(memory_format=order)
        x = input.contiguous(memory_format=order)
        return torch.ops.spafl.expand_channels(x, kept, width, dim, constants, base)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        (grad,) = grad_outputs
        if grad is None:
            return (None,) * 6
        (kept,), (stored, dim, constants) = ctx.saved_tensors, ctx.options
        input_grad = constant_grad = None
        constants = constants and ctx.needs_input_grad[4]
        if constants or ctx.needs_input_grad[0]:
            dense = grad.contiguous(memory_format=_order(grad, dim))
            input_grad, constant_grad = torch.ops.spafl.collect_channels(dense, kept, stored, dim, constants)
        stream_grad = grad if ctx.needs_input_grad[5] else None
        return input_grad, None, None, None, constant_grad if constants else None, stream_grad


class DirectCollectChannels(torch.autograd.Function):
    """``DirectCollectChannels.apply(input, kept, stored, dim)``: the channels ``kept``, then zeros up to ``stored``
    channels; the reverse of :class:`DirectExpandChannels`, and for the same callers.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, kept: Tensor, stored: int, dim: int) -> Tensor:
        ctx.kept, ctx.options = kept, (input.shape[dim], dim)
        dense = input.contiguous(memory_format=_order(input, dim))
        return torch.ops.spafl.collect_channels(dense, kept, stored, dim, False)[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,), (width, dim) = grad_outputs, ctx.options
        dense = grad.contiguous(memory_format=_order(grad, dim))
        return torch.ops.spafl.expand_channels(dense, ctx.kept, width, dim, None, None), None, None, None


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` is an image in channels-last order and not at the same time in the usual one."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _order(x: Tensor, dim: int) -> torch.memory_format:
    """The order in which the kernels take and return a tensor."""
    return torch.channels_last if dim == 1 and is_channels_last(x) else torch.contiguous_format


@compiled.registers
def _register() -> None:
    """Shapes for tracing."""

    def resized(x: Tensor, dim: int, size: int) -> Tensor:
        shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_order(x, dim))

    @library.register_fake("spafl::expand_channels")
    def _(input: Tensor, kept: Tensor, width: int, dim: int, constants: Tensor | None, stream: Tensor | None) -> Tensor:
        return resized(input, dim, width)

    @library.register_fake("spafl::collect_channels")
    def _(grad: Tensor, kept: Tensor, stored: int, dim: int, constants: bool) -> Any:
        dropped = grad.shape[dim] - kept.shape[0]
        return resized(grad, dim, stored), grad.new_empty((dropped if constants else 0,))

"""Convolution of channels-last images with a lane per image, for layers with few channels.

A general convolution computes channels in blocks as wide as a vector: with 8 channels and 16 lanes half of the work is
for nothing. Here a vector holds one number each of 16 images instead (float32, AVX-512), whatever the number of
channels, and of padded channels only those that are used cost anything. It pays while channels are few, see
:func:`image_passes`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.nn import functional as F

from .. import native
from . import compiled
from .compiled import Kernel


class Passes(NamedTuple):
    """Which passes of a convolution the kernel takes."""

    forward: bool
    grad_input: bool
    grad_weight: bool


class _Rule(NamedTuple):
    """Where a pass takes less time than oneDNN's: where ``share`` of the channels that oneDNN computes, in blocks of
    ``block`` (input, output) channels, is all that is used; and up to ``small`` channels, where oneDNN is slow."""

    block: tuple[int, int]
    share: float
    small: tuple[int, int]


# By instruction set, a rule per pass. Measured with 1x1, 3x3 and 5x5 kernels, batch 16, maps of 4x4 to 32x32 and up to
# _MOST channels (docs/decisions/native-cpu.md).
_RULES = {
    "avx512": (
        _Rule((8, 16), 0.9, (32, 16)),
        _Rule((16, 8), 0.9, (16, 32)),
        _Rule((8, 16), 0.65, (14, 14)),
    ),
    "avx2": (
        _Rule((8, 8), 0.8, (16, 8)),
        _Rule((8, 8), 0.8, (8, 16)),
        _Rule((8, 8), 0.65, (7, 7)),
    ),
}
_MOST = 256
_LANES = {"avx512": 64, "avx2": 32}  # bytes
_NONE, _ALL = Passes(False, False, False), Passes(True, True, True)


def _pays(rule: _Rule, channels: tuple[int, int]) -> bool:
    if all(n <= most for n, most in zip(channels, rule.small)):
        return True
    share = 1.0
    for n, block in zip(channels, rule.block):
        if n > 4:  # the few channels of an image are not rounded up
            share *= n / (-(-n // block) * block)
    return share <= rule.share and max(channels) <= _MOST


def image_passes(batch: int, in_channels: int, out_channels: int, dtype: torch.dtype) -> Passes:
    """The passes for which the kernel pays, by the numbers of *used* channels; none where images leave lanes empty.

    Args:
        batch: number of images. Its last vector must be nearly full: seven eighths of all lanes.
        in_channels, out_channels: the used channels.
        dtype: of the tensors; float32 or float64.
    """
    isa = native.cpu_isa()
    if isa not in _RULES or dtype not in (torch.float32, torch.float64):
        return _NONE
    lanes = _LANES[isa] // dtype.itemsize
    if batch * 8 < -(-batch // lanes) * lanes * 7:
        return _NONE
    return Passes(*(_pays(rule, (in_channels, out_channels)) for rule in _RULES[isa]))


def _check(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    if input.dim() != 4 or weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            "input and weight must have 4 dimensions, (N, in, H, W) and (out, in, kH, kW), and weight at least 1 "
            f"element; got shapes {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    compiled.check_channels(input, weight, bias)
    if min(stride) < 1:
        raise ValueError(f"stride must be positive; got {stride!r}")
    if min(padding) < 0:
        raise ValueError(f"padding must not be negative; got {padding!r}")
    for size, pad, kernel in zip(input.shape[2:], padding, weight.shape[2:]):
        if size + 2 * pad < kernel:
            raise ValueError(f"input of {tuple(input.shape[2:])} is too small for this kernel and padding")


def image_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    used: tuple[int, int] | None = None,
    backend: Kernel = "auto",
) -> Tensor:
    """``conv2d(input, weight, bias, stride, padding)`` in channels-last order, differentiable.

    Args:
        input: ``(N, in, H, W)``, of any memory order; channels-last is not copied.
        weight: ``(out, in, kH, kW)``, dtype of ``input``. Dilation is 1.
        bias: ``(out,)`` or None.
        stride, padding: ``(vertical, horizontal)``.
        used: how many of the input and output channels count, from the front. The other input channels are taken as 0,
            the other output channels are 0, and no gradient reaches them or their weights.
        backend: see :mod:`spafl_kernels.ops`. The compiled kernel serves float32 and float64 on the CPU; ``"auto"``
            takes it where :func:`image_passes` says that all passes gain.

    Returns:
        ``(N, out, H', W')``, channels-last, with ``H' = (H + 2 padding - kH) // stride + 1``.

    Raises:
        ValueError: shapes that do not fit, a stride below 1, negative padding, ``used`` out of range.
        RuntimeError: ``backend="native"`` where the kernel cannot be used.
    """
    _check(input, weight, bias, stride, padding)
    if used is None:
        used = weight.shape[1], weight.shape[0]
    if not (1 <= used[0] <= weight.shape[1] and 1 <= used[1] <= weight.shape[0]):
        raise ValueError(f"used must be within (1, 1) and {(weight.shape[1], weight.shape[0])}; got {used!r}")

    def unsupported() -> str | None:
        if backend == "auto" and not all(image_passes(input.shape[0], *used, input.dtype)):
            return f"it does not pay for a batch of {input.shape[0]} and {used[0]} to {used[1]} channels"
        return compiled.unsupported(input, weight, *(() if bias is None else (bias,)))

    if compiled.use_native("image_conv", backend, unsupported):
        x = input.contiguous(memory_format=torch.channels_last)
        b = None if bias is None else bias.contiguous()
        return DirectImageConv.apply(x, weight.contiguous(), b, stride, padding, used, _ALL)
    i, o = used
    b = None if bias is None else bias[:o]
    y = F.conv2d(input[:, :i], weight[:o, :i], b, stride, padding)
    return F.pad(y, (0, 0, 0, 0, 0, weight.shape[0] - o)).contiguous(memory_format=torch.channels_last)


class DirectImageConv(torch.autograd.Function):
    """``DirectImageConv.apply(input, weight, bias, stride, padding, used, passes)``: the compiled kernel and its
    derivative, see :mod:`spafl_kernels.cpu.compiled`; torch's convolution in the passes that are not the kernel's.

    Where some are not, unused channels of ``input``, ``weight`` and ``bias`` must be 0, so that all compute the same.

    Args:
        input: ``(N, in, H, W)``, channels-last.
        weight, bias, stride, padding, used: see :func:`image_conv`.
        passes: :class:`Passes`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        used: tuple[int, int],
        passes: Passes,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.used, ctx.passes, ctx.with_bias = (stride, padding), used, passes, bias is not None
        if passes.forward:
            return torch.ops.spafl.image_conv(input, weight, bias, *stride, *padding, *used)
        return F.conv2d(input, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        (stride, padding), used, (_, own_input, own_weight) = ctx.geometry, ctx.used, ctx.passes
        want_input, want_weight, want_bias, *_ = ctx.needs_input_grad
        want_bias = want_bias and ctx.with_bias
        grad = grad_outputs[0].contiguous(memory_format=torch.channels_last)
        options = (*stride, *padding, *used)
        grad_input = grad_weight = grad_bias = None
        torchs = [want_input and not own_input, want_weight and not own_weight, want_bias and not own_weight]
        if any(torchs):
            sizes = [weight.shape[0]] if ctx.with_bias else None
            grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, input, weight, sizes, stride, padding, (1, 1), False, (0, 0), 1, torchs
            )
        if want_input and own_input:
            grad_input = torch.ops.spafl.image_conv_grad_input(grad, weight, *input.shape[2:], *options)
        if (want_weight or want_bias) and own_weight:
            grad_weight, grad_bias = torch.ops.spafl.image_conv_grad_weight(grad, input, weight, *options, want_bias)
        return grad_input, grad_weight, grad_bias if want_bias else None, None, None, None, None


@compiled.registers
def _register() -> None:
    """Shapes for tracing."""

    def images(like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)

    @library.register_fake("spafl::image_conv")
    def _(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        in_used: int,
        out_used: int,
    ) -> Tensor:
        height = (input.shape[2] + 2 * pad_h - weight.shape[2]) // stride_h + 1
        width = (input.shape[3] + 2 * pad_w - weight.shape[3]) // stride_w + 1
        return images(input, (input.shape[0], weight.shape[0], height, width))

    @library.register_fake("spafl::image_conv_grad_input")
    def _(grad: Tensor, weight: Tensor, height: int, width: int, *_: int) -> Tensor:
        return images(grad, (grad.shape[0], weight.shape[1], height, width))

    @library.register_fake("spafl::image_conv_grad_weight")
    def _(grad: Tensor, input: Tensor, weight: Tensor, *options: Any) -> Any:
        return torch.empty_like(weight), weight.new_empty((weight.shape[0] if options[-1] else 0,))

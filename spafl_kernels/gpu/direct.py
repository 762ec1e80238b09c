"""A layer's call on a GPU in plain eager mode: one autograd function around the launchers, without the dispatcher.

The dispatcher boxes every argument of an operator that is written in Python, on the way in and on the way out, and
once more for its derivative. Where nobody listens (no mode, transform, tracer or tensor subclass; see
:mod:`spafl_kernels.eager`) a layer of one client does not need it. Everything else takes the operators registered in
``operators.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import eager
from ..reference import Estimator
from . import operators
from . import packed as kernels
from .geometry import Geometry, row_order

Same = Callable[..., bool]


def same_as(*tensors: Tensor) -> Same | None:
    """A check whether as many tensors have type, dtype, device, shape, strides and dispatch keys of these.

    PyTorch's compiler guards its code with it: one call of C++, where reading these facts in Python takes ten times as
    long. None where this PyTorch has no such check.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check  # type: ignore
    except (ImportError, TypeError):
        return None


def possible(input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing has to be copied before the launchers, but the input, and there is something to compute."""
    dense = row_order(weight.shape, weight.stride()) is not None
    rows = threshold.is_contiguous() and (bias is None or bias.is_contiguous())
    return dense and rows and input.numel() > 0


def _with_client(tensor: Tensor, tail: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a tensor as that of one client, with dimensions of size 1 behind."""
    return (1, *tensor.shape, *tail), (tensor.shape[0] * tensor.stride(0), *tensor.stride(), *tail)


class Call:
    """A layer's call of given sizes: its launches, and what they need beside tensors.

    Args:
        input, weight: for shapes, strides and dtypes; input is ``(N, in, H, W)``, or ``(M, in)`` of a linear layer.
        threshold, bias: for dtypes.
        geometry: of a convolution; None: a linear layer.
        estimator, mask_bias: as for the operators.
        tf32: whether products of float32 are rounded.

    Arguments are checked before, and :func:`possible` holds for them.
    """

    __slots__ = ("_backward", "_device", "_facts", "_forward", "_last", "_pass", "geometry", "mask_bias")

    def __init__(
        self, input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, geometry: Geometry | None,
        estimator: Estimator, mask_bias: bool, tf32: bool,
    ) -> None:  # fmt: skip
        run, device = kernels.launchers(), input.device
        tail = () if geometry is not None else (1, 1)
        g = Geometry(weight.shape[1]) if geometry is None else geometry
        x, w = _with_client(input, tail), _with_client(weight, ())
        row = weight.shape[0]
        self.geometry, self.mask_bias = geometry, mask_bias
        self._pass = run.threshold.prepare(
            *w, row, (weight.dtype, threshold.dtype, input.dtype), device, None, estimator == "window"
        )
        self._facts = x, w, input.dtype, weight.dtype, g, tf32, device
        biased = None if bias is None else (bias.dtype, row)
        made = self._pass
        self._forward = run.forward.prepare(
            *x, (input.dtype, input.dtype, torch.int32), made.packed.strides[0], made.selection.strides[0], None,
            biased, row, g, mask_bias, tf32, None, device, id(run.forward.measured.of(device)),
        ).of_one_client(geometry is None)  # fmt: skip
        self._backward: dict[Any, Any] = {}
        # The gradient of the last backward pass, what was needed, and its launches.
        self._last: tuple[Same | None, bool, bool, Any] | None = None
        # Where another device than that of the tensors may be the current one.
        self._device = device if torch.cuda.device_count() > 1 else None

    def forward(
        self, input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, selection: Tensor | None,
        packed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """``(output, selection, packed)``."""
        if self._device is not None:
            with torch.cuda.device(self._device):
                return self._run(input, weight, threshold, bias, selection, packed)
        return self._run(input, weight, threshold, bias, selection, packed)

    def _run(
        self, input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, selection: Tensor | None,
        packed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        stream = kernels.launchers().current_stream(input.get_device())
        if selection is None or packed is None:
            selection, packed = self._pass.without_scores(stream, weight, threshold)
        return self._forward.run(stream, input, packed, bias, selection, selection), selection, packed

    def repeats(self, grad: Tensor, need_input: bool, need_weight: bool) -> bool:
        """Whether :meth:`backward` ran with such a gradient last, and would again."""
        last = self._last
        return (
            last is not None and last[1] == need_input and last[2] == need_weight and eager.unseen()
            and last[0] is not None and last[0](grad)
        )  # fmt: skip

    def backward(
        self, grad: Tensor, input: Tensor, weight: Tensor, packed: Tensor, selection: Tensor, bias: Tensor | None,
        need_input: bool, need_weight: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """``(dinput, dweight, dthreshold, dbias)``, None where not needed; ``grad`` in the dtype of the output."""
        key = grad.stride(), need_input, need_weight
        made = self._backward.get(key)
        if made is None:
            made = self._backward[key] = self._prepare(grad, packed, selection, bias, need_input, need_weight)
        self._last = same_as(grad), need_input, need_weight, made
        return self.backward_again(grad, input, weight, packed, selection, bias)

    def backward_again(
        self, grad: Tensor, input: Tensor, weight: Tensor, packed: Tensor, selection: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The same where it :meth:`repeats`."""
        assert self._last is not None
        made, stream = self._last[3], kernels.launchers().current_stream(input.get_device())
        if self._device is not None:
            with torch.cuda.device(self._device):
                return made.run(stream, grad, input, weight, packed, bias, selection, selection)  # type: ignore[no-any-return]
        return made.run(stream, grad, input, weight, packed, bias, selection, selection)  # type: ignore[no-any-return]

    def _prepare(
        self, grad: Tensor, packed: Tensor, selection: Tensor, bias: Tensor | None, need_input: bool, need_weight: bool
    ) -> Any:
        run, (x, w, dtype, kind, g, tf32, device), made = kernels.launchers(), self._facts, self._pass
        tail = (1, 1) if self.geometry is None else ()
        biased = None if bias is None else (bias.dtype, w[0][1])
        return run.backward.prepare(
            _with_client(grad, tail), x, w, (grad.dtype, dtype, kind, packed.dtype, selection.dtype),
            made.packed.strides[0], made.selection.strides[0], None, biased, g, self.mask_bias, tf32, need_input,
            need_weight, None, device, id(run.backward.measured.of(device)),
        ).of_one_client(self.geometry is None)  # fmt: skip


class ThresholdLayer(torch.autograd.Function):
    """One layer of one client; profilers show it by this name."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None,
        rest: tuple[Call, Tensor | None, Tensor | None],
    ) -> Tensor:  # fmt: skip
        call, given, rows = rest
        y, selection, packed = call.forward(input, weight, threshold, bias, given, rows)
        ctx.save_for_backward(input, weight, bias)
        ctx.kept = call, selection, packed  # nobody else has them: no version to watch, and saving costs twice as much
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        (call, selection, packed), needs = ctx.kept, ctx.needs_input_grad
        need_weight = needs[1] or needs[2] or needs[3]
        alone = not torch.is_grad_enabled()
        if alone and call.repeats(grad, needs[0], need_weight):
            dx, dw, dtau, db = call.backward_again(grad, input, weight, packed, selection, bias)
        elif alone and eager.plain(grad):
            dx, dw, dtau, db = call.backward(grad, input, weight, packed, selection, bias, needs[0], need_weight)
        else:
            dx, dw, dtau, db = _by_operator(call, grad, input, weight, packed, selection, bias, needs[0], need_weight)
        if not (needs[1] and needs[2]):
            dw, dtau = dw if needs[1] else None, dtau if needs[2] else None
        return dx, dw, dtau, db if needs[3] else None, None


# Function.apply looks for transforms first, which :func:`spafl_kernels.eager.plain` has done.
_apply = super(torch.autograd.Function, ThresholdLayer).apply


def _by_operator(
    call: Call, grad: Tensor, input: Tensor, weight: Tensor, packed: Tensor, selection: Tensor, bias: Tensor | None,
    need_input: bool, need_weight: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients by the operator, which modes and transforms see, and whose own derivative is refused in words."""
    g, first = call.geometry, (t.unsqueeze(0) for t in (grad, input, weight))
    op = operators.threshold_linear_backward if g is None else operators.threshold_conv2d_backward
    steps = () if g is None else (g.stride, g.padding, g.dilation)
    # A pass that was shared has no client dimension.
    packed, selection = packed.reshape(1, *packed.shape[-2:]), selection.reshape(1, -1)
    biased = None if bias is None else bias.unsqueeze(0)
    dx, dw, dtau, db = op(*first, packed, selection, biased, *steps, call.mask_bias, need_input, need_weight)
    return (
        dx.squeeze(0) if need_input else None,
        *((dw.squeeze(0), dtau.squeeze(0)) if need_weight else (None, None)),
        db.squeeze(0) if need_weight and bias is not None else None,
    )


def run(
    call: Call, input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, selection: Tensor | None,
    packed: Tensor | None,
) -> Tensor:  # fmt: skip
    """``(N, out, H', W')`` of an input ``(N, in, H, W)``, or ``(M, out)`` of ``(M, in)``, with a derivative.

    Args:
        call: for tensors with these facts.
        selection, packed: of a threshold pass over these weights, without a client dimension; made here if None.
    """
    if torch.is_grad_enabled() and (
        input.requires_grad
        or weight.requires_grad
        or threshold.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _apply(input, weight, threshold, bias, (call, selection, packed))  # type: ignore[no-any-return]
    return call.forward(input, weight, threshold, bias, selection, packed)[0]

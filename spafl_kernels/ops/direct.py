"""A layer's call on a GPU in plain eager mode: one autograd function around the launchers, without the dispatcher.

The dispatcher boxes every argument of an operator that is written in Python, on the way in and on the way out, and
once more for its derivative. Where nobody listens (no mode, transform, tracer or tensor subclass; see :func:`plain`)
a layer of one client does not need it. Everything else takes the operators of :mod:`spafl_kernels.ops.library`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from ..reference import Estimator
from ..triton.geometry import Geometry
from . import library
from . import packed as kernels

_Key = torch._C.DispatchKey
# Left out while the launchers prepare memory: no view needs a derivative, or may be known as one made without (nobody
# could change a result in place).
_BELOW = torch._C.DispatchKeySet(_Key.ADInplaceOrView)
for _key in (_Key.AutogradCPU, _Key.AutogradCUDA):
    _BELOW = _BELOW | torch._C.DispatchKeySet(_key)


@functools.cache
def _ordinary(device: str) -> frozenset[int]:
    """Key sets of tensors whose memory holds their values as they are: no wrapper, transform, or lazy negation."""
    with torch.inference_mode():
        inference = torch.empty(0, device=device)
    with torch.inference_mode(False):
        tensors = (inference, torch.empty(0, device=device))
    return frozenset(torch._C._dispatch_keys(t).raw_repr() for t in tensors)


def plain(first: Tensor, *others: Tensor | None) -> bool:
    """Whether nobody but autograd would see an operator on these tensors, and kernels may read their memory."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    keys, ordinary = torch._C._dispatch_keys, _ordinary("cuda" if first.is_cuda else "cpu")
    if keys(first).raw_repr() not in ordinary:
        return False
    # A loop: any() of a generator takes as long as all the rest.
    for tensor in others:  # noqa: SIM110
        if tensor is not None and keys(tensor).raw_repr() not in ordinary:
            return False
    return True


@dataclasses.dataclass(frozen=True)
class Options:
    """What a layer's call depends on beside its tensors; no geometry: a linear layer."""

    geometry: Geometry | None
    estimator: Estimator
    mask_bias: bool


def _first(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


def _forward(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, plan: Tensor | None, packed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(output, plan, packed)``; plan and packed weights with a client dimension."""
    y, plan, packed = kernels.forward(
        input.unsqueeze(0), weight.unsqueeze(0), threshold.unsqueeze(0), _first(bias), options.geometry,
        options.estimator, options.mask_bias, _first(plan), _first(packed),
    )  # fmt: skip
    return y.squeeze(0), plan, packed


class ThresholdLayer(torch.autograd.Function):
    """One layer of one client; profilers show it by this name."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, plan: Tensor | None,
        packed: Tensor | None, options: Options,
    ) -> Tensor:  # fmt: skip
        with torch._C._ExcludeDispatchKeyGuard(_BELOW):
            y, plan, packed = _forward(input, weight, threshold, bias, plan, packed, options)
        ctx.save_for_backward(input, weight, bias, plan, packed)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, plan, packed = ctx.saved_tensors
        options, needs = ctx.options, ctx.needs_input_grad
        need_weight = needs[1] or needs[2] or needs[3]
        if not torch.is_grad_enabled() and plain(grad, input, weight, bias):
            with torch._C._ExcludeDispatchKeyGuard(_BELOW):
                results = kernels.backward(
                    grad.unsqueeze(0), input.unsqueeze(0), weight.unsqueeze(0), packed, plan, _first(bias),
                    options.geometry, options.mask_bias, needs[0], need_weight,
                )  # fmt: skip
                dx, dw, dtau, db = (_row(r) if need else None for r, need in zip(results, needs))
        else:
            dx, dw, dtau, db = _by_operator(grad, input, weight, packed, plan, bias, options, needs, need_weight)
        return dx, dw, dtau, db, None, None, None


def _row(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.squeeze(0)


def _by_operator(
    grad: Tensor, input: Tensor, weight: Tensor, packed: Tensor, plan: Tensor, bias: Tensor | None, options: Options,
    needs: tuple[bool, ...], need_weight: bool,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients by the operator, which modes and transforms see, and whose own derivative is refused in words."""
    g = options.geometry
    op = library.threshold_linear_backward if g is None else library.threshold_conv2d_backward
    steps = () if g is None else (g.stride, g.padding, g.dilation)
    results = op(
        grad.unsqueeze(0), input.unsqueeze(0), weight.unsqueeze(0), packed, plan, _first(bias), *steps,
        options.mask_bias, needs[0], need_weight,
    )  # fmt: skip
    return [r.squeeze(0) if need else None for r, need in zip(results, needs)]


def call(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, plan: Tensor | None, packed: Tensor | None,
    options: Options,
) -> Tensor:  # fmt: skip
    """``(N, out, H', W')`` of an input ``(N, in, H, W)``, or ``(M, out)`` of ``(M, in)``; arguments are checked before.

    Args:
        plan, packed: of a threshold pass over these weights, without a client dimension; made here if None.
    """
    if torch.is_grad_enabled() and (
        input.requires_grad
        or weight.requires_grad
        or threshold.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return ThresholdLayer.apply(input, weight, threshold, bias, plan, packed, options)  # type: ignore[no-any-return]
    with torch._C._ExcludeDispatchKeyGuard(_BELOW):
        return _forward(input, weight, threshold, bias, plan, packed, options)[0]

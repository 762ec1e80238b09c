"""Registration of the operators with torch.library, and their use for a single layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..reference import Estimator
from ..threshold_layer import Planned
from ..triton.geometry import Geometry, empty_channels_last, like_rows
from ..triton.plan import Plan, capacity, plan_size, row_stride
from . import backend, closed_form
from .narrow import narrow

_LOW = (torch.float16, torch.bfloat16)


def _check(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, estimator: str, dims: tuple[int, int]
) -> None:
    """Refuse what no implementation can compute, in one line each."""
    reference.check_estimator(estimator)
    if input.dim() != dims[0] or weight.dim() != dims[1]:
        raise ValueError(
            f"input and weight must have {dims[0]} and {dims[1]} dimensions, clients first; got shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    clients, out = weight.shape[:2]
    channels = input.shape[2]
    if input.shape[0] != clients or channels != weight.shape[2]:
        raise ValueError(
            f"input must have {clients} clients and {weight.shape[2]} input channels, as weight has; got shape "
            f"{tuple(input.shape)}"
        )
    if out == 0 or weight.shape[2:].numel() == 0:
        raise ValueError(f"weight must have at least one filter and one number per filter; got {tuple(weight.shape)}")
    for name, tensor in (("threshold", threshold), ("bias", bias)):
        if tensor is not None and tensor.shape != (clients, out):
            raise ValueError(f"{name} must have shape {(clients, out)}; got {tuple(tensor.shape)}")
    for name, tensor in (("input", input), ("threshold", threshold), ("bias", bias)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device} but weight is on {weight.device}")
    for name, tensor in (("threshold", threshold), ("bias", bias)):
        if tensor is not None and tensor.dtype != weight.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype} but weight has {weight.dtype}")
    if input.dtype != weight.dtype and not (weight.dtype == torch.float32 and input.dtype in _LOW):
        raise ValueError(
            f"input must have the dtype of weight, or float16 or bfloat16 with a float32 weight; got {input.dtype} and "
            f"{weight.dtype}"
        )


def _check_planned(input: Tensor, weight: Tensor, plan: Tensor | None, packed: Tensor | None) -> None:
    """Refuse a pass that was made for another layer, or for another dtype."""
    if plan is None and packed is None:
        return
    clients, out = weight.shape[:2]
    rows = (clients, capacity(out), row_stride(weight.shape[2:].numel()))
    if plan is None or packed is None or plan.shape != (clients, plan_size(out)) or packed.shape != rows:
        shapes = [None if t is None else tuple(t.shape) for t in (plan, packed)]
        raise ValueError(f"plan and packed must have shapes {(clients, plan_size(out))} and {rows}; got {shapes}")
    if packed.dtype != input.dtype:
        raise ValueError(f"packed must have the dtype of input; got {packed.dtype} and {input.dtype}")


def _geometry(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Geometry:
    pairs: list[tuple[int, int]] = []
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(value) != 2 or min(value) < least:
            raise ValueError(f"{name} must be two integers of at least {least}; got {list(value)}")
        pairs.append((value[0], value[1]))
    kernel = (weight.shape[3], weight.shape[4])
    geometry = Geometry(weight.shape[2], input.shape[3], input.shape[4], kernel, *pairs)
    if min(geometry.output) < 1:
        raise ValueError(
            f"input of size {tuple(input.shape[3:])} is too small for kernel {kernel}, padding {pairs[1]} and dilation "
            f"{pairs[2]}: the output would be {geometry.output}"
        )
    return geometry


@dataclasses.dataclass(frozen=True)
class _Pass:
    """The threshold pass of a call, and what the call returns of it: nothing that was given, as operators must not."""

    plan: Plan
    packed: Tensor
    results: tuple[Tensor, Tensor]


def _plan_by_kernel(weight: Tensor, threshold: Tensor, estimator: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from ..triton import plan_layer

    plan, packed, _ = plan_layer(weight, threshold, estimator, dtype)
    return plan.data, packed


def _threshold_pass(
    make: Any, input: Tensor, weight: Tensor, threshold: Tensor, estimator: Any, plan: Tensor | None,
    packed: Tensor | None,
) -> _Pass:  # fmt: skip
    """The given pass, checked, or one by ``make(weight, threshold, estimator, dtype)``."""
    _check_planned(input, weight, plan, packed)
    if plan is not None and packed is not None:
        return _Pass(Plan(plan, weight.shape[1]), packed, (plan.new_empty(0), packed.new_empty(0)))
    plan, packed = make(weight, threshold, estimator, input.dtype)
    return _Pass(Plan(plan, weight.shape[1]), packed, (plan, packed))


def _fake_state(input: Tensor, weight: Tensor, plan: Tensor | None) -> tuple[Tensor, Tensor]:
    if plan is not None:
        return plan.new_empty(0), input.new_empty(0)
    clients, out = weight.shape[:2]
    n_in = weight.shape[2:].numel()
    return (
        weight.new_empty(clients, plan_size(out), dtype=torch.int32),
        input.new_empty(clients, capacity(out), row_stride(n_in)),
    )


def _fake_gradients(
    input: Tensor, weight: Tensor, bias: Tensor | None, dx: Tensor, need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    clients, out = weight.shape[:2]
    return (
        dx if need_input else input.new_empty(0),
        like_rows(weight) if need_weight else weight.new_empty(0),
        weight.new_empty(clients, out) if need_weight else weight.new_empty(0),
        bias.new_empty(clients, out) if bias is not None and need_weight else weight.new_empty(0),
    )


def _or_empty(weight: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """An operator cannot return None: an empty tensor stands for it."""
    return tuple(weight.new_empty(0) if result is None else result for result in results)


# --------------------------------------------------------------------------------------------------- linear
@torch.library.custom_op("spafl::threshold_linear", mutates_args=(), device_types="cpu")
def threshold_linear(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, estimator: str, mask_bias: bool,
    plan: Tensor | None = None, packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Linear layers of several clients: ``(output, plan, packed)``.

    Args:
        input: ``(clients, M, in)``.
        weight: ``(clients, out, in)``.
        threshold: ``(clients, out)``, dtype of weight.
        bias: ``(clients, out)``, dtype of weight, or None.
        estimator: ``"identity"`` or ``"window"``.
        mask_bias: prune the bias with its filter.
        plan, packed: of a threshold pass over this weight and threshold with this estimator, ``(clients, plan_size)``
            and ``(clients, capacity, row_stride)`` in the dtype of input; made here if None.

    Returns:
        output ``(clients, M, out)`` in the dtype of input; the plan and the packed weights, empty if they were given.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device.
    """
    _check(input, weight, threshold, bias, estimator, (3, 3))
    made = _threshold_pass(closed_form.plan_and_packed, input, weight, threshold, estimator, plan, packed)
    return closed_form.forward(input, weight, made.plan, bias, mask_bias, None), *made.results


@threshold_linear.register_kernel("cuda")
def _(input, weight, threshold, bias, estimator, mask_bias, plan=None, packed=None):
    from ..triton import layer_forward

    _check(input, weight, threshold, bias, estimator, (3, 3))
    geometry = Geometry(weight.shape[2])
    with torch.cuda.device_of(input):
        made = _threshold_pass(_plan_by_kernel, input, weight, threshold, estimator, plan, packed)
        y = layer_forward(
            input[..., None, None], made.packed, made.plan, bias, geometry, mask_bias, backend.tf32(conv=False)
        )
    return y.squeeze(4).squeeze(3), *made.results


@threshold_linear.register_fake
def _(input, weight, threshold, bias, estimator, mask_bias, plan=None, packed=None):
    _check(input, weight, threshold, bias, estimator, (3, 3))
    _check_planned(input, weight, plan, packed)
    y = input.new_empty(*input.shape[:2], weight.shape[1])
    return y, *_fake_state(input, weight, plan)


@torch.library.custom_op("spafl::threshold_linear_backward", mutates_args=(), device_types="cpu")
def threshold_linear_backward(
    grad: Tensor, input: Tensor, weight: Tensor, packed: Tensor, plan: Tensor, bias: Tensor | None, mask_bias: bool,
    need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`threshold_linear`: ``(dinput, dweight, dthreshold, dbias)``; empty where not needed."""
    dx, dw, dtau, db = closed_form.backward(
        grad, input, weight, Plan(plan, weight.shape[1]), bias, mask_bias, None, (need_input, need_weight)
    )
    return _or_empty(
        weight, dx if need_input else None, *((dw, dtau) if need_weight else (None, None)),
        db if need_weight and bias is not None else None,
    )  # type: ignore[return-value]  # fmt: skip


@threshold_linear_backward.register_kernel("cuda")
def _(grad, input, weight, packed, plan, bias, mask_bias, need_input, need_weight):
    from ..triton import layer_backward

    with torch.cuda.device_of(input):
        dx, dw, dtau, db = layer_backward(
            grad[..., None, None], input[..., None, None], weight, packed, Plan(plan, weight.shape[1]), bias,
            Geometry(weight.shape[2]), mask_bias, backend.tf32(conv=False), need_input, need_weight,
        )  # fmt: skip
    return _or_empty(weight, None if dx is None else dx.squeeze(4).squeeze(3), dw, dtau, db)


@threshold_linear_backward.register_fake
def _(grad, input, weight, packed, plan, bias, mask_bias, need_input, need_weight):
    return _fake_gradients(input, weight, bias, input.new_empty(input.shape), need_input, need_weight)


# --------------------------------------------------------------------------------------------------- conv2d
@torch.library.custom_op("spafl::threshold_conv2d", mutates_args=(), device_types="cpu")
def threshold_conv2d(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], estimator: str, mask_bias: bool, plan: Tensor | None = None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Convolutions of several clients: ``(output, plan, packed)``.

    Args:
        input: ``(clients, N, in, H, W)``; stored channels last it is read in place.
        weight: ``(clients, out, in, kH, kW)``.
        threshold, bias, estimator, mask_bias, plan, packed: as for :func:`threshold_linear`.
        stride, padding, dilation: two integers each.

    Returns:
        output ``(clients, N, out, H', W')``, stored channels last, in the dtype of input; the plan and the packed
        weights, empty if they were given.

    Raises:
        ValueError: an argument of a wrong shape, dtype, device or value.
    """
    _check(input, weight, threshold, bias, estimator, (5, 5))
    g = _geometry(input, weight, stride, padding, dilation)
    made = _threshold_pass(closed_form.plan_and_packed, input, weight, threshold, estimator, plan, packed)
    y = closed_form.forward(input, weight, made.plan, bias, mask_bias, g)
    empty = empty_channels_last(input.shape[0], input.shape[1], weight.shape[1], g.output, input.dtype, input.device)
    return empty.copy_(y), *made.results


@threshold_conv2d.register_kernel("cuda")
def _(input, weight, threshold, bias, stride, padding, dilation, estimator, mask_bias, plan=None, packed=None):
    from ..triton import layer_forward

    _check(input, weight, threshold, bias, estimator, (5, 5))
    g = _geometry(input, weight, stride, padding, dilation)
    with torch.cuda.device_of(input):
        made = _threshold_pass(_plan_by_kernel, input, weight, threshold, estimator, plan, packed)
        y = layer_forward(input, made.packed, made.plan, bias, g, mask_bias, backend.tf32(conv=True))
    return y, *made.results


@threshold_conv2d.register_fake
def _(input, weight, threshold, bias, stride, padding, dilation, estimator, mask_bias, plan=None, packed=None):
    _check(input, weight, threshold, bias, estimator, (5, 5))
    _check_planned(input, weight, plan, packed)
    g = _geometry(input, weight, stride, padding, dilation)
    y = empty_channels_last(input.shape[0], input.shape[1], weight.shape[1], g.output, input.dtype, input.device)
    return y, *_fake_state(input, weight, plan)


@torch.library.custom_op("spafl::threshold_conv2d_backward", mutates_args=(), device_types="cpu")
def threshold_conv2d_backward(
    grad: Tensor, input: Tensor, weight: Tensor, packed: Tensor, plan: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], mask_bias: bool, need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`threshold_conv2d`: ``(dinput, dweight, dthreshold, dbias)``; empty where not needed."""
    g = _geometry(input, weight, stride, padding, dilation)
    dx, dw, dtau, db = closed_form.backward(
        grad, input, weight, Plan(plan, weight.shape[1]), bias, mask_bias, g, (need_input, need_weight)
    )
    dx = _empty_input_gradient(input).copy_(dx)
    dw = like_rows(weight).copy_(dw)
    return _or_empty(
        weight, dx if need_input else None, *((dw, dtau) if need_weight else (None, None)),
        db if need_weight and bias is not None else None,
    )  # type: ignore[return-value]  # fmt: skip


@threshold_conv2d_backward.register_kernel("cuda")
def _(grad, input, weight, packed, plan, bias, stride, padding, dilation, mask_bias, need_input, need_weight):
    from ..triton import layer_backward

    g = _geometry(input, weight, stride, padding, dilation)
    with torch.cuda.device_of(input):
        results = layer_backward(
            grad, input, weight, packed, Plan(plan, weight.shape[1]), bias, g, mask_bias, backend.tf32(conv=True),
            need_input, need_weight,
        )  # fmt: skip
    return _or_empty(weight, *results)


@threshold_conv2d_backward.register_fake
def _(grad, input, weight, packed, plan, bias, stride, padding, dilation, mask_bias, need_input, need_weight):
    return _fake_gradients(input, weight, bias, _empty_input_gradient(input), need_input, need_weight)


def _empty_input_gradient(input: Tensor) -> Tensor:
    clients, n, c, high, wide = input.shape
    return empty_channels_last(clients, n, c, (high, wide), input.dtype, input.device)


# --------------------------------------------------------------------------------------------------- autograd
def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, _, bias, *rest = inputs
    given = [value for value in rest if isinstance(value, Tensor)]
    ctx.rest = [value for value in rest if value is not None and not isinstance(value, Tensor)]
    ctx.arguments = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, weight, bias, *(given or output[1:]))


def _needs(ctx: Any) -> tuple[bool, bool]:
    return ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:4])


def _for_all_arguments(ctx: Any, results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients that are needed, and None for every argument behind the first four."""
    needed = (r if need else None for r, need in zip(results, ctx.needs_input_grad[:4], strict=True))
    return (*needed, *[None] * (ctx.arguments - 4))


class _GradientForTransforms(torch.autograd.Function):
    """A backward operator under ``torch.func.grad``, which asks every function for a derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, *args: Any) -> tuple[Tensor, ...]:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "second derivatives are not implemented by the packed threshold operators; use "
            "spafl_kernels.reference, which has them"
        )


def _gradient(op: Any, *args: Any) -> tuple[Tensor, ...]:
    if torch._C._are_functorch_transforms_active():
        return _GradientForTransforms.apply(op, *args)
    return op(*args)


def _linear_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    input, weight, bias, plan, packed = ctx.saved_tensors
    _, mask_bias = ctx.rest
    results = _gradient(
        torch.ops.spafl.threshold_linear_backward,
        grad, input, weight, packed, plan, bias, mask_bias, *_needs(ctx),
    )  # fmt: skip
    return _for_all_arguments(ctx, results)


def _conv2d_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    input, weight, bias, plan, packed = ctx.saved_tensors
    stride, padding, dilation, _, mask_bias = ctx.rest
    results = _gradient(
        torch.ops.spafl.threshold_conv2d_backward,
        grad, input, weight, packed, plan, bias, stride, padding, dilation, mask_bias, *_needs(ctx),
    )  # fmt: skip
    return _for_all_arguments(ctx, results)


threshold_linear.register_autograd(_linear_backward, setup_context=_save)
threshold_conv2d.register_autograd(_conv2d_backward, setup_context=_save)


# --------------------------------------------------------------------------------------------------- vmap
def _vmap(op: Any) -> Any:
    """vmap is more clients: fold the mapped dimension into that of the clients, and unfold the results."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def fold(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            return value.flatten(0, 1)

        results = op(*(fold(value, dim) for value, dim in zip(args, in_dims, strict=True)))
        # An empty result stands for "not needed" and has no clients.
        split = tuple(r.unflatten(0, (size, -1)) if r.dim() > 1 else r.expand(size, 0) for r in results)
        return split, (0,) * len(split)

    return rule


for _op in (threshold_linear, threshold_linear_backward, threshold_conv2d, threshold_conv2d_backward):
    _op.register_vmap(_vmap(_op))


# --------------------------------------------------------------------------------------------------- autocast
_autocast_library = torch.library.Library("spafl", "IMPL")


def _register_autocast(op: Any, device: str, key: str) -> None:
    """Cast the input only: masks are decided on the weights as they are, and the kernels cast while packing."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(_: Any, input: Tensor, *rest: Any) -> Any:
        if input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(input, *rest)

    _autocast_library.impl(op._opoverload, kernel, key, with_keyset=True)


for _op in (threshold_linear, threshold_conv2d):
    for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _register_autocast(_op, _device, _key)


# --------------------------------------------------------------------------------------------------- torch.func
class _LinearForTransforms(torch.autograd.Function):
    """The linear operator for ``torch.func.grad``, which refuses the autograd of custom operators."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.spafl.threshold_linear(*args)

    setup_context = staticmethod(_save)
    backward = staticmethod(_linear_backward)


class _Conv2dForTransforms(torch.autograd.Function):
    """The convolution operator for ``torch.func.grad``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.spafl.threshold_conv2d(*args)

    setup_context = staticmethod(_save)
    backward = staticmethod(_conv2d_backward)


def _call(op: Any, for_transforms: Any, *args: Any) -> Tensor:
    if torch._C._are_functorch_transforms_active():
        return for_transforms.apply(*args)[0]
    return op(*args)[0]


# --------------------------------------------------------------------------------------------------- single layers
def _check_dtype(input: Tensor, weight: Tensor) -> None:
    if input.device != weight.device:
        raise ValueError(f"input is on {input.device} but weight is on {weight.device}")
    if input.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise ValueError(f"input must have the dtype of weight outside autocast; got {input.dtype} and {weight.dtype}")


def _choose(input: Tensor, weight: Tensor, groups: int, work: backend.Work) -> backend.Backend:
    """The implementation that runs; a fallback is said, or an error."""
    choice = backend.choose(input, weight, groups, work)
    if choice.fallback:
        backend.fall_back(choice.reason)
    return choice.backend


def _client(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


def _clients(planned: Planned | None) -> tuple[Tensor, ...]:
    return () if planned is None else (planned.plan.unsqueeze(0), planned.packed.unsqueeze(0))


def linear(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, estimator: Estimator, mask_bias: bool,
    density: float = 1.0, planned: Planned | None = None,
) -> Tensor:  # fmt: skip
    """One linear layer through the operator, or the reference with a stated reason. Shapes as ``F.linear`` has them."""
    _check_dtype(input, weight)
    chosen = _choose(input, weight, 1, backend.linear_work(input, weight, density))
    if chosen == "reference":
        return reference.threshold_linear(input, weight, threshold, bias, estimator, mask_bias)
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must have {weight.shape[1]} features, as weight has; got shape {tuple(input.shape)}")
    rows = input.reshape(1, -1, input.shape[-1])
    if chosen == "narrow":
        y = narrow(rows[0], weight, threshold, bias, estimator, mask_bias, None)
    else:
        y = _call(
            torch.ops.spafl.threshold_linear, _LinearForTransforms,
            rows, weight.unsqueeze(0), threshold.unsqueeze(0), _client(bias), estimator, mask_bias, *_clients(planned),
        )  # fmt: skip
    return y.reshape(*input.shape[:-1], weight.shape[0])


def _pad(
    input: Tensor, kernel: Sequence[int], padding: int | Sequence[int] | str, stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:  # fmt: skip
    """Numbers for ``"same"`` and ``"valid"``; an uneven ``"same"`` pads the input itself, by one more at the end."""
    if not isinstance(padding, str):
        return input, backend._pair(padding)
    if padding == "valid":
        return input, (0, 0)
    if padding != "same" or stride != (1, 1):
        raise ValueError(f"padding must be numbers, 'valid', or 'same' with stride 1; got {padding!r}, stride {stride}")
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(t % 2 for t in total):
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, (total[0] // 2, total[1] // 2)


def conv2d(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
    groups: int,
    estimator: Estimator,
    mask_bias: bool,
    density: float = 1.0,
    planned: Planned | None = None,
) -> Tensor:
    """One convolution through the operator, or the reference with a stated reason. Shapes as ``F.conv2d`` has them."""
    _check_dtype(input, weight)
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be (N, in, H, W) or (in, H, W); got shape {tuple(input.shape)}")
    chosen = _choose(input, weight, groups, backend.conv_work(input, weight, stride, padding, dilation, density))
    if chosen == "reference":
        return reference.threshold_conv2d(
            input, weight, threshold, bias, stride, padding, dilation, groups, estimator, mask_bias
        )
    strides, dilations = backend._pair(stride), backend._pair(dilation)
    image, pads = _pad(input, weight.shape[2:], padding, strides, dilations)
    batch = image if image.dim() == 4 else image.unsqueeze(0)
    if chosen == "narrow":
        geometry = _geometry(batch.unsqueeze(0), weight.unsqueeze(0), strides, pads, dilations)
        y = narrow(batch, weight, threshold, bias, estimator, mask_bias, geometry)
    else:
        y = _call(
            torch.ops.spafl.threshold_conv2d, _Conv2dForTransforms,
            batch.unsqueeze(0), weight.unsqueeze(0), threshold.unsqueeze(0), _client(bias), strides, pads, dilations,
            estimator, mask_bias, *_clients(planned),
        )  # fmt: skip
        y = y.squeeze(0)
    return y if input.dim() == 4 else y.squeeze(0)

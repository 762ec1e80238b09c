"""The threshold operators, registered with PyTorch: schemas, devices, shapes for tracing, autograd and vmap.

Four operators: ``threshold_linear``, ``threshold_conv2d`` and their backward ones. All take a leading client dimension
in every tensor. They are registered directly: a decorator of PyTorch would wrap every call in checks of its own.

``threshold_linear(input, weight, threshold, bias, estimator, mask_bias, selection=None, packed=None)``
``threshold_conv2d(input, weight, threshold, bias, stride, padding, dilation, estimator, mask_bias, selection=None, packed=None)``

Args of both:

* input: ``(clients, M, in)``, or ``(clients, N, in, H, W)``; stored channels last it is read in place.
* weight: ``(clients, out, in)``, or ``(clients, out, in, kH, kW)``.
* threshold: ``(clients, out)``, dtype of weight. bias: the same, or None.
* stride, padding, dilation: two integers each.
* estimator: ``"identity"`` or ``"window"``. mask_bias: prune the bias with its filter.
* selection, packed: of a threshold pass over this weight and threshold with this estimator, ``(clients,
  selection_size)`` and ``(clients, capacity, row_stride)`` in the dtype of input; made by the operator if None.

They return the output, ``(clients, M, out)``, or ``(clients, N, out, H', W')`` stored channels last, in the dtype of
input; then the selection and the packed weights, empty if they were given. An argument of a wrong shape, dtype, device
or value is a ``ValueError``. The backward operators return ``(dinput, dweight, dthreshold, dbias)``, empty where not
needed.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, library

from . import closed_form
from . import packed as kernels
from .arguments import check, check_selected, geometry
from .geometry import Geometry, empty_channels_last, like_rows
from .packing import Selection, capacity, row_stride, selection_size

_STEPS = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
_FORWARD = "(Tensor input, Tensor weight, Tensor threshold, Tensor? bias, {}str estimator, bool mask_bias, " \
    "Tensor? selection=None, Tensor? packed=None) -> (Tensor, Tensor, Tensor)"  # fmt: skip
_BACKWARD = "(Tensor grad, Tensor input, Tensor weight, Tensor packed, Tensor selection, Tensor? bias, " \
    "{}bool mask_bias, bool need_input, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)"  # fmt: skip

_operators = vars(library)["Library"]("spafl", "FRAGMENT")
for _name, _schema, _more in (
    ("threshold_linear", _FORWARD, ""),
    ("threshold_linear_backward", _BACKWARD, ""),
    ("threshold_conv2d", _FORWARD, f"{_STEPS}, "),
    ("threshold_conv2d_backward", _BACKWARD, f"{_STEPS}, "),
):
    _operators.define(_name + _schema.format(_more), tags=(torch.Tag.pt2_compliant_tag,))

threshold_linear = torch.ops.spafl.threshold_linear.default
threshold_conv2d = torch.ops.spafl.threshold_conv2d.default
threshold_linear_backward = torch.ops.spafl.threshold_linear_backward.default
threshold_conv2d_backward = torch.ops.spafl.threshold_conv2d_backward.default

# What runs on CUDA tensors, by operator: checks without a GPU call it on others.
CUDA: dict[Any, Callable[..., tuple[Tensor, ...]]] = {}


def _implements(op: Any, key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function for a dispatch key, or for tracing (``"fake"``)."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if key == "fake":
            library.register_fake(op, function, lib=_operators)
        else:
            _operators.impl(op, function, key)
        if key == "CUDA":
            CUDA[op] = function
        return function

    return register


@contextlib.contextmanager
def kernels_of_cuda_on_the_cpu() -> Iterator[None]:
    """CPU tensors take what CUDA tensors do while the context is open: for checks and timings without a GPU."""
    with library._scoped_library("spafl", "IMPL") as registered:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel.*")
            for op, function in CUDA.items():
                registered.impl(op, function, "CPU")
        yield


def _or_empty(like: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """An operator cannot return None: an empty tensor stands for it."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _made(given: Tensor | None, selection: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Selection and packed weights as an operator returns them: it must not return what was given to it."""
    return (selection, packed) if given is None else (selection.new_empty(0), packed.new_empty(0))


# --------------------------------------------------------------------------------------------------- on the CPU
def _pass(
    input: Tensor, weight: Tensor, threshold: Tensor, estimator: Any, selection: Tensor | None, packed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The given pass, checked, or one by the closed form."""
    check_selected(input, weight, selection, packed)
    if selection is not None and packed is not None:
        return selection, packed
    return closed_form.selection_and_packed(weight, threshold, estimator, input.dtype)


@_implements(threshold_linear, "CPU")
def _(input, weight, threshold, bias, estimator, mask_bias, selection=None, packed=None):
    check(input, weight, threshold, bias, estimator, (3, 3))
    data, rows = _pass(input, weight, threshold, estimator, selection, packed)
    y = closed_form.forward(input, weight, Selection(data, weight.shape[1]), bias, mask_bias, None)
    return y, *_made(selection, data, rows)


@_implements(threshold_conv2d, "CPU")
def _(input, weight, threshold, bias, stride, padding, dilation, estimator, mask_bias, selection=None, packed=None):
    check(input, weight, threshold, bias, estimator, (5, 5))
    g = geometry(input.shape, weight.shape, stride, padding, dilation)
    data, rows = _pass(input, weight, threshold, estimator, selection, packed)
    y = closed_form.forward(input, weight, Selection(data, weight.shape[1]), bias, mask_bias, g)
    return _empty_output(input, weight, g).copy_(y), *_made(selection, data, rows)


def _closed_form_backward(grad, input, weight, selection, bias, mask_bias, geometry, need_input, need_weight):
    dx, dw, dtau, db = closed_form.backward(
        grad, input, weight, Selection(selection, weight.shape[1]), bias, mask_bias, geometry, (need_input, need_weight)
    )
    if geometry is not None:
        dx, dw = _empty_input_gradient(input).copy_(dx), like_rows(weight).copy_(dw)
    return _or_empty(
        weight, dx if need_input else None, *((dw, dtau) if need_weight else (None, None)),
        db if need_weight and bias is not None else None,
    )  # fmt: skip


@_implements(threshold_linear_backward, "CPU")
def _(grad, input, weight, packed, selection, bias, mask_bias, need_input, need_weight):
    return _closed_form_backward(grad, input, weight, selection, bias, mask_bias, None, need_input, need_weight)


@_implements(threshold_conv2d_backward, "CPU")
def _(grad, input, weight, packed, selection, bias, stride, padding, dilation, mask_bias, need_input, need_weight):
    g = geometry(input.shape, weight.shape, stride, padding, dilation)
    return _closed_form_backward(grad, input, weight, selection, bias, mask_bias, g, need_input, need_weight)


# --------------------------------------------------------------------------------------------------- on a GPU
@_implements(threshold_linear, "CUDA")
def _(input, weight, threshold, bias, estimator, mask_bias, selection=None, packed=None):
    check(input, weight, threshold, bias, estimator, (3, 3))
    y, *state = kernels.forward(input, weight, threshold, bias, None, estimator, mask_bias, selection, packed)
    return y, *_made(selection, *state)


@_implements(threshold_conv2d, "CUDA")
def _(input, weight, threshold, bias, stride, padding, dilation, estimator, mask_bias, selection=None, packed=None):
    check(input, weight, threshold, bias, estimator, (5, 5))
    g = geometry(input.shape, weight.shape, stride, padding, dilation)
    y, *state = kernels.forward(input, weight, threshold, bias, g, estimator, mask_bias, selection, packed)
    return y, *_made(selection, *state)


@_implements(threshold_linear_backward, "CUDA")
def _(grad, input, weight, packed, selection, bias, mask_bias, need_input, need_weight):
    results = kernels.backward(grad, input, weight, packed, selection, bias, None, mask_bias, need_input, need_weight)
    return _or_empty(weight, *results)


@_implements(threshold_conv2d_backward, "CUDA")
def _(grad, input, weight, packed, selection, bias, stride, padding, dilation, mask_bias, need_input, need_weight):
    g = geometry(input.shape, weight.shape, stride, padding, dilation)
    results = kernels.backward(grad, input, weight, packed, selection, bias, g, mask_bias, need_input, need_weight)
    return _or_empty(weight, *results)


# --------------------------------------------------------------------------------------------------- for tracing
def _empty_output(input: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    return empty_channels_last(input.shape[0], input.shape[1], weight.shape[1], g.output, input.dtype, input.device)


def _empty_input_gradient(input: Tensor) -> Tensor:
    clients, n, c, high, wide = input.shape
    return empty_channels_last(clients, n, c, (high, wide), input.dtype, input.device)


def _fake_state(input: Tensor, weight: Tensor, selection: Tensor | None) -> tuple[Tensor, Tensor]:
    if selection is not None:
        return selection.new_empty(0), input.new_empty(0)
    clients, out = weight.shape[:2]
    n_in = weight.shape[2:].numel()
    return (
        weight.new_empty(clients, selection_size(out), dtype=torch.int32),
        input.new_empty(clients, capacity(out), row_stride(n_in)),
    )


def _fake_gradients(
    weight: Tensor, bias: Tensor | None, dx: Tensor, need_input: bool, need_weight: bool
) -> tuple[Tensor, ...]:
    clients, out = weight.shape[:2]
    return (
        dx if need_input else dx.new_empty(0),
        like_rows(weight) if need_weight else weight.new_empty(0),
        weight.new_empty(clients, out) if need_weight else weight.new_empty(0),
        bias.new_empty(clients, out) if bias is not None and need_weight else weight.new_empty(0),
    )


@_implements(threshold_linear, "fake")
def _(input, weight, threshold, bias, estimator, mask_bias, selection=None, packed=None):
    check(input, weight, threshold, bias, estimator, (3, 3))
    check_selected(input, weight, selection, packed)
    return input.new_empty(*input.shape[:2], weight.shape[1]), *_fake_state(input, weight, selection)


@_implements(threshold_conv2d, "fake")
def _(input, weight, threshold, bias, stride, padding, dilation, estimator, mask_bias, selection=None, packed=None):
    check(input, weight, threshold, bias, estimator, (5, 5))
    check_selected(input, weight, selection, packed)
    g = geometry(input.shape, weight.shape, stride, padding, dilation)
    return _empty_output(input, weight, g), *_fake_state(input, weight, selection)


@_implements(threshold_linear_backward, "fake")
def _(grad, input, weight, packed, selection, bias, mask_bias, need_input, need_weight):
    return _fake_gradients(weight, bias, input.new_empty(input.shape), need_input, need_weight)


@_implements(threshold_conv2d_backward, "fake")
def _(grad, input, weight, packed, selection, bias, stride, padding, dilation, mask_bias, need_input, need_weight):
    return _fake_gradients(weight, bias, _empty_input_gradient(input), need_input, need_weight)


# --------------------------------------------------------------------------------------------------- autograd
def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """``setup_context`` of both operators."""
    input, weight, _, bias, *rest = inputs
    given = [value for value in rest if isinstance(value, Tensor)]
    ctx.rest = [value for value in rest if value is not None and not isinstance(value, Tensor)]
    ctx.arguments = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, weight, bias, *(given or output[1:]))


def no_second_derivative(ctx: Any, *grads: Any) -> Any:
    """The derivative of a gradient.

    Raises:
        RuntimeError: always; there is none.
    """
    raise RuntimeError(
        "second derivatives are not implemented by the packed threshold operators; use "
        "spafl_kernels.reference, which has them"
    )


class _GradientForTransforms(torch.autograd.Function):
    """A backward operator under ``torch.func.grad``, which asks every function for a derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, *args: Any) -> tuple[Tensor, ...]:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    backward = staticmethod(no_second_derivative)


def _gradients(ctx: Any, op: Any, grad: Tensor, *options: Any) -> tuple[Tensor | None, ...]:
    """Of the arguments that need one; None for the others."""
    input, weight, bias, selection, packed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    args = (grad, input, weight, packed, selection, bias, *options, needs[0], any(needs[1:4]))
    under_transforms = torch._C._are_functorch_transforms_active()
    results = _GradientForTransforms.apply(op, *args) if under_transforms else op(*args)
    needed = (r if need else None for r, need in zip(results, needs[:4], strict=True))
    return (*needed, *[None] * (ctx.arguments - 4))


def linear_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """``backward`` of the linear operator."""
    return _gradients(ctx, threshold_linear_backward, grad, ctx.rest[1])


def conv2d_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """``backward`` of the convolution operator."""
    stride, padding, dilation, _, mask_bias = ctx.rest
    return _gradients(ctx, threshold_conv2d_backward, grad, stride, padding, dilation, mask_bias)


for _op, _backward in ((threshold_linear, linear_backward), (threshold_conv2d, conv2d_backward)):
    library.register_autograd(_op, _backward, setup_context=save, lib=_operators)
for _op in (threshold_linear_backward, threshold_conv2d_backward):
    library.register_autograd(_op, no_second_derivative, lib=_operators)


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
    library.register_vmap(_op, _vmap(_op), lib=_operators)


# --------------------------------------------------------------------------------------------------- autocast
def cast(input: Tensor, device: str) -> Tensor:
    """Input only: masks are decided on the weights as they are, and the kernels cast while packing."""
    return input if input.dtype == torch.float64 else input.to(torch.get_autocast_dtype(device))


def _register_autocast(op: Any, device: str, key: str) -> None:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(_: Any, input: Tensor, *rest: Any) -> Any:
        input = cast(input, device)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(input, *rest)

    _operators.impl(op, kernel, key, with_keyset=True)


for _op in (threshold_linear, threshold_conv2d):
    for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _register_autocast(_op, _device, _key)


# --------------------------------------------------------------------------------------------------- torch.func
class _LinearForTransforms(torch.autograd.Function):
    """The linear operator for ``torch.func.grad``, which refuses the autograd of custom operators."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return threshold_linear(*args)

    setup_context = staticmethod(save)
    backward = staticmethod(linear_backward)


class _Conv2dForTransforms(torch.autograd.Function):
    """The convolution operator for ``torch.func.grad``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return threshold_conv2d(*args)

    setup_context = staticmethod(save)
    backward = staticmethod(conv2d_backward)


def call_linear(*args: Any) -> Tensor:
    """The output of ``threshold_linear(*args)``, also under transforms of ``torch.func``."""
    if torch._C._are_functorch_transforms_active():
        return _LinearForTransforms.apply(*args)[0]
    return torch.ops.spafl.threshold_linear(*args)[0]


def call_conv2d(*args: Any) -> Tensor:
    """The output of ``threshold_conv2d(*args)``, also under transforms of ``torch.func``."""
    if torch._C._are_functorch_transforms_active():
        return _Conv2dForTransforms.apply(*args)[0]
    return torch.ops.spafl.threshold_conv2d(*args)[0]

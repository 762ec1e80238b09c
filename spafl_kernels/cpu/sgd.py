"""Threshold penalty, clipping by the global norm and the SGD update in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, library

from .. import reference
from . import compiled
from .compiled import Kernel


def _check_numbers(lr: float, momentum: float, weight_decay: float, penalty: float, max_norm: float | None) -> None:
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative; got {value!r}")
    if not math.isfinite(penalty):
        raise ValueError(f"penalty must be finite; got {penalty!r}")
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"max_norm must not be negative; got {max_norm!r}")


def _check_tensors(
    params: Sequence[Tensor], grads: Sequence[Tensor], momenta: Sequence[Tensor], is_threshold: Sequence[int]
) -> None:
    if not params:
        raise ValueError("params must hold at least one tensor")
    for name, values in (("grads", grads), ("momenta", momenta or params), ("is_threshold", is_threshold)):
        if len(values) != len(params):
            raise ValueError(f"{name} must have one entry per parameter, {len(params)}; got {len(values)}")
    for name, tensors in (("grads", grads), ("momenta", momenta or params)):
        for i, (tensor, param) in enumerate(zip(tensors, params)):
            if tensor.shape != param.shape:
                raise ValueError(f"{name}[{i}] must have shape {tuple(param.shape)}; got {tuple(tensor.shape)}")


def _unsupported(*lists: Sequence[Tensor]) -> str | None:
    tensors = [tensor for each in lists for tensor in each]
    dense = all(t.is_contiguous() for t in tensors)
    return compiled.unsupported(*tensors) or (None if dense else "the kernel needs contiguous tensors")


@torch.no_grad()
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    is_threshold: Sequence[int],
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    penalty: float = 0.0,
    max_norm: float | None = None,
    extra_norm2: float = 0.0,
    write_grad: bool = False,
    backend: Kernel = "auto",
    check: bool = True,
) -> Tensor:
    """One SGD step in place, in the arithmetic of :func:`torch.nn.utils.clip_grad_norm_` and :class:`torch.optim.SGD`.

    In this order: ``-penalty * exp(-p)`` is added to the gradient of every threshold; if ``max_norm`` is given, the
    gradients are multiplied by ``min(1, max_norm / (norm + 1e-6))``; then ``g += weight_decay * p``,
    ``buf = momentum * buf + g``, ``p -= lr * buf``.

    Args:
        params: tensors of one dtype, updated in place.
        grads: their gradients, used as scratch: their content is lost unless ``write_grad``.
        momenta: their momentum buffers, updated in place; zeros are a fresh buffer (torch's first step ``buf = g`` is
            ``momentum * 0 + g``). Empty when ``momentum`` is 0.
        is_threshold: per parameter 1 for a threshold, else 0.
        lr, momentum, weight_decay: as in SGD.
        penalty: coefficient of ``sum exp(-tau)`` (SpaFL, arXiv 2406.00431), any warm-up included.
        max_norm: bound of the global gradient norm; None for no clipping.
        extra_norm2: sum of squares of gradient entries that are in no tensor here but belong to the global norm.
        write_grad: leave in ``grads`` what torch would: penalty added and clipped.
        backend: see :mod:`spafl_kernels.ops`. The compiled kernel serves contiguous float32 and float64 on the CPU and
            gives the same bits on every instruction set.
        check: False skips the argument checks of the compiled path that the kernel repeats anyway.

    Returns:
        The gradient norm before clipping, a scalar tensor in the dtype of ``params``. Without ``max_norm`` it is not
        computed and is the root of ``extra_norm2``.

    Raises:
        ValueError: numbers out of range, lists of different lengths, shapes that do not fit.
        RuntimeError: ``backend="native"`` where the kernel cannot be used.
    """
    if check:
        _check_numbers(lr, momentum, weight_decay, penalty, max_norm)
        _check_tensors(params, grads, momenta, is_threshold)
        if bool(momenta) != (momentum != 0):
            raise ValueError(f"momenta must be given exactly when momentum is not 0; got {len(momenta)}, {momentum!r}")
    if compiled.use_native("sgd_step", backend, lambda: _unsupported(params, grads, momenta)):
        return torch.ops.spafl.sgd_step(
            params, grads, momenta, is_threshold, lr, momentum, weight_decay, penalty,
            -1.0 if max_norm is None else max_norm, extra_norm2, write_grad,
        )  # fmt: skip
    if penalty:
        for param, grad, threshold in zip(params, grads, is_threshold):
            if threshold:
                reference.add_penalty_gradient_(grad, param, penalty)
    norm2 = torch.as_tensor(extra_norm2, dtype=params[0].dtype, device=params[0].device)
    if max_norm is not None:
        norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
        norm2 = norm2 + norms.square().sum()
    norm = norm2.sqrt()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(grads), scale)
    # The kernel's contract is that grads are scratch; leaving them clipped here costs nothing extra.
    for i, (param, grad) in enumerate(zip(params, grads)):
        if weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        if momentum:
            grad = momenta[i].mul_(momentum).add_(grad)
        param.add_(grad, alpha=-lr)
    return norm


@compiled.registers
def _register() -> None:
    @library.register_fake("spafl::sgd_step")
    def _(
        params: list[Tensor],
        grads: list[Tensor],
        momenta: list[Tensor],
        is_threshold: list[int],
        lr: float,
        momentum: float,
        weight_decay: float,
        penalty: float,
        max_norm: float,
        extra_norm2: float,
        write_grad: bool,
    ) -> Tensor:
        return params[0].new_empty(())

"""Everything of a training step that comes after the backward pass, for all layers in one call.

The arithmetic is small, but in separate operators it is some fifteen calls per layer, more time than the arithmetic
itself for small models; and every one of them reads the weights from memory again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, library

from .. import reference
from ..reference import Estimator
from . import compiled
from .compiled import Kernel
from .sgd import _check_numbers, _check_tensors, _unsupported

_MOMENTA = ("weight_momenta", "dropped_momenta", "threshold_momenta")


@dataclass
class FilterRows:
    """The threshold layers of a step; every field has one entry per layer.

    Only some filters of a layer need be stored (the kept ones of a compact layer), and of these only some columns may
    have a gradient. Tensors are contiguous and of one dtype, and are updated in place.

    Args:
        weights: ``(rows or more, ...)``: the stored filters' columns that have a gradient. Rows behind the stored
            filters are padding and left alone.
        thresholds: ``(filters,)``: of all filters, stored or not.
        scores: ``(filters,)``: of the forward pass; overwritten for the stored filters by those of the new weights.
        masks: ``(filters,)``, bool or uint8: of the forward pass; overwritten by ``score > threshold``.
        n_in: length of a whole row.
        index: int64 ``(rows,)``: which filter each row is, none twice; by default all filters are stored, in order.
        dropped: ``(rows or more, dropped columns...)``: the stored filters' other columns; an empty tensor if none.
        estimators: ``"identity"`` (default) or ``"window"``; the window looks at ``scores`` as they come in.
        weight_momenta, dropped_momenta, threshold_momenta: buffers of the same shapes; empty lists without momentum.

    Raises:
        ValueError: an unknown estimator.
    """

    weights: list[Tensor]
    thresholds: list[Tensor]
    scores: list[Tensor]
    masks: list[Tensor]
    n_in: list[int]
    index: list[Tensor] = field(default_factory=list)
    dropped: list[Tensor] = field(default_factory=list)
    estimators: list[Estimator] = field(default_factory=list)
    weight_momenta: list[Tensor] = field(default_factory=list)
    dropped_momenta: list[Tensor] = field(default_factory=list)
    threshold_momenta: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for estimator in self.estimators:
            reference.check_estimator(estimator)
        self.index = self.index or [torch.arange(len(t), device=t.device) for t in self.thresholds]
        self.none = [w.new_empty(0) for w in self.weights]
        self.dropped = self.dropped or self.none
        self.estimators = self.estimators or ["identity"] * len(self.weights)
        self.window = [int(e == "window") for e in self.estimators]
        if self.weight_momenta and not self.dropped_momenta:
            self.dropped_momenta = [torch.zeros_like(d) for d in self.dropped]

    def check(self, momentum: float) -> None:
        """Raise ``ValueError`` unless lengths, shapes and indices fit; ``momentum`` says whether buffers are needed."""
        if not self.weights:
            raise ValueError("weights must hold at least one layer")
        for name in ("thresholds", "scores", "masks", "n_in", "index", "dropped", "estimators", *_MOMENTA):
            want = 0 if name in _MOMENTA and not momentum else len(self.weights)
            if len(getattr(self, name)) != want:
                raise ValueError(f"{name} must have {want} entries; got {len(getattr(self, name))}")
        for i, (weight, dropped, index) in enumerate(zip(self.weights, self.dropped, self.index)):
            filters, rows = self.thresholds[i].numel(), len(index)
            if weight.dim() < 1 or weight.shape[0] < rows:
                raise ValueError(f"weights[{i}] must have at least {rows} rows; got shape {tuple(weight.shape)}")
            if dropped.numel() and dropped.shape[0] < rows:
                raise ValueError(f"dropped[{i}] must have at least {rows} rows; got shape {tuple(dropped.shape)}")
            if index.dtype != torch.int64 or (rows and not 0 <= int(index.min()) <= int(index.max()) < filters):
                raise ValueError(f"index[{i}] must be int64 in [0, {filters}); got {index.dtype} {index.tolist()}")
            if len(index.unique()) != rows:
                raise ValueError(f"index[{i}] must not hold a filter twice; got {index.tolist()}")
            for name in ("thresholds", "scores", "masks", *(("threshold_momenta",) if momentum else ())):
                shape = getattr(self, name)[i].shape
                if shape != (filters,):
                    raise ValueError(f"{name}[{i}] must have shape ({filters},); got {tuple(shape)}")
            if self.masks[i].dtype not in (torch.bool, torch.uint8):
                raise ValueError(f"masks[{i}] must be bool or uint8; got {self.masks[i].dtype}")
            if self.n_in[i] < 1:
                raise ValueError(f"n_in[{i}] must be positive; got {self.n_in[i]}")
            for name, like in (("weight_momenta", weight), ("dropped_momenta", dropped)) if momentum else ():
                shape = getattr(self, name)[i].shape
                if shape != like.shape:
                    raise ValueError(f"{name}[{i}] must have shape {tuple(like.shape)}; got {tuple(shape)}")

    def check_gradients(self, grads: Sequence[Tensor], dropped_grads: Sequence[Tensor], dots: Sequence[Tensor]) -> None:
        """Raise ``ValueError`` unless the gradients of a step fit."""
        for name, tensors, likes in (("grads", grads, self.weights), ("dropped_grads", dropped_grads, self.dropped)):
            if len(tensors) != len(self.weights):
                raise ValueError(f"{name} must have {len(self.weights)} entries; got {len(tensors)}")
            for i, (grad, like) in enumerate(zip(tensors, likes)):
                if grad.numel() and grad.shape != like.shape:
                    shapes = f"{tuple(like.shape)}; got {tuple(grad.shape)}"
                    raise ValueError(f"{name}[{i}] must be empty or have shape {shapes}")
        if len(dots) != len(self.weights):
            raise ValueError(f"dots must have {len(self.weights)} entries; got {len(dots)}")
        for i, (dot, index) in enumerate(zip(dots, self.index)):
            if dot.numel() and (dot.dim() != 1 or len(dot) < len(index)):
                raise ValueError(f"dots[{i}] must be empty or have shape ({len(index)},); got {tuple(dot.shape)}")


@torch.no_grad()
def threshold_step(
    rows: FilterRows,
    grads: Sequence[Tensor],
    params: Sequence[Tensor] = (),
    param_grads: Sequence[Tensor] = (),
    momenta: Sequence[Tensor] = (),
    is_threshold: Sequence[int] = (),
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    penalty: float = 0.0,
    max_norm: float | None = None,
    extra_norm2: float = 0.0,
    dropped_grads: Sequence[Tensor] | None = None,
    dots: Sequence[Tensor] | None = None,
    write_grad: bool = False,
    backend: Kernel = "auto",
    check: bool = True,
) -> tuple[Tensor, Tensor]:
    """Complete the gradients of filters and thresholds, clip, update by SGD, and find the new scores and masks.

    With ``G`` the gradients given, ``r_i = sum_j G_ij w_ij`` and ``h`` the estimator (reference.py): stored weights get
    ``G_ij + h_i r_i sign(w_ij) / n_in`` (``G = 0`` where none is given) and thresholds
    ``-h_i r_i - penalty exp(-tau_i)``, with ``r_i = 0`` for filters that are not stored. All of these and
    ``params`` take one step as in :func:`sgd_step`, clipped by their common norm. Last come the new scores of the
    stored filters, over the whole row, and the masks of all.

    Args:
        rows: the threshold layers.
        grads: per layer the gradient of ``weights`` (its shape), which is that of the masked weight; used as scratch.
            An empty tensor for filters without gradient.
        params, param_grads, momenta, is_threshold: all other parameters, as in :func:`sgd_step`.
        lr, momentum, weight_decay, penalty, max_norm, extra_norm2, write_grad: as in :func:`sgd_step`.
        dropped_grads: per layer the gradient of ``dropped``, or an empty tensor; used as scratch.
        dots: per layer ``r_i`` ``(rows or more,)``, or an empty tensor where it is to be computed from the gradients.
            For filters whose ``r_i`` has terms that the gradients do not show (pruned filters that were computed).
        backend: see :mod:`spafl_kernels.ops`. The compiled kernel serves contiguous float32 and float64 on the CPU and
            gives the same bits on every instruction set.
        check: False skips the argument checks of the compiled path that the kernel repeats anyway.

    Returns:
        ``(norm, flips)``: the gradient norm before clipping (scalar, dtype of the weights; the root of ``extra_norm2``
        without ``max_norm``), and int64 ``(layers,)``, the number of filters of each layer whose mask changed.

    Raises:
        ValueError: numbers out of range, lists of different lengths, shapes that do not fit.
        RuntimeError: ``backend="native"`` where the kernel cannot be used.
    """
    dots = rows.none if dots is None else dots
    dropped_grads = rows.none if dropped_grads is None else dropped_grads
    if check:
        _check_numbers(lr, momentum, weight_decay, penalty, max_norm)
        rows.check(momentum)
        rows.check_gradients(grads, dropped_grads, dots)
        if params:
            _check_tensors(params, param_grads, momenta, is_threshold)
    bound = -1.0 if max_norm is None else max_norm

    def unsupported() -> str | None:
        r = rows
        return _unsupported(
            r.weights, grads, r.weight_momenta, r.dropped, dropped_grads, r.dropped_momenta, r.thresholds,
            r.threshold_momenta, dots, r.scores, params, param_grads, momenta,
        )  # fmt: skip

    if compiled.use_native("threshold_step", backend, unsupported):
        return torch.ops.spafl.threshold_step(
            rows.weights, grads, rows.weight_momenta, rows.dropped, dropped_grads, rows.dropped_momenta,
            rows.thresholds, rows.threshold_momenta, dots, rows.index, rows.scores, rows.masks, rows.n_in, rows.window,
            params, param_grads, momenta, is_threshold, lr, momentum, weight_decay, penalty, bound, extra_norm2,
            write_grad,
        )  # fmt: skip
    return _twin(
        rows, grads, dropped_grads, dots, params, param_grads, momenta, is_threshold, lr, momentum, weight_decay,
        penalty, bound, extra_norm2,
    )  # fmt: skip


def _row_matrix(tensor: Tensor, count: int) -> Tensor:
    """The first ``count`` rows as a matrix (a view)."""
    return tensor[:count].reshape(count, tensor[:1].numel())


def _twin(
    rows: FilterRows,
    grads: Sequence[Tensor],
    dropped_grads: Sequence[Tensor],
    dots: Sequence[Tensor],
    params: Sequence[Tensor],
    param_grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    is_threshold: Sequence[int],
    lr: float,
    momentum: float,
    weight_decay: float,
    penalty: float,
    bound: float,
    extra_norm2: float,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, layer by layer."""
    todo: list[tuple[Tensor, Tensor, Tensor | None]] = []  # parameter, gradient, momentum
    for i, (threshold, index) in enumerate(zip(rows.thresholds, rows.index)):
        count = len(index)
        parts = [
            (_row_matrix(weight, count), _row_matrix(grad, count) if grad.numel() else None, buffers)
            for weight, grad, buffers in (
                (rows.weights[i], grads[i], rows.weight_momenta),
                (rows.dropped[i], dropped_grads[i], rows.dropped_momenta),
            )
            if count and weight.numel()
        ]
        dot = threshold.new_zeros(count)
        if dots[i].numel():
            dot = dots[i][:count].clone()
        else:
            for weight, grad, _ in parts:
                dot = dot if grad is None else dot + (grad * weight).sum(1)
        if rows.window[i]:
            margin = (rows.scores[i] - threshold)[index]
            dot = dot.masked_fill(margin.abs() <= reference.WINDOW, 0)
        a = (dot / rows.n_in[i]).unsqueeze(1)
        for weight, grad, buffers in parts:
            signs = a * weight.sign()
            todo.append(
                (
                    weight,
                    signs if grad is None else grad.add_(signs),
                    _row_matrix(buffers[i], count) if momentum else None,
                )
            )
        tau_grad = torch.zeros_like(threshold)
        if penalty:
            reference.add_penalty_gradient_(tau_grad, threshold, penalty)
        tau_grad.index_add_(0, index, dot, alpha=-1)
        todo.append((threshold, tau_grad, rows.threshold_momenta[i] if momentum else None))
    for i, (param, grad, penalised) in enumerate(zip(params, param_grads, is_threshold)):
        if penalised and penalty:
            reference.add_penalty_gradient_(grad, param, penalty)
        todo.append((param, grad, momenta[i] if momentum else None))
    norm2 = torch.as_tensor(extra_norm2, dtype=rows.weights[0].dtype, device=rows.weights[0].device)
    if bound >= 0:
        norm2 = norm2 + sum(grad.square().sum() for _, grad, _ in todo)
    norm = norm2.sqrt()
    for param, grad, buffer in todo:
        if bound >= 0:
            grad.mul_((bound / (norm + 1e-6)).clamp(max=1.0))
        if weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        if buffer is not None:
            grad = buffer.mul_(momentum).add_(grad)
        param.add_(grad, alpha=-lr)
    flips = []
    for i, (threshold, index) in enumerate(zip(rows.thresholds, rows.index)):
        total = threshold.new_zeros(len(index))
        for weight in (rows.weights[i], rows.dropped[i]):
            if len(index) and weight.numel():
                total += _row_matrix(weight, len(index)).abs().sum(1)
        rows.scores[i][index] = total / rows.n_in[i]
        mask = rows.scores[i] > threshold
        flips.append((mask != rows.masks[i].bool()).sum())
        rows.masks[i].copy_(mask)
    return norm, torch.stack(flips)


@compiled.registers
def _register() -> None:
    @library.register_fake("spafl::threshold_step")
    def _(weights: list[Tensor], *_: object) -> tuple[Tensor, Tensor]:
        return weights[0].new_empty(()), weights[0].new_empty(len(weights), dtype=torch.int64)

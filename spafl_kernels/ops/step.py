"""Everything of a training step that comes after the backward pass, for all layers in one call.

The arithmetic is small, but in separate operators it is some fifteen calls per layer, more time than the arithmetic
itself for small models; and every one of them reads the weights from memory again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import reference
from ..reference import Estimator
from . import _backend
from ._backend import Backend
from .sgd import _check_numbers, _check_tensors, _unsupported


@dataclass
class FilterRows:
    """The filters whose weights and thresholds a step updates; every field has one entry per group of filters.

    A group is some filters of one layer: those kept, or those pruned (which have no gradient, but momentum, weight
    decay and the penalty move them). Tensors are contiguous and of one dtype, and are updated in place.

    Args:
        weights: ``(rows or more, ...)``: the stored columns. Rows behind the filters are padding and left alone.
        thresholds: ``(rows,)``.
        scores: ``(rows,)``: of the forward pass; overwritten by those of the new weights.
        masks: ``(rows,)``, bool or uint8: of the forward pass; overwritten by the new ones.
        n_in: length of a whole row.
        dropped: ``(rows, dropped columns)``: the columns that are not in ``weights``, whose only gradient is the sign
            term; an empty tensor where there are none.
        weight_momenta, dropped_momenta, threshold_momenta: buffers of the same shapes; empty lists without momentum.
    """

    weights: list[Tensor]
    thresholds: list[Tensor]
    scores: list[Tensor]
    masks: list[Tensor]
    n_in: list[int]
    dropped: list[Tensor] = field(default_factory=list)
    weight_momenta: list[Tensor] = field(default_factory=list)
    dropped_momenta: list[Tensor] = field(default_factory=list)
    threshold_momenta: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.dropped:
            self.dropped = [w.new_empty(0) for w in self.weights]
        if self.weight_momenta and not self.dropped_momenta:
            self.dropped_momenta = [torch.zeros_like(d) for d in self.dropped]

    def check(self, momentum: float) -> None:
        """Raise ``ValueError`` unless lengths and shapes fit."""
        if not self.weights:
            raise ValueError("weights must hold at least one group of filters")
        optional = ("weight_momenta", "dropped_momenta", "threshold_momenta")
        for name in ("thresholds", "scores", "masks", "n_in", "dropped", *optional):
            want = 0 if name in optional and not momentum else len(self.weights)
            if len(getattr(self, name)) != want:
                raise ValueError(f"{name} must have {want} entries; got {len(getattr(self, name))}")
        for i, weight in enumerate(self.weights):
            rows = len(self.thresholds[i])
            if weight.dim() < 1 or weight.shape[0] < rows:
                raise ValueError(f"weights[{i}] must have at least {rows} rows; got shape {tuple(weight.shape)}")
            for name in ("scores", "masks", *(("threshold_momenta",) if momentum else ())):
                shape = getattr(self, name)[i].shape
                if shape != (rows,):
                    raise ValueError(f"{name}[{i}] must have shape ({rows},); got {tuple(shape)}")
            if self.masks[i].dtype not in (torch.bool, torch.uint8):
                raise ValueError(f"masks[{i}] must be bool or uint8; got {self.masks[i].dtype}")
            dropped = self.dropped[i]
            if dropped.numel() and dropped.shape[0] != rows:
                raise ValueError(f"dropped[{i}] must have {rows} rows; got shape {tuple(dropped.shape)}")
            if self.n_in[i] < 1:
                raise ValueError(f"n_in[{i}] must be positive; got {self.n_in[i]}")
            for name, like in (("weight_momenta", weight), ("dropped_momenta", dropped)) if momentum else ():
                shape = getattr(self, name)[i].shape
                if shape != like.shape:
                    raise ValueError(f"{name}[{i}] must have shape {tuple(like.shape)}; got {tuple(shape)}")


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
    estimator: Estimator = "identity",
    dots: Sequence[Tensor] | None = None,
    write_grad: bool = False,
    backend: Backend = "auto",
    check: bool = True,
) -> tuple[Tensor, Tensor]:
    """Complete the gradients of filters and thresholds, clip, update by SGD, and find the new scores and masks.

    With ``G`` the gradients given, ``r_i = sum_j G_ij w_ij`` and ``h`` the estimator (reference.py): weights get
    ``G_ij + h_i r_i sign(w_ij) / n_in``, dropped columns ``h_i r_i sign(w_ij) / n_in``, thresholds
    ``-h_i r_i - penalty exp(-tau_i)``. All of them and ``params`` then take one step as in :func:`sgd_step`, clipped by
    their common norm. Last come the new ``score_i``, over the whole row, and ``mask_i``.

    Args:
        rows: the filters.
        grads: per group the gradient of ``weights`` (its shape), which is that of the masked weight; used as scratch.
            An empty tensor for filters without gradient.
        params, param_grads, momenta, is_threshold: all other parameters, as in :func:`sgd_step`.
        lr, momentum, weight_decay, penalty, max_norm, extra_norm2, write_grad: as in :func:`sgd_step`.
        estimator: ``"identity"`` or ``"window"``; the window looks at ``rows.scores`` as they come in.
        dots: per group ``r_i`` ``(rows,)``, or an empty tensor where it is to be computed from ``grads``. For filters
            whose ``r_i`` has terms that ``grads`` does not show (pruned filters that were computed, constant inputs).
        backend: see :mod:`spafl_kernels.ops`. The compiled kernel serves contiguous float32 and float64 on the CPU and
            gives the same bits on every instruction set.
        check: False skips the argument checks of the compiled path that the kernel repeats anyway.

    Returns:
        ``(norm, flips)``: the gradient norm before clipping (scalar, dtype of the weights; the root of ``extra_norm2``
        without ``max_norm``), and int64 ``(groups,)``, the number of filters of each group whose mask changed.

    Raises:
        ValueError: numbers out of range, lists of different lengths, shapes that do not fit, an unknown estimator.
        RuntimeError: ``backend="native"`` where the kernel cannot be used.
    """
    if dots is None:
        dots = [w.new_empty(0) for w in rows.weights]
    if check:
        reference.check_estimator(estimator)
        _check_numbers(lr, momentum, weight_decay, penalty, max_norm)
        rows.check(momentum)
        for name, tensors in (("grads", grads), ("dots", dots)):
            if len(tensors) != len(rows.weights):
                raise ValueError(f"{name} must have {len(rows.weights)} entries; got {len(tensors)}")
        for i, (grad, dot) in enumerate(zip(grads, dots)):
            if grad.numel() and grad.shape != rows.weights[i].shape:
                shape = tuple(rows.weights[i].shape)
                raise ValueError(f"grads[{i}] must be empty or have shape {shape}; got {tuple(grad.shape)}")
            if dot.numel() and dot.shape != rows.thresholds[i].shape:
                shape = tuple(rows.thresholds[i].shape)
                raise ValueError(f"dots[{i}] must be empty or have shape {shape}; got {tuple(dot.shape)}")
        if params:
            _check_tensors(params, param_grads, momenta, is_threshold)
    bound = -1.0 if max_norm is None else max_norm

    def unsupported() -> str | None:
        r = rows
        return _unsupported(
            r.weights, grads, r.weight_momenta, r.dropped, r.dropped_momenta, r.thresholds, r.threshold_momenta,
            [d for d in dots if d.numel()], r.scores, params, param_grads, momenta,
        )  # fmt: skip

    if _backend.use_native("threshold_step", backend, unsupported):
        return torch.ops.spafl.threshold_step(
            rows.weights, grads, rows.weight_momenta, rows.dropped, rows.dropped_momenta, rows.thresholds,
            rows.threshold_momenta, dots, rows.scores, rows.masks, rows.n_in, params, param_grads, momenta,
            is_threshold, lr, momentum, weight_decay, penalty, bound, extra_norm2, estimator == "window", write_grad,
        )  # fmt: skip
    return _twin(
        rows, grads, params, param_grads, momenta, is_threshold, dots, lr, momentum, weight_decay, penalty, bound,
        extra_norm2, estimator == "window",
    )  # fmt: skip


def _twin(
    rows: FilterRows,
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    param_grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    is_threshold: Sequence[int],
    dots: Sequence[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    penalty: float,
    bound: float,
    extra_norm2: float,
    window: bool,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, layer by layer."""
    none = rows.weights[0].new_empty(0)
    todo: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, gradient, momentum
    for i, threshold in enumerate(rows.thresholds):
        count = len(threshold)
        if not count:
            continue
        weight = rows.weights[i].flatten(1)[:count] if rows.weights[i].dim() > 1 else rows.weights[i][:count, None]
        grad = grads[i].view(-1, weight.shape[1])[:count] if grads[i].numel() else None
        if dots[i].numel():
            dot = dots[i].clone()
        else:
            dot = threshold.new_zeros(count) if grad is None else (grad * weight).sum(1)
        if window:
            dot.masked_fill_((rows.scores[i] - threshold).abs() <= reference.WINDOW, 0)
        a = (dot / rows.n_in[i]).unsqueeze(1)
        signs = a * weight.sign()
        grad = signs if grad is None else grad.add_(signs)
        tau_grad = -dot - penalty * torch.exp(-threshold) if penalty else -dot
        buffers = (rows.weight_momenta, rows.threshold_momenta, rows.dropped_momenta)
        of_weight, of_threshold, of_dropped = (b[i] if momentum else none for b in buffers)
        todo.append((weight, grad, of_weight.view(-1, weight.shape[1])[:count] if momentum else none))
        todo.append((threshold, tau_grad, of_threshold))
        if rows.dropped[i].numel():
            dropped = rows.dropped[i].view(count, -1)
            todo.append((dropped, a * dropped.sign(), of_dropped.view(count, -1) if momentum else none))
    for i, (param, grad, threshold) in enumerate(zip(params, param_grads, is_threshold)):
        if threshold and penalty:
            grad.sub_(torch.exp(-param), alpha=penalty)
        todo.append((param, grad, momenta[i] if momentum else none))
    norm2 = torch.as_tensor(extra_norm2, dtype=none.dtype, device=none.device)
    if bound >= 0:
        norm2 = norm2 + sum(grad.square().sum() for _, grad, _ in todo)
    norm = norm2.sqrt()
    for param, grad, buffer in todo:
        if bound >= 0:
            grad.mul_((bound / (norm + 1e-6)).clamp(max=1.0))
        if weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        if momentum:
            grad = buffer.mul_(momentum).add_(grad)
        param.add_(grad, alpha=-lr)
    flips = []
    for i, threshold in enumerate(rows.thresholds):
        count = len(threshold)
        total = rows.weights[i][:count].abs().flatten(1).sum(1) if rows.weights[i].dim() > 1 else rows.weights[i].abs()
        if rows.dropped[i].numel():
            total = total + rows.dropped[i].view(count, -1).abs().sum(1)
        score = total[:count] / rows.n_in[i]
        mask = score > threshold
        flips.append((mask != rows.masks[i].bool()).sum())
        rows.scores[i].copy_(score)
        rows.masks[i].copy_(mask)
    return norm, torch.stack(flips)


@_backend.registers
def _register() -> None:
    @torch.library.register_fake("spafl::threshold_step")
    def _(weights: list[Tensor], *_: object) -> tuple[Tensor, Tensor]:
        return weights[0].new_empty(()), weights[0].new_empty(len(weights), dtype=torch.int64)

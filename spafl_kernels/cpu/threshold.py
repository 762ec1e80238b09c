"""Scores, masks and changes of every threshold layer of a model in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library

from . import compiled
from .compiled import Kernel


def _check(
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    rests: Sequence[Tensor] | None,
    n_in: Sequence[int] | None,
) -> None:
    if not weights:
        raise ValueError("weights must hold at least one layer")
    if rests is not None and n_in is None:
        raise ValueError("n_in must be given with rests: the stored columns do not tell the length of a row")
    named: list[tuple[str, Sequence[Tensor] | Sequence[int] | None]] = [
        ("thresholds", thresholds), ("scores", scores), ("masks", masks), ("rests", rests), ("n_in", n_in)
    ]  # fmt: skip
    for name, values in named:
        if values is not None and len(values) != len(weights):
            raise ValueError(f"{name} must have one entry per weight, {len(weights)}; got {len(values)}")
    for i, weight in enumerate(weights):
        rows = (weight.shape[0],) if weight.dim() else None
        for name, tensors in (("thresholds", thresholds), ("scores", scores), ("masks", masks), ("rests", rests or ())):
            if tensors and tensors[i].shape != rows:
                raise ValueError(
                    f"{name}[{i}] must have one value per filter, shape {rows}; got {tuple(tensors[i].shape)}"
                )
        if masks[i].dtype not in (torch.bool, torch.uint8):
            raise ValueError(f"masks[{i}] must be bool or uint8; got {masks[i].dtype}")
        if n_in is not None and n_in[i] < 1:
            raise ValueError(f"n_in[{i}] must be positive; got {n_in[i]}")


def _not_dense(tensors: Sequence[Tensor]) -> str | None:
    return None if all(t.is_contiguous() for t in tensors) else "the kernel needs contiguous tensors"


def _unsupported(floats: Sequence[Tensor], masks: Sequence[Tensor]) -> str | None:
    return compiled.unsupported(*floats) or _not_dense([*floats, *masks])


@torch.no_grad()
def threshold_pass(
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    rests: Sequence[Tensor] | None = None,
    n_in: Sequence[int] | None = None,
    backend: Kernel = "auto",
    check: bool = True,
) -> Tensor:
    """Scores and masks of all layers, written in place, and how many filters of each layer changed state.

    ``score_i = (sum_j |w_ij| + rest_i) / n_in``, ``mask_i = score_i > threshold_i`` (strict; a score that is not a
    number is pruned).

    Args:
        weights: per layer ``(out, ...)``, read as ``out`` rows. In a compact layer, the stored columns only.
        thresholds: per layer ``(out,)``, dtype of the weights.
        scores: per layer ``(out,)``, overwritten.
        masks: per layer ``(out,)``, bool or uint8 of 0 and 1: the previous mask, overwritten by the new one.
        rests: per layer ``(out,)``: sum of ``|w|`` over the columns of a row that ``weights`` does not hold.
        n_in: per layer the length of a whole row; by default the length of the rows given.
        backend: see :mod:`spafl_kernels.ops`. The compiled kernel serves contiguous float32 and float64 on the CPU.
            Its float32 sums have the same bits on every instruction set and are carried in double every 2048 numbers.
        check: False skips the argument checks of the compiled path that the kernel repeats anyway.

    Returns:
        int64 ``(layers,)``: filters whose mask changed.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, rests without n_in.
        RuntimeError: ``backend="native"`` where the kernel cannot be used.
    """
    if check:
        _check(weights, thresholds, scores, masks, rests, n_in)
    floats = [*weights, *thresholds, *scores, *(rests or ())]
    if compiled.use_native("threshold_pass", backend, lambda: _unsupported(floats, masks)):
        lengths = n_in if n_in is not None else [max(1, w.numel() // max(1, w.shape[0])) for w in weights]
        return torch.ops.spafl.threshold_pass(weights, thresholds, rests or (), lengths, scores, masks)
    flips = []
    for i, weight in enumerate(weights):
        rows = weight.flatten(1) if weight.dim() > 1 else weight.unsqueeze(1)
        total = rows.abs().sum(dim=1)
        if rests is not None:
            total = total + rests[i]
        score = total / (rows.shape[1] if n_in is None else n_in[i])
        mask = score > thresholds[i]
        flips.append((mask != masks[i].bool()).sum())
        scores[i].copy_(score)
        masks[i].copy_(mask)
    return torch.stack(flips)


@compiled.registers
def _register() -> None:
    @library.register_fake("spafl::threshold_pass")
    def _(
        weights: list[Tensor],
        thresholds: list[Tensor],
        rests: list[Tensor],
        n_in: list[int],
        scores: list[Tensor],
        masks: list[Tensor],
    ) -> Tensor:
        return weights[0].new_empty(len(weights), dtype=torch.int64)

"""Cohorts of clients on one device, each with its own model and batch: two of the ways to take all their steps."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from spafl_kernels import reference, threshold_layers
from spafl_kernels.gpu import choice, cuda_ops
from spafl_kernels.threshold_layer import Selected
from spafl_kernels.training import MaskedTrainer, SGDOptions

__all__ = ["Cohort", "Loop"]


def runs_triton(weight: Tensor) -> bool:
    """Whether the packed kernels run on this tensor: on a GPU, and on a CPU in Triton's interpreter."""
    return weight.dtype in choice.DTYPES and (weight.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """cuDNN's BatchNorm copies gradients in an order of memory that vmap refuses; PyTorch's own does not."""
    before = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)


class Cohort:
    """Clients trained together: parameters stacked, one gradient call for all, one update for all.

    Args:
        models: one per client, same architecture and device; copied.
        options: of the training.
        fused: whether the update runs in the CUDA kernel; else in PyTorch, on the stacked tensors.
    """

    def __init__(self, models: Sequence[nn.Module], options: SGDOptions, fused: bool) -> None:
        self.options, self.fused = options, fused
        self.skeleton = copy.deepcopy(models[0]).train()
        self.params = {
            n: torch.stack([dict(m.named_parameters())[n].detach() for m in models]).contiguous()
            for n, _ in models[0].named_parameters()
        }
        self.buffers = {
            n: torch.stack([dict(m.named_buffers())[n] for m in models]) for n, _ in models[0].named_buffers()
        }
        self.layers = [name for name, _ in threshold_layers(models[0])]
        self.velocity = {n: torch.zeros_like(p) for n, p in self.params.items()}
        names = [(f"{n}.weight", f"{n}.threshold") for n in self.layers]
        self.weights, self.thresholds = ([self.params[pair[i]] for pair in names] for i in (0, 1))
        first = self.weights[0]
        self.density = torch.ones(len(self.layers), len(models), device=first.device)  # in place: a graph reads it back
        self.passes = None
        if runs_triton(first):
            from spafl_kernels.gpu.triton import ModelPass

            (estimator,) = {layer.estimator for _, layer in threshold_layers(self.skeleton)}
            self.passes = ModelPass(self.weights, self.thresholds, estimator)
        listed = {n for pair in names for n in pair}
        self.names = [[pair[i] for pair in names] for i in (0, 1)] + [[n for n in self.params if n not in listed]]
        if fused:
            self.masks = cuda_ops.mask_state(self.weights)
            cuda_ops.threshold_pass(self.weights, self.thresholds, self.masks, compare=False)
            self.state = cuda_ops.step_state(
                self.weights, self.thresholds, [self.params[n] for n in self.names[2]], learning_rate=options.lr,
                penalty=options.penalty, momentum=options.momentum,
            )  # fmt: skip

    def _loss(self, params: Any, buffers: Any, selected: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        for name, value in selected.items():
            self.skeleton.get_submodule(name).selected = Selected(*value)  # type: ignore[assignment]
        loss = F.cross_entropy(functional_call(self.skeleton, (params, buffers), (x,)), y)
        return loss, buffers

    def _guard(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The collapse guard of every client; then the forward's pass: selection and packed weights."""
        floor = self.options.collapse_floor
        if floor is not None:
            for tau, collapsed in zip(self.thresholds, (self.density <= floor).unbind(), strict=True):
                tau.masked_fill_(collapsed.unsqueeze(1), 0.0)
        if self.passes is None:
            masks = (w.flatten(2).abs().mean(2) > t for w, t in zip(self.weights, self.thresholds, strict=True))
            torch.stack([mask.to(self.density.dtype).mean(1) for mask in masks], out=self.density)
            return {}
        selections = self.passes()
        self.passes.densities(self.density)
        return {n: (p.data, rows) for n, p, rows in zip(self.layers, selections, self.passes.packed, strict=True)}

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of every client; ``x`` and ``y`` with the client first. Returns the losses, ``(clients,)``."""
        selected = self._guard()
        gradient = vmap(grad_and_value(self._loss, has_aux=True), randomness="different")
        try:
            with _without_cudnn():
                grads, (losses, buffers) = gradient(self.params, self.buffers, selected, x, y)
        finally:
            for name in selected:  # what a layer holds belongs to the transform that is over
                self.skeleton.get_submodule(name).selected = None  # type: ignore[assignment]
        for name, value in buffers.items():
            self.buffers[name].copy_(value)
        self._update_fused(grads) if self.fused else self._update(grads)
        return losses

    def _update_fused(self, grads: dict[str, Tensor]) -> None:
        o, (weights, thresholds, others) = self.options, self.names
        cuda_ops.fused_step(
            self.weights, [grads[n].contiguous() for n in weights],
            self.thresholds, [grads[n].contiguous() for n in thresholds],
            [self.params[n] for n in others], [grads[n].contiguous() for n in others],
            self.state, self.masks, momentum=o.momentum, weight_decay=o.weight_decay, max_norm=o.max_grad_norm,
        )  # fmt: skip

    @torch.no_grad()
    def _update(self, grads: dict[str, Tensor]) -> None:
        o = self.options
        if o.penalty:
            for name in self.names[1]:
                grads[name] = reference.add_penalty_gradient_(grads[name].clone(), self.params[name], o.penalty)
        if o.max_grad_norm is not None:
            norm = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
            factor = (o.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            grads = {n: g * factor.view(-1, *(1,) * (g.dim() - 1)) for n, g in grads.items()}
        params, steps = list(self.params.values()), [grads[n] for n in self.params]
        if o.weight_decay:
            steps = torch._foreach_add(steps, params, alpha=o.weight_decay)
        if o.momentum:
            velocity = list(self.velocity.values())
            torch._foreach_mul_(velocity, o.momentum)
            torch._foreach_add_(velocity, steps)
            steps = velocity
        torch._foreach_add_(params, steps, alpha=-o.lr)


class Loop:
    """The same clients one after the other, each by the masked trainer on dense operators."""

    def __init__(self, models: Sequence[nn.Module], options: SGDOptions) -> None:
        self.models = [copy.deepcopy(m) for m in models]
        self.trainers = [MaskedTrainer(m) for m in self.models]
        for trainer in self.trainers:
            trainer.begin(options)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([t.step(a, b) for t, a, b in zip(self.trainers, x, y, strict=True)])

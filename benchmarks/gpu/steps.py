"""Whole training steps: of a model on one batch, and of a cohort of clients, each with its own model and batch.

A step is what :mod:`spafl_kernels.training` defines: collapse guard, forward, backward, penalty, clip, SGD, in the
settings of the published runs. Every provider starts from the same weights and is gated: after one step its parameters
are compared with those of the masked loop, and no time is reported where they differ.

Providers of a model:

dense    the plain dense model, plain SGD with the same clip: the rival
masked   the masked trainer on dense operators: what the published code does
ours     the masked trainer with the packed kernels in its layers
compact  the compact trainer; it asks the host whether a mask changed, so it has no graph

Providers of a cohort (times are per step of the whole cohort):

loop     the masked trainer on dense operators, client after client: what a simulator does
cohort   the packed kernels for all clients at once by ``torch.func.vmap``, and one update for all parameters: the fused
         CUDA kernel where the extension has it, else PyTorch on stacked tensors (named ``cohort-torch``)
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from spafl.models import build_model
from spafl_kernels import threshold_layers, to_dense
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.ops import backend, cuda_ops
from spafl_kernels.threshold_layer import Planned
from spafl_kernels.training import MaskedTrainer, SGDOptions, Trainer

from .clock import Device, in_words, measure
from .results import Row, finish

CLIENTS = 10


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a model was trained in the published runs."""

    sample: tuple[int, int, int]
    batch: int
    options: SGDOptions
    estimator: str


SETTINGS = {
    "lenet5": Setting((1, 28, 28), 64, SGDOptions(0.001, 0.9, penalty=0.002, collapse_floor=0.01), "identity"),
    "conv4": Setting(
        (3, 32, 32), 16, SGDOptions(0.01, 0.9, max_grad_norm=3, penalty=1.5e-4, collapse_floor=0.01), "window"
    ),
    "resnet18-full": Setting(
        (3, 32, 32), 16, SGDOptions(0.01, 0.9, max_grad_norm=15, penalty=7e-4, collapse_floor=0.01), "window"
    ),
    "vit": Setting(
        (3, 32, 32), 16, SGDOptions(0.01, 0.9, max_grad_norm=3, penalty=1e-4, collapse_floor=0.01), "window"
    ),
}
# Largest relative difference (root mean square) of a parameter's change in one step from that of the masked loop.
GATE = {"tf32": 5e-2, "fp32": 2e-3, "fp64": 1e-9}


def pruned_model(name: str, density: float, seed: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A model of this density in every layer, margins so wide that no mask changes while it is measured."""
    setting = SETTINGS[name]
    model = build_model(name, 10, setting.sample[0], seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            layer.estimator = setting.estimator  # type: ignore[assignment]
            score = layer.scores()
            factor = torch.full_like(score, 0.3)
            keep = max(1, round(density * len(score)))
            factor[torch.randperm(len(score), generator=generator)[keep:]] = 2.0
            layer.threshold.copy_(score * factor)
    return model.to(device).to(memory_format=torch.channels_last)


def batches(name: str, clients: int, batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(clients, batch, C, H, W)`` noise and its labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(clients, batch, *SETTINGS[name].sample, generator=generator, dtype=dtype)
    y = torch.randint(10, (clients, batch), generator=generator)
    return x.to(device), y.to(device)


# ------------------------------------------------------------------------------------------------ rows
@dataclasses.dataclass(frozen=True)
class Provider:
    """A way to take a step. ``change`` takes one and says how far each parameter moved; None: nothing to compare."""

    name: str
    request: backend.Request
    make: Callable[[], Any]
    change: Callable[[], dict[str, Tensor]] | None
    graph: bool = True


@dataclasses.dataclass(frozen=True)
class What:
    """What a step is of: ``kind`` is ``step`` or ``cohort``."""

    kind: str
    model: str
    clients: int
    batch: int
    dtype: str
    density: float

    def row(self, provider: str, graph: bool, gate: str) -> Row:
        """The row of a provider without its times."""
        return {
            "kind": self.kind, "model": self.model, "layer": "all", "clients": self.clients, "batch": self.batch,
            "dtype": self.dtype, "density": self.density, "mode": "step", "provider": provider, "graph": int(graph),
            "gate": gate, "one_over_density": round(1 / self.density, 3),
        }  # fmt: skip

    def failed(self, provider: str, problem: Exception) -> Row:
        """The row of a provider that could not even take one step."""
        return {**self.row(provider, False, "-"), "error": in_words(problem)}


def rows_of(
    device: Device, what: What, providers: Sequence[Provider], x: Tensor, y: Tensor, graphs: Sequence[bool],
    rival: str, rival_us: dict[bool, float],
) -> Iterator[Row]:  # fmt: skip
    """Rows of these providers; the first with a change to compare is the definition that gates the others.

    ``rival_us``: times of ``rival``, eager and in a graph, that speed-ups are over; filled when it is measured.
    """
    want: dict[str, Tensor] = {}
    for provider in providers:
        with backend.requesting(provider.request):
            gate = "-"
            try:
                if provider.change is not None:
                    got = provider.change()
                    want = want or got
                    error = difference(got, want)
                    gate = "pass" if error < GATE[what.dtype] else f"fail {error:.1e}"
                runner = provider.make()
            except Exception as problem:
                yield what.failed(provider.name, problem)
                continue
            for graph in graphs:
                if graph and not provider.graph:
                    continue
                row = what.row(provider.name, graph, gate)
                if not gate.startswith("fail"):
                    row.update(measure(device, lambda runner=runner: runner.step(x, y), graph))  # type: ignore[misc]
                us = row.get("us")
                if provider.name == rival and isinstance(us, float):
                    rival_us[graph] = us
                yield finish(row, rival_us.get(graph))


# ------------------------------------------------------------------------------------------------ one model
class DenseTrainer:
    """A plain model by plain SGD: what a step costs without thresholds."""

    def __init__(self, model: nn.Module, options: SGDOptions) -> None:
        self.model, self.options = to_dense(model).train(), options
        self.optimizer = torch.optim.SGD(self.model.parameters(), options.lr, options.momentum)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        if self.options.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self.optimizer.step()
        return loss.detach()


def opened(trainer: Trainer, options: SGDOptions) -> Trainer:
    trainer.begin(options)
    return trainer


def trained(model: nn.Module, trainer: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By how much each parameter of ``model`` changes in one step, in float64."""
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    trainer.step(x, y)
    trainer.finish()
    return {n: p.detach().double() - before[n] for n, p in model.named_parameters()}


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative root mean square difference over all parameters, infinite where one is not finite.

    A parameter that hardly moves is measured against the typical change of all: thresholds in front of a BatchNorm
    have gradients that cancel to rounding noise.
    """
    typical = float(torch.cat([w.flatten() for w in want.values()]).square().mean().sqrt())
    worst = 0.0
    for name, w in want.items():
        error = float((got[name] - w).square().mean().sqrt()) / max(float(w.square().mean().sqrt()), typical, 1e-30)
        worst = max(worst, error) if error == error else float("inf")
    return worst


def model_rows(
    device: Device, name: str, batch: int, dtype: str, densities: Sequence[float], graphs: Sequence[bool]
) -> Iterator[Row]:
    """Rows of the training steps of one model at one batch size; dense first."""
    options, kind = SETTINGS[name].options, torch.float64 if dtype == "fp64" else torch.float32
    x, y = (t[0] for t in batches(name, 1, batch, device.where, kind))
    x = x.contiguous(memory_format=torch.channels_last)
    dense_us: dict[bool, float] = {}
    for density in sorted({1.0, *densities}, reverse=True):
        stock = pruned_model(name, density, 0, device.where, kind)

        def make(provider: str, stock: nn.Module = stock) -> tuple[nn.Module, Any]:
            model = copy.deepcopy(stock)
            if provider == "dense":
                return model, DenseTrainer(model, options)
            trainer = CompactTrainer(model, strict=True) if provider == "compact" else MaskedTrainer(model)
            return model, opened(trainer, options)

        def offered(provider: str, make: Any = make) -> Provider:
            change = None if provider == "dense" else lambda: trained(*make(provider), x, y)
            request: backend.Request = "triton" if provider == "ours" else "reference"
            return Provider(provider, request, lambda: make(provider)[1], change, graph=provider != "compact")

        names = ("dense", "masked", "ours", "compact") if density == 1.0 else ("masked", "ours", "compact")
        what = What("step", name, 1, batch, dtype, density)
        yield from rows_of(device, what, [offered(n) for n in names], x, y, graphs, "dense", dense_us)


# ------------------------------------------------------------------------------------------------ a cohort
def runs_triton(weight: Tensor) -> bool:
    """Whether the packed kernels run on this tensor: on a GPU, and on a CPU in Triton's interpreter."""
    return weight.dtype in backend.DTYPES and (weight.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


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
            from spafl_kernels.triton import ModelPass

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

    def _loss(self, params: Any, buffers: Any, planned: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        for name, value in planned.items():
            self.skeleton.get_submodule(name).planned = Planned(*value)  # type: ignore[assignment]
        loss = F.cross_entropy(functional_call(self.skeleton, (params, buffers), (x,)), y)
        return loss, buffers

    def _guard(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The collapse guard of every client; then the pass of the forward that follows: plan and packed weights."""
        floor = self.options.collapse_floor
        if floor is not None:
            for tau, collapsed in zip(self.thresholds, (self.density <= floor).unbind(), strict=True):
                tau.masked_fill_(collapsed.unsqueeze(1), 0.0)
        if self.passes is None:
            masks = (w.flatten(2).abs().mean(2) > t for w, t in zip(self.weights, self.thresholds, strict=True))
            torch.stack([mask.to(self.density.dtype).mean(1) for mask in masks], out=self.density)
            return {}
        plans = self.passes()
        self.passes.densities(self.density)
        return {n: (p.data, rows) for n, p, rows in zip(self.layers, plans, self.passes.packed, strict=True)}

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of every client; ``x`` and ``y`` with the client first. Returns the losses, ``(clients,)``."""
        planned = self._guard()
        gradient = vmap(grad_and_value(self._loss, has_aux=True), randomness="different")
        try:
            grads, (losses, buffers) = gradient(self.params, self.buffers, planned, x, y)
        finally:
            for name in planned:  # what a layer holds belongs to the transform that is over
                self.skeleton.get_submodule(name).planned = None  # type: ignore[assignment]
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
                grads[name] = grads[name] - o.penalty * torch.exp(-self.params[name])
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
        self.trainers = [opened(MaskedTrainer(m), options) for m in self.models]

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([t.step(a, b) for t, a, b in zip(self.trainers, x, y, strict=True)])


def changes(runner: Cohort | Loop, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By how much each parameter changes in one step, clients stacked, in float64."""

    def now() -> dict[str, Tensor]:
        if isinstance(runner, Cohort):
            return {n: p.double().clone() for n, p in runner.params.items()}
        parameters = [dict(m.named_parameters()) for m in runner.models]
        return {n: torch.stack([p[n].detach().double() for p in parameters]) for n in parameters[0]}

    before = now()
    runner.step(x, y)
    return {n: p - before[n] for n, p in now().items()}


def cohort_rows(
    device: Device, name: str, clients: int, batch: int, dtype: str, densities: Sequence[float],
    graphs: Sequence[bool],
) -> Iterator[Row]:  # fmt: skip
    """Rows of one cohort; ``speedup_vs_dense`` is over the loop, eager or in a graph as the row itself."""
    options, kind = SETTINGS[name].options, torch.float64 if dtype == "fp64" else torch.float32
    x, y = batches(name, clients, batch, device.where, kind)
    fused = device.where == "cuda" and cuda_ops.available()
    for density in sorted(set(densities), reverse=True):
        models = [pruned_model(name, density, seed, device.where, kind) for seed in range(clients)]
        makers: dict[str, Callable[[], Cohort | Loop]] = {"loop": lambda models=models: Loop(models, options)}  # type: ignore[misc]
        if fused:
            makers["cohort"] = lambda models=models: Cohort(models, options, True)  # type: ignore[misc]
        makers["cohort-torch"] = lambda models=models: Cohort(models, options, False)  # type: ignore[misc]

        def offered(provider: str, make: Callable[[], Cohort | Loop]) -> Provider:
            request: backend.Request = "reference" if provider == "loop" else "triton"
            return Provider(provider, request, make, lambda: changes(make(), x, y))

        providers = [offered(provider, make) for provider, make in makers.items()]
        what = What("cohort", name, clients, batch, dtype, density)
        yield from rows_of(device, what, providers, x, y, graphs, "loop", {})


def warm(kind: str, name: str, batch: int, device: str) -> None:
    """Compile the kernels of a step, or of a cohort's step, by taking one."""
    clients = CLIENTS if kind == "cohort" else 1
    x, y = batches(name, clients, batch, device, torch.float32)
    models = [pruned_model(name, 0.5, seed, device, torch.float32) for seed in range(clients)]
    with backend.requesting("triton"):
        if kind == "cohort":
            Cohort(models, SETTINGS[name].options, False).step(x, y)
        else:
            opened(MaskedTrainer(models[0]), SETTINGS[name].options).step(x[0], y[0])

"""Whole training steps: of a model on one batch, and of a cohort of clients, each with its own model and batch.

A step is what :mod:`spafl_kernels.training` defines: collapse guard, forward, backward, penalty, clip, SGD, in the
settings of the published runs. Every provider starts from the same weights and is gated: after one step its parameters
are compared with those of the masked loop in float64, and no time is reported where they differ.

Providers of a model:

dense    the plain dense model, plain SGD with the same clip: the rival
masked   the masked trainer on dense operators: what the published code does
ours     the same trainer with the packed kernels in its layers: nothing is masked
compact  the compact trainer; it asks the host whether a mask changed, so it has no graph
compact-fixed  its steps under the plan of the first masks, which ask nothing (:mod:`.captured`)

Providers of a cohort (times are per step of the whole cohort):

loop     the masked trainer on dense operators, client after client: what a simulator does
cohort   the packed kernels for all clients at once by ``torch.func.vmap``, and one update for all parameters: the fused
         CUDA kernel where the extension has it, else PyTorch on stacked tensors (named ``cohort-torch``)
compact-graph    steps under fixed plans, client after client: in a graph one chain of all their kernels
compact-streams  the same on a stream for every client: in a graph as many branches
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spafl.models import build_model
from spafl_kernels import backend, threshold_layers, to_dense
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.gpu import cuda_ops
from spafl_kernels.training import MaskedTrainer, SGDOptions, Trainer

from .captured import CapturedCohort, CapturedCompact
from .clock import Device, in_words, measure
from .cohort import Cohort, Loop
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
# Largest relative difference (root mean square) of a parameter's change in one step from that of the masked loop in
# float64. Rounding alone may take more: gradients of thresholds are sums that cancel, so a step is also right if it is
# no further from float64 than SLACK times the masked loop in the same arithmetic, if that is below LIMIT gates.
GATE = {"tf32": 5e-2, "fp32": 2e-3, "fp64": 1e-9}
SLACK, LIMIT = 2.0, 4.0


def pruned_model(name: str, density: float, seed: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A model of this density in every layer, margins so wide that no mask changes while it is measured."""
    setting = SETTINGS[name]
    model = pruned(build_model(name, 10, setting.sample[0], seed).to(dtype), density, seed, setting.estimator)
    return model.to(device).to(memory_format=torch.channels_last)


@torch.no_grad()
def pruned(model: nn.Module, density: float, seed: int, estimator: str) -> nn.Module:
    """``model``, of which every layer keeps this share of filters, at random and by wide margins."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in threshold_layers(model):
        layer.estimator = estimator  # type: ignore[assignment]
        score = layer.scores()
        factor = torch.full_like(score, 0.3)
        keep = max(1, round(density * len(score)))
        factor[torch.randperm(len(score), generator=generator)[keep:]] = 2.0
        layer.threshold.copy_(score * factor)
    return model


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
    rival: str, rival_us: dict[bool, float], definition: Callable[[], dict[str, Tensor]],
) -> Iterator[Row]:  # fmt: skip
    """Rows of these providers; the first with a change to compare is the masked loop.

    ``rival_us``: times of ``rival``, eager and in a graph, that speed-ups are over; filled when it is measured.
    ``definition``: how far each parameter moves in one step of the masked loop in float64.
    """
    bound = None
    with backend.requesting("reference"):
        want = definition()
    for provider in providers:
        with backend.requesting(provider.request):
            gate = "-"
            try:
                if provider.change is not None:
                    error, where = differs_most(provider.change(), want)
                    bound = bound or _bound(error, GATE[what.dtype])
                    gate = f"{'pass' if error < bound else 'fail'} {error:.1e} {where}".rstrip()
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


def _bound(masked: float, gate: float) -> float:
    """The largest error of a step that is right, when the masked loop has the error ``masked``."""
    return max(gate, SLACK * masked) if masked < LIMIT * gate else gate


# ------------------------------------------------------------------------------------------------ one model
class DenseTrainer:
    """A plain model by plain SGD: what a step costs without thresholds; ``autocast``: dtype of its products."""

    def __init__(self, model: nn.Module, options: SGDOptions, autocast: torch.dtype | None = None) -> None:
        self.model, self.options, self.autocast = to_dense(model).train(), options, autocast
        self.optimizer = torch.optim.SGD(self.model.parameters(), options.lr, options.momentum)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        # Cached copies of weights would outlive the step that made them.
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False):
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
    """The difference of :func:`differs_most`."""
    return differs_most(got, want)[0]


def differs_most(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative root mean square difference over all parameters, infinite where one is not finite, and where.

    A parameter that hardly moves is measured against the typical change of all: thresholds in front of a BatchNorm
    have gradients that cancel to rounding noise.
    """
    typical = float(torch.cat([w.flatten() for w in want.values()]).square().mean().sqrt())
    worst, where = 0.0, ""
    for name, w in want.items():
        error = float((got[name] - w).square().mean().sqrt()) / max(float(w.square().mean().sqrt()), typical, 1e-30)
        error = error if error == error else float("inf")
        if error > worst:
            worst, where = error, name
    return worst, where


def model_rows(
    device: Device, name: str, batch: int, dtype: str, densities: Sequence[float], graphs: Sequence[bool]
) -> Iterator[Row]:
    """Rows of the training steps of one model at one batch size; dense first."""
    setting = SETTINGS[name]
    options, kind = setting.options, torch.float64 if dtype == "fp64" else torch.float32
    x, y = (t[0] for t in batches(name, 1, batch, device.where, kind))
    x = x.contiguous(memory_format=torch.channels_last)
    dense_us: dict[bool, float] = {}
    for density in sorted({1.0, *densities}, reverse=True):
        stock = pruned_model(name, density, 0, device.where, kind)

        def make(provider: str, stock: nn.Module = stock) -> tuple[nn.Module, Any]:
            model = copy.deepcopy(stock)
            if provider == "dense":
                return model, DenseTrainer(model, options)
            if provider == "compact-fixed":
                return model, CapturedCompact(model, options, setting.sample)
            trainer = CompactTrainer(model, strict=True) if provider == "compact" else MaskedTrainer(model)
            return model, opened(trainer, options)

        def offered(provider: str, make: Any = make) -> Provider:
            change = None if provider == "dense" else lambda: trained(*make(provider), x, y)
            request: backend.Request = "triton" if provider == "ours" else "reference"
            return Provider(provider, request, lambda: make(provider)[1], change, graph=provider != "compact")

        names = (*("dense",) * (density == 1.0), "masked", "ours", "compact", "compact-fixed")
        what = What("step", name, 1, batch, dtype, density)

        def definition(stock: nn.Module = stock) -> dict[str, Tensor]:
            model = copy.deepcopy(stock).double()
            return trained(model, opened(MaskedTrainer(model), options), x.double(), y)

        yield from rows_of(device, what, [offered(n) for n in names], x, y, graphs, "dense", dense_us, definition)


# ------------------------------------------------------------------------------------------------ a cohort
Runner = Cohort | Loop | CapturedCohort


def stacked(models: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The parameters of all clients, client first, in float64."""
    parameters = [dict(m.named_parameters()) for m in models]
    return {n: torch.stack([p[n].detach().double() for p in parameters]) for n in parameters[0]}


def changes(models: Sequence[nn.Module], runner: Runner, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By how much each parameter of ``models`` changes in the first step of ``runner``, which was made of them."""
    before = stacked(models)
    runner.step(x, y)
    if isinstance(runner, CapturedCohort):
        runner.finish()
    now = runner.params if isinstance(runner, Cohort) else stacked(runner.models)
    return {n: p.double() - before[n] for n, p in now.items()}


def cohort_rows(
    device: Device, name: str, clients: int, batch: int, dtype: str, densities: Sequence[float],
    graphs: Sequence[bool],
) -> Iterator[Row]:  # fmt: skip
    """Rows of one cohort; ``speedup_vs_dense`` is over the loop, eager or in a graph as the row itself."""
    setting = SETTINGS[name]
    options, kind = setting.options, torch.float64 if dtype == "fp64" else torch.float32
    x, y = batches(name, clients, batch, device.where, kind)
    for density in sorted(set(densities), reverse=True):
        models = [pruned_model(name, density, seed, device.where, kind) for seed in range(clients)]

        def captured(streams: int, models: Sequence[nn.Module] = models) -> CapturedCohort:
            return CapturedCohort([copy.deepcopy(m) for m in models], options, setting.sample, streams)

        makers: dict[str, Callable[[], Runner]] = {"loop": lambda models=models: Loop(models, options)}  # type: ignore[misc]
        if device.where == "cuda" and cuda_ops.available():
            makers["cohort"] = lambda models=models: Cohort(models, options, True)  # type: ignore[misc]
        makers["cohort-torch"] = lambda models=models: Cohort(models, options, False)  # type: ignore[misc]
        makers["compact-graph"] = lambda captured=captured: captured(1)  # type: ignore[misc]
        makers["compact-streams"] = lambda captured=captured: captured(clients)  # type: ignore[misc]

        def offered(provider: str, make: Callable[[], Runner], models: Sequence[nn.Module] = models) -> Provider:
            request: backend.Request = "triton" if provider.startswith("cohort") else "reference"
            return Provider(provider, request, make, lambda: changes(models, make(), x, y))

        providers = [offered(provider, make) for provider, make in makers.items()]
        what = What("cohort", name, clients, batch, dtype, density)

        def definition(models: Sequence[nn.Module] = models) -> dict[str, Tensor]:
            wide = [copy.deepcopy(m).double() for m in models]
            return changes(wide, Loop(wide, options), x.double(), y)

        yield from rows_of(device, what, providers, x, y, graphs, "loop", {}, definition)


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

"""What is trained in the benchmarks: models in the settings of the published runs, the rivals, and the gate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spafl.models import build_model
from spafl_kernels import ThresholdConv2d, reference, threshold_layers
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.training import MaskedTrainer, SGDOptions, Trainer, TrainResult

__all__ = [
    "CASES", "GATES", "ORDERS", "RIVALS", "Case", "Outcome", "PublishedTrainer", "Run", "arranged", "differs", "gate",
    "outcome", "same_training",
]  # fmt: skip

# Precision and the tolerance, relative and absolute, to which two programs must agree in it.
GATES = ((torch.float64, 1e-9), (torch.float32, 2e-3))
ROUNDING = 1e-4  # relative error of a tensor in float32 that is always allowed


@dataclass(frozen=True)
class Case:
    """A model in the setting of the published runs.

    Args:
        model: its registered name.
        image: shape of one sample.
        batch: samples in a step.
        options: of the optimiser and the SpaFL terms.
        estimator: of the published code for this data set.
    """

    model: str
    image: tuple[int, int, int]
    batch: int
    options: SGDOptions
    estimator: Literal["identity", "window"]

    def pruned(self, density: float, seed: int = 0) -> nn.Module:
        """The model with this density in every layer, and margins so wide that no mask changes while it is timed."""
        model = build_model(self.model, 10, self.image[0], seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, layer in threshold_layers(model):
                layer.estimator = self.estimator
                score = layer.scores()
                order = torch.randperm(len(score), generator=generator)
                factor = torch.full_like(score, 0.3)
                factor[order[round(density * len(score)) :]] = 2.0
                layer.threshold.copy_(score * factor)
        return model

    def batches(self, count: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Random images and classes, the same in any precision."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            x = torch.randn(self.batch, *self.image, generator=generator).to(dtype)
            yield x, torch.randint(0, 10, (self.batch,), generator=generator)

    def small(self) -> Case:
        """The same with two samples in a batch, for smoke runs."""
        return replace(self, batch=2)


def _options(lr: float, penalty: float, max_grad_norm: float | None = None) -> SGDOptions:
    return SGDOptions(lr, 0.9, max_grad_norm=max_grad_norm, penalty=penalty, collapse_floor=0.01)


CASES = {
    case.model: case
    for case in (
        Case("lenet5", (1, 28, 28), 64, _options(0.001, 0.002), "identity"),
        Case("conv4", (3, 32, 32), 16, _options(0.01, 1.5e-4, 3), "window"),
        Case("resnet18", (3, 32, 32), 16, _options(0.01, 7e-4, 15), "window"),
        Case("vit", (3, 32, 32), 16, _options(0.01, 1e-4, 3), "window"),
    )
}


def _materialised_forward(layer: Any, x: Tensor) -> Tensor:
    """A masked layer as the published code writes it: the mask is repeated to the size of the weight."""
    weight, rows = layer.weight, layer.weight.shape[0]
    score = weight.abs().reshape(rows, -1).sum(1) / weight[0].numel()
    mask = reference._Step.apply(score - layer.threshold, layer.estimator)
    layer.ratio = mask.detach().sum() / mask.numel()
    masked = weight * mask.repeat(weight[0].numel(), 1).t().reshape(weight.shape)
    if isinstance(layer, ThresholdConv2d):
        return F.conv2d(x, masked, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, masked, layer.bias)


class PublishedTrainer(MaskedTrainer):
    """The published training loop: materialised masks, a loop over layers for guard and penalty.

    It changes the ``forward`` of the model's layers, for good.
    """

    engine = "published"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, reason="rival")
        for _, layer in threshold_layers(model):
            layer.forward = _materialised_forward.__get__(layer)

    def begin(
        self,
        options: SGDOptions,
        momentum: Mapping[str, Tensor] | None = None,
        densities: Mapping[str, float] | None = None,
    ) -> None:
        super().begin(options, momentum, densities)
        for (_, layer), density in zip(self._layers, self._densities.unbind(), strict=True):
            layer.ratio = density

    @torch.no_grad()
    def _guard(self) -> AbstractContextManager[None]:
        floor = self._options.collapse_floor
        for _, layer in self._layers:
            if floor is not None and layer.ratio <= floor:
                layer.threshold.zero_()
        return contextlib.nullcontext()

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        self._guard()
        loss = self.loss(self.model(x), y)
        penalty = torch.zeros(())
        for _, layer in self._layers:
            penalty = penalty + torch.exp(-layer.threshold).sum()
        self._optimizer.zero_grad()
        (loss + self._options.penalty * penalty).backward()
        if self._options.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._options.max_grad_norm)
        self._optimizer.step()
        return loss.detach()

    def finish(self) -> TrainResult:
        self._densities = torch.tensor([float(layer.ratio) for _, layer in self._layers], dtype=torch.float64)
        return super().finish()


# The trainers by name. They are looked up at each use, so that a test can put a wrong one here.
RIVALS: dict[str, Callable[[nn.Module], Trainer]] = {
    "published": PublishedTrainer,
    "masked": MaskedTrainer,
    "compact": lambda model: CompactTrainer(model, strict=True),
}


def differs(expected: Any, found: Any, tolerance: float) -> str:
    """Empty if two tensors, or two state dicts, agree, else by how much."""
    if isinstance(expected, Mapping):
        for key, value in expected.items():
            if wrong := differs(value, found[key], tolerance):
                return f"{key} {wrong}"
        return ""
    if torch.allclose(expected, found, rtol=tolerance, atol=tolerance):
        return ""
    return f"differs by {(expected - found).abs().max().item():.1e} in {expected.dtype}"


Outcome = dict[str, Tensor]  # losses, parameters, buffers and momentum after some steps


def outcome(losses: list[Tensor], model: nn.Module, result: TrainResult) -> Outcome:
    """What two trainers must agree in."""
    state = {f"state of {name}": value.clone() for name, value in model.state_dict().items()}
    return {"loss": torch.stack(losses), **state, **{f"momentum of {n}": v for n, v in result.momentum.items()}}


def _distance(expected: Tensor, found: Tensor) -> float:
    """Euclidean, relative."""
    size = expected.double().norm().item()
    return (expected.double() - found.double()).norm().item() / (size or 1.0)


# How the images of a batch are ordered: as they come, and by these seeds.
ORDERS: tuple[int | None, ...] = (None, 1, 2, 3, 4)


class Run(Protocol):
    """Trains in a precision and returns the outcome; memory layout and order of the images change rounding alone."""

    def __call__(
        self,
        trainer: str,
        dtype: torch.dtype,
        layout: torch.memory_format = torch.contiguous_format,
        order: int | None = None,
    ) -> Outcome: ...


def arranged(x: Tensor, y: Tensor, layout: torch.memory_format, order: int | None) -> tuple[Tensor, Tensor]:
    """A batch in a memory layout, its images in one of :data:`ORDERS`."""
    if order is not None:
        places = torch.randperm(len(x), generator=torch.Generator().manual_seed(order))
        x, y = x[places], y[places]
    return x.contiguous(memory_format=layout), y


def same_training(run: Run, rival: str) -> str:
    """Empty if a rival trains as the masked trainer does, else what differs.

    In float64 every number must agree. In float32 rounding decides more than a program does where a network amplifies
    it, so the masked trainer in float64 is the truth, and no tensor may be much further from it than the masked trainer
    in float32 is, in one of both memory layouts (PyTorch's channels-last BatchNorm rounds several times as much). A
    single number so near 0 that rounding decides whether ReLU passes it outweighs all other rounding, in whichever
    trainer it happens; then other orders of the images are tried, which know of the same function. A wrong program is
    wrong in all of them.

    Args:
        run: only the masked trainer gets a layout.
        rival: a name in :data:`RIVALS`.
    """
    truth = run("masked", torch.float64)
    if wrong := differs(truth, run(rival, torch.float64), GATES[0][1]):
        return f"{rival}: {wrong}"
    usual = dict.fromkeys(truth, 0.0)
    for order in ORDERS:
        for layout in (torch.contiguous_format, torch.channels_last):
            one = run("masked", torch.float32, layout, order)
            usual = {key: max(usual[key], _distance(expected, one[key])) for key, expected in truth.items()}
        found = run(rival, torch.float32, order=order)
        wrong = ""
        for key, expected in truth.items():
            allowed, distance = ROUNDING + 4 * usual[key], _distance(expected, found[key])
            if not distance <= allowed:  # not "distance > allowed", which NaN would pass
                wrong = f"{rival}: {key} is off by {distance:.1e} in float32, where {allowed:.1e} is allowed"
        if not wrong:
            return ""
    return wrong


def gate(case: Case, make: Callable[[], nn.Module], rival: str, steps: int = 3) -> str:
    """:func:`same_training` over some steps.

    Args:
        case: gives options and batches.
        make: the model all start from.
        rival: a name in :data:`RIVALS`.
        steps: how many.
    """

    def run(
        trainer: str,
        dtype: torch.dtype,
        layout: torch.memory_format = torch.contiguous_format,
        order: int | None = None,
    ) -> Outcome:
        model = make().to(dtype).to(memory_format=layout)
        one = RIVALS[trainer](model)
        one.begin(case.options)
        losses = [one.step(*arranged(x, y, layout, order)) for x, y in case.batches(steps, dtype)]
        return outcome(losses, model, one.finish())

    return same_training(run, rival)

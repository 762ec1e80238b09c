"""What is trained in the benchmarks: models in the settings of the published runs, the rivals, and the gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spafl.models import build_model
from spafl_kernels import ThresholdConv2d, reference, threshold_layers
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.training import MaskedTrainer, SGDOptions, Trainer, TrainResult

__all__ = ["CASES", "GATES", "RIVALS", "Case", "PublishedTrainer", "differs", "gate"]

# Precision and the tolerance, relative and absolute, to which two programs must agree in it.
GATES = ((torch.float64, 1e-9), (torch.float32, 2e-3))


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
        """Random images and classes."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            x = torch.randn(self.batch, *self.image, generator=generator, dtype=dtype)
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
        for name, layer in self._layers:
            layer.ratio = self._density[name]

    @torch.no_grad()
    def _guard(self) -> None:
        floor = self._options.collapse_floor
        for _, layer in self._layers:
            if floor is not None and layer.ratio <= floor:
                layer.threshold.zero_()

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
        self._density = {name: layer.ratio for name, layer in self._layers}
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


def gate(case: Case, make: Callable[[], nn.Module], rival: str, steps: int = 3) -> str:
    """Empty if a rival's trainer equals the masked one over some steps, in float64 and float32, else what differs.

    Args:
        case: gives options and batches.
        make: the model both start from.
        rival: a name in :data:`RIVALS`.
        steps: how many.
    """
    for dtype, tolerance in GATES:
        models = [make().to(dtype) for _ in range(2)]
        masked, other = MaskedTrainer(models[0]), RIVALS[rival](models[1])
        for trainer in (masked, other):
            trainer.begin(case.options)
        for x, y in case.batches(steps, dtype):
            if wrong := differs(masked.step(x, y), other.step(x, y), tolerance):
                return f"{rival}: loss {wrong}"
        masked.finish(), other.finish()
        if wrong := differs(models[0].state_dict(), models[1].state_dict(), tolerance):
            return f"{rival}: {wrong}"
    return ""

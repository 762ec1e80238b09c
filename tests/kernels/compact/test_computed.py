"""Layers whose weight is computed in every forward: run by the compact engine as any layer, random numbers included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spafl_kernels import CompactTrainer, ThresholdLinear, make_trainer
from spafl_kernels.compact import CompactModule
from spafl_kernels.computed import ComputedConv2d, ComputedLinear, ComputedWeight
from spafl_kernels.training import AdamOptions, MaskedTrainer, SGDOptions, Trainer


class _Scaled(ComputedWeight):
    """Weights times a factor of each filter; some are dropped at random while it trains."""

    def prepare(self) -> None:
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.register_buffer("weight", weight.detach().clone())
        self.factor = nn.Parameter(torch.ones(len(weight), *(1,) * (weight.dim() - 1), dtype=weight.dtype))

    def computed_weight(self) -> torch.Tensor:
        weight = self.weight * self.factor
        return weight * (torch.rand_like(weight) < 0.7) if self.training else weight


class ScaledConv2d(_Scaled, ComputedConv2d):
    pass


class ScaledLinear(_Scaled, ComputedLinear):
    pass


class Otherwise(ScaledLinear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class Net(nn.Module):
    def __init__(self, last: type[nn.Module] = ScaledLinear, twice: bool = False) -> None:
        super().__init__()
        self.first = ScaledConv2d(1, 6, 5, padding=2)
        self.second = ScaledConv2d(6, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.between = nn.Linear(8 * 9, 12)
        self.last = last(12, 12 if twice else 4)
        self.twice = twice
        for m in (self.first, self.second, self.last):
            if isinstance(m, _Scaled):
                m.prepare()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.relu(self.norm(self.second(x)))
        x = self.between(F.max_pool2d(x, 2).flatten(1))
        return self.last(self.last(x)) if self.twice else self.last(x)


def net(**kinds: object) -> nn.Module:
    torch.manual_seed(0)
    return Net(**kinds).double()  # type: ignore[arg-type]


def both(model: nn.Module, options: SGDOptions | AdamOptions, make=make_trainer) -> Trainer:
    a, b = model, copy.deepcopy(model)
    trainers = MaskedTrainer(a), make(b)
    results = []
    for trainer in trainers:
        generator = torch.Generator().manual_seed(5)
        seen = []
        for turn in range(2):
            torch.manual_seed(turn)
            trainer.begin(options)
            for n in (8, 8, 3, 8):
                x = torch.randn(n, 1, 16, 16, generator=generator, dtype=torch.float64)
                y = torch.randint(4, (n,), generator=generator)
                seen.append(trainer.step(x, y))
                seen += trainer.evaluate(x, y)
            result = trainer.finish()
        results.append((seen, result))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-12)
    assert (results[0][1].macs, results[0][1].steps) == (results[1][1].macs, results[1][1].steps)
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)
    return trainers[1]


@pytest.mark.parametrize("options", [SGDOptions(0.1, 0.9, 1e-3), AdamOptions(0.01)])
def test_steps_and_evaluations(options: SGDOptions | AdamOptions) -> None:
    assert both(net(), options, CompactTrainer).engine == "compact"


class _Corner(ComputedWeight):
    """The first rows and columns."""

    size: tuple[int, int]

    def like(self) -> torch.Tensor:
        return self.weight[: self.size[0], : self.size[1]]

    def computed_weight(self) -> torch.Tensor:
        return self.like().contiguous()

    def computed_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias[: self.size[0]]


class CornerConv2d(_Corner, ComputedConv2d):
    pass


class CornerLinear(_Corner, ComputedLinear):
    pass


class Nested(nn.Module):
    """A part of a larger model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = CornerConv2d(1, 20, 5), CornerConv2d(20, 40, 3), CornerLinear(160, 4)
        self.part(0)

    def part(self, width: int) -> None:
        a, b = ((5, 9), (12, 24), (20, 40))[width]
        self.first.size, self.second.size, self.last.size = (a, 1), (b, a), (4, 4 * b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 3)
        return self.last(F.max_pool2d(F.relu(self.second(x)), 1)[..., :2, :2].flatten(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parts_of_a_larger_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a = Nested().to(dtype)
    b = copy.deepcopy(a)
    masked, compact = MaskedTrainer(a), CompactTrainer(b, strict=True)
    for model, trainer in ((a, masked), (b, compact)):
        generator = torch.Generator().manual_seed(1)
        trainer.begin(SGDOptions(0.05, 0.9))
        for step in range(9):
            width = (0, 2, 1)[step % 3]
            model.part(width)
            trainer.form = width
            x = torch.randn(6, 1, 16, 16, generator=generator).to(dtype)
            trainer.step(x, torch.randint(4, (6,), generator=generator))
        macs = trainer.finish().macs
    assert masked.finish().macs == macs
    bound = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, **bound, msg=name)


@pytest.mark.parametrize("kinds", [{"last": Otherwise}, {"twice": True}])
def test_what_is_not_such_a_layer_runs_as_it_stands(kinds: dict[str, object]) -> None:
    both(net(**kinds), SGDOptions(0.1, 0.9))


def test_beside_threshold_layers_it_runs_as_it_stands() -> None:
    both(nn.Sequential(net(), ThresholdLinear(4, 4).double()), SGDOptions(0.1, 0.9, penalty=0.01))


def test_a_compact_module_of_such_a_model_is_the_model() -> None:
    model = net().eval()
    x = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(CompactModule(model)(x), model(x))

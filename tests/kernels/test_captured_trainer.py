"""Steps that are recorded once and replayed are those of the masked trainer, whatever changes between them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spafl_kernels import ThresholdConv2d, ThresholdLinear, executed, reference, threshold_layers
from spafl_kernels.captured import CapturedTrainer
from spafl_kernels.gpu import graphs
from spafl_kernels.training import AdamOptions, MaskedTrainer, SGDOptions, Trainer

sys.path.insert(0, str(Path(__file__).parent))
from tape import Tape


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = ThresholdConv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.head = ThresholdLinear(6 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x)))).flatten(1))


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = Net().double()
    with torch.no_grad():
        for _, layer in threshold_layers(net):
            layer.threshold.copy_(layer.scores() * torch.linspace(0.5, 1.2, len(layer.threshold)))
    return net


def batches(count: int, sizes: tuple[int, ...] = (8, 5)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(3)
    found = []
    for i in range(count):
        n = sizes[i % len(sizes)]
        found.append((torch.randn(n, 1, 6, 6, generator=g).double(), torch.randint(4, (n,), generator=g)))
    return found


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), (_, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)


def train(trainer: Trainer, count: int, seed: int = 1) -> None:
    """One training with the second of :data:`OPTIONS`."""
    torch.manual_seed(seed)
    trainer.begin(OPTIONS[1])
    for x, y in batches(count):
        trainer.step(x, y)
    trainer.finish()


OPTIONS = [
    SGDOptions(0.1),
    SGDOptions(0.1, 0.9, 1e-3, max_grad_norm=0.5, penalty=0.01, collapse_floor=0.01),
    SGDOptions(0.05, 0.9, nesterov=True, penalty=0.02, threshold_lr=0.2, penalty_scales={"conv": 3.0}),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_turns_with_other_rates_momentum_and_weights(options: SGDOptions) -> None:
    a, b = model(), model()
    tape = Tape()
    masked, captured = MaskedTrainer(a), CapturedTrainer(b, recorder=tape)
    kept: dict[str, dict[str, torch.Tensor] | None] = {"a": None, "b": None}
    densities = None
    for turn in range(4):
        o = options
        if turn:  # rates and coefficients change from round to round
            changed = {"lr": o.lr / (turn + 1), "penalty": o.penalty * turn}
            o = SGDOptions(**{**o.__dict__, **changed})
        results = []
        for key, trainer, net in (("a", masked, a), ("b", captured, b)):
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(1.01)  # another client's
            torch.manual_seed(turn)
            trainer.begin(o, kept[key] if turn != 2 else None, densities)
            losses = [trainer.step(x, y) for x, y in batches(9)]
            trainer.evaluate(*batches(1)[0])
            results.append((losses, trainer.finish()))
            if o.momentum:
                kept[key] = {name: v.clone() for name, v in results[-1][1].momentum.items()}
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-12)
        for field in ("densities", "macs", "steps"):
            assert getattr(results[0][1], field) == getattr(results[1][1], field)
        assert results[0][1].momentum.keys() == results[1][1].momentum.keys()
        for name, v in results[0][1].momentum.items():
            torch.testing.assert_close(v, results[1][1].momentum[name], rtol=1e-9, atol=1e-12)
        densities = results[0][1].densities
        same(a, b)
    assert captured.engine == "captured"
    assert tape.recorded == 3  # two sizes of batch, and an evaluation
    assert tape.replayed > 25


def test_reading_the_model_is_no_work_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs it with samples of zeros, in the middle of the first step that is recorded."""
    stock = reference.threshold_linear

    def noted(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        executed.note(torch.tensor([len(x)], dtype=torch.int32), 100, 1)
        return stock(x, *rest, **more)

    monkeypatch.setattr(reference, "threshold_linear", noted)
    found = []
    for trainer in (MaskedTrainer(model()), CapturedTrainer(model(), recorder=(tape := Tape()))):
        trainer.begin(OPTIONS[0])
        given = batches(7)
        for x, y in given:
            trainer.step(x, y)
        found.append(trainer.finish().macs)
    assert tape.recorded == 2
    assert found[1] == found[0] and found[0] >= 100 * sum(len(y) for _, y in given)


def test_momentum_that_is_given_is_written() -> None:
    a, b = model(), model()
    given = [{n: torch.ones_like(p) for n, p in m.named_parameters()} for m in (a, b)]
    for trainer, momentum in zip((MaskedTrainer(a), CapturedTrainer(b, recorder=Tape())), given, strict=True):
        torch.manual_seed(0)
        trainer.begin(SGDOptions(0.1, 0.9), momentum)
        for x, y in batches(6):
            trainer.step(x, y)
        assert trainer.finish().momentum is not None
    for name, v in given[0].items():
        torch.testing.assert_close(v, given[1][name], rtol=1e-9, atol=1e-12)


def both(
    a: nn.Module,
    b: nn.Module,
    steps: int = 8,
    loss=F.cross_entropy,
    options=OPTIONS[1],
    change=None,
    extra=None,
    watches=True,
):
    """A training of both; ``change(model, step)`` before every step."""
    tape = Tape()
    tape.watches = watches
    masked, captured = MaskedTrainer(a, loss), CapturedTrainer(b, loss, recorder=tape)
    for net, trainer in ((a, masked), (b, captured)):
        torch.manual_seed(1)
        trainer.begin(options, extra=extra)
        for i, (x, y) in enumerate(batches(steps)):
            if change is not None:
                change(net, i)
            trainer.step(x, y)
        trainer.finish()
    same(a, b)
    return tape, captured


def test_an_attribute_that_changes_has_the_model_read_anew() -> None:
    def change(net: nn.Module, step: int) -> None:
        net.drop.p = 0.3 if step < 4 else 0.6  # type: ignore[union-attr]

    tape, captured = both(model(), model(), 12, change=change)
    assert tape.replayed and captured.engine == "captured"


def test_freezing_a_layer_in_the_middle() -> None:
    def change(net: nn.Module, step: int) -> None:
        net.conv.weight.requires_grad_(step < 5)  # type: ignore[union-attr]

    both(model(), model(), 12, change=change)


class Waits(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * 2 if float(y.detach().sum()) > 0 else y


class Replaces(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean()
        return y + self.mean


class Counts(Net):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * (1 + self.calls)


@pytest.mark.parametrize("kind", [Waits, Replaces, Counts])
def test_models_that_no_graph_can_hold_run_eagerly(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = kind().double()
    tape, captured = both(net, copy.deepcopy(net))
    assert not tape.replayed and captured.engine == "masked" and captured.reason


@pytest.mark.parametrize("watches", [True, False])
def test_a_loss_that_waits(watches: bool) -> None:
    def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = F.cross_entropy(out, y)
        return value * 2 if value.item() > 0 else value

    tape, captured = both(model(), model(), loss=loss, watches=watches)
    assert not tape.recorded and ("waits" if watches else "recorded") in captured.reason


def test_a_recording_that_is_wrong_is_not_used() -> None:
    class Wrong(Tape):
        def __call__(self, body):
            replay, result = super().__call__(body)
            return lambda: (replay(), result.mul_(0.5), parameter.data.mul_(1.5)), result

    net = model()
    parameter = net.conv.weight
    masked = model()
    trainer, right = CapturedTrainer(net, recorder=Wrong()), MaskedTrainer(masked)
    train(trainer, 8)
    train(right, 8)
    same(net, masked)
    assert "differs" in trainer.reason and trainer.engine == "masked"


def test_recordings_of_an_era_that_is_over_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, tape = model(), model(), Tape()
    trainers = MaskedTrainer(a), CapturedTrainer(b, recorder=tape)
    for turn in range(2):
        monkeypatch.setattr(graphs, "_era", turn)
        for trainer in trainers:
            train(trainer, 8, turn)
    same(a, b)
    assert tape.recorded == 4


def test_adam_and_extra_terms_run_eagerly() -> None:
    def extra(parameters) -> None:
        for p in parameters.values():
            p.grad.add_(p.detach(), alpha=0.1)

    tape, captured = both(model(), model(), extra=extra)
    assert not tape.recorded and "extra" in captured.reason
    tape, captured = both(model(), model(), options=AdamOptions(0.01))
    assert not tape.recorded and "Adam" in captured.reason


def test_other_memory_between_trainings() -> None:
    a, b = model(), model()
    masked, captured = MaskedTrainer(a), CapturedTrainer(b, recorder=Tape())
    for _ in range(3):
        for net, trainer in ((a, masked), (b, captured)):
            for p in net.parameters():
                p.data = p.data.clone()
            train(trainer, 6)
        same(a, b)

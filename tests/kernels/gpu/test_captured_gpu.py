"""Steps replayed from CUDA graphs are those of the masked trainer. ``python -m pytest -m gpu``."""

import copy
import dataclasses

import pytest
import torch
from support.process import INTERPRETED
from torch import nn
from torch.nn import functional as F

from spafl.models import build_model
from spafl_kernels import backend, threshold_layers
from spafl_kernels.captured import CapturedTrainer
from spafl_kernels.gpu import graphs
from spafl_kernels.training import AdamOptions, MaskedTrainer, SGDOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA GPU"),
]
FULL = SGDOptions(0.02, 0.9, 1e-3, max_grad_norm=5.0, penalty=0.01, collapse_floor=0.01)


@pytest.fixture(autouse=True)
def exact():
    """Products in float32, sums in an order that does not change."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        yield


def made(name="lenet5", channels=1, drop=0.0):
    model = build_model(name, 10, channels, 0)
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            layer.threshold.copy_(layer.scores() * torch.linspace(0.4, 1.31, len(layer.threshold)))
    return (nn.Sequential(model, nn.Dropout(drop)) if drop else model).cuda()


def _layers(a, b):
    return [(p, q) for (_, p), (_, q) in zip(threshold_layers(a), threshold_layers(b), strict=True)]


def data(sizes, channels=1, image=28, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    found = [(torch.randn(n, channels, image, image, generator=g), torch.randint(10, (n,), generator=g)) for n in sizes]
    return [(x.to(dtype).cuda(), y.cuda()) for x, y in found]


def trained(trainer, options, turns=3, sizes=(16, 16, 7, 16, 7, 16, 7), **shape):
    momentum, densities, losses, result = None, None, [], None
    for turn in range(turns):
        torch.manual_seed(turn)
        changed = {**options.__dict__, "lr": options.lr / (1 + turn)}
        trainer.begin(type(options)(**changed), momentum, densities)
        losses += [float(trainer.step(x, y)) for x, y in data(sizes, **shape)]
        losses += [float(trainer.evaluate(x, y)[0]) for x, y in data(sizes[:4], **shape)]
        result = trainer.finish()
        momentum = {n: v.clone() for n, v in result.momentum.items()} or None
        densities = result.densities
    return losses, result


def near(a, b, bound=1e-3):
    for (name, p), (_, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        p, q = p.double(), q.double()
        assert float((p - q).norm()) <= bound * float(p.norm()) + 1e-6, name


@pytest.mark.parametrize("request_", ["reference", "auto", "triton"])
def test_turns(request_):
    with backend.requesting(request_):
        a = made()
        b = copy.deepcopy(a)
        want, got = trained(MaskedTrainer(a), FULL), trained(second := CapturedTrainer(b), FULL)
    assert second.engine == "captured", second.reason
    torch.testing.assert_close(got[0], want[0], rtol=2e-3, atol=1e-4)
    assert (got[1].macs, got[1].steps) == (want[1].macs, want[1].steps)
    near(a, b)


# Conv4's BatchNorm makes rounding grow on noise: in float32 two right trainers prune a filter some steps apart. So
# turns in which masks change are compared in float64, and the packed kernels, which have none, in steps without one.
def test_turns_of_conv4_in_float64():
    with backend.requesting("reference"):
        a = made("conv4", 3).double()
        b = copy.deepcopy(a)
        shape = {"channels": 3, "image": 32, "dtype": torch.float64}
        want, got = trained(MaskedTrainer(a), FULL, **shape), trained(second := CapturedTrainer(b), FULL, **shape)
    assert second.engine == "captured", second.reason
    before = made("conv4", 3)
    moved = [(p.scores() > p.threshold).ne(q.scores() > q.threshold).any() for p, q in _layers(before, a.float())]
    assert any(moved), "no mask changed"
    torch.testing.assert_close(got[0], want[0], rtol=1e-7, atol=1e-9)
    assert (got[1].macs, got[1].steps) == (want[1].macs, want[1].steps)
    near(a, b.float(), 1e-6)


@pytest.mark.parametrize("request_", ["auto", "triton"])
def test_gradients_of_conv4_by_the_packed_kernels(request_):
    options = dataclasses.replace(FULL, lr=1e-6)
    with backend.requesting(request_):
        a = made("conv4", 3)
        b = copy.deepcopy(a)
        shape = {"channels": 3, "image": 32, "turns": 1}
        want, got = trained(MaskedTrainer(a), options, **shape), trained(second := CapturedTrainer(b), options, **shape)
    assert second.engine == "captured", second.reason
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert (got[1].macs, got[1].steps) == (want[1].macs, want[1].steps)
    # The momentum is the sum of all gradients.
    for name, v in want[1].momentum.items():
        difference = float((v.double() - got[1].momentum[name].double()).norm())
        assert difference <= 5e-3 * float(v.double().norm()) + 1e-6, name


def test_dropout_draws_the_same_numbers():
    a = made(drop=0.4)
    b = copy.deepcopy(a)
    want, got = trained(MaskedTrainer(a), FULL), trained(second := CapturedTrainer(b), FULL)
    assert second.engine == "captured", second.reason
    torch.testing.assert_close(got[0], want[0], rtol=2e-3, atol=1e-4)
    near(a, b)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_what_cannot_be_recorded_goes_on_eagerly(drop, watched, monkeypatch):
    if not watched:  # what nothing warns of
        monkeypatch.setattr(graphs, "WAITS", "no such words")

    def loss(out, y):
        value = F.cross_entropy(out, y)
        return value * 2 if value.item() > 0 else value

    a = made(drop=drop)
    b = copy.deepcopy(a)
    want, got = trained(MaskedTrainer(a, loss), FULL), trained(second := CapturedTrainer(b, loss), FULL)
    assert second.engine == "masked" and ("waits" if watched else "recorded") in second.reason
    torch.testing.assert_close(got[0], want[0], rtol=2e-3, atol=1e-4)
    near(a, b)


def test_adam_runs_eagerly():
    a = made()
    b = copy.deepcopy(a)
    options = AdamOptions(0.001)
    want, got = trained(MaskedTrainer(a), options), trained(second := CapturedTrainer(b), options)
    assert second.engine == "masked" and "Adam" in second.reason
    torch.testing.assert_close(got[0], want[0], rtol=2e-3, atol=1e-4)


def test_two_trainers_at_once():
    models = [made(), made()]
    models.append(copy.deepcopy(models[0]))
    trainers = [CapturedTrainer(models[0]), CapturedTrainer(models[1])]
    for t in trainers:
        t.begin(FULL)
    for x, y in data((16, 7) * 4):
        for t in trainers:
            t.step(x, y)
    for t in trainers:
        t.finish()
    alone = MaskedTrainer(models[2])
    alone.begin(FULL)
    for x, y in data((16, 7) * 4):
        alone.step(x, y)
    alone.finish()
    near(models[2], models[0])
    near(models[2], models[1])

"""Models without thresholds in the compact trainer: nothing to skip, the same numbers, any optimiser, extra terms."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spafl.models import build_model
from spafl_kernels import make_trainer, to_dense
from spafl_kernels.compact import CompactModule, CompactTrainer, captures
from spafl_kernels.training import AdamOptions, MaskedTrainer, SGDOptions


class Net(nn.Module):
    """Two convolutions with norms, a residual sum, a linear layer used at full width, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.out = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.na(self.a(x))), 2)
        x = F.relu(x + self.nb(self.b(x)))
        return self.out(x.mean((2, 3))) * self.scale


def batches(count=3, size=5, image=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(size, 1, image, image, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 3, (size,), generator=generator)


def pull(parameters):
    for p in parameters.values():
        p.grad.add_(p.detach(), alpha=0.1)


def net():
    torch.manual_seed(0)
    return Net().double()


def same(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def trained(trainer, options, extra=None, momentum=None):
    trainer.begin(options, momentum, extra=extra)
    losses = [trainer.step(x, y).item() for x, y in batches()]
    found = trainer.evaluate(*next(batches(seed=7)))
    return losses, [t.item() for t in found], trainer.finish()


@pytest.mark.parametrize("extra", [None, pull])
@pytest.mark.parametrize(
    "options",
    [
        SGDOptions(lr=0.1),
        SGDOptions(lr=0.1, momentum=0.9, weight_decay=0.01, max_grad_norm=0.5, penalty=1.0, collapse_floor=0.01),
        SGDOptions(lr=0.1, momentum=0.9, nesterov=True),
        AdamOptions(lr=0.01),
    ],
)
def test_it_is_the_masked_trainer(options, extra):
    masked, compact = MaskedTrainer(net()), CompactTrainer(net(), strict=True)
    for _ in range(2):  # the second training begins with a program that is there
        a, b = trained(masked, options, extra), trained(compact, options, extra)
        assert compact.engine == "compact"
        assert b[0] == pytest.approx(a[0], rel=1e-9) and b[1] == pytest.approx(a[1], rel=1e-9)
        assert (b[2].macs, b[2].steps, b[2].densities) == (a[2].macs, a[2].steps, {})
        same(masked.model.state_dict(), compact.model.state_dict())
        same(dict(a[2].momentum), dict(b[2].momentum))


@pytest.mark.parametrize("options", [SGDOptions(lr=0.1, momentum=0.9), AdamOptions(lr=0.01)])
def test_the_optimisers_state_goes_on_in_the_tensors_that_were_given(options):
    results = []
    for trainer in (MaskedTrainer(net()), CompactTrainer(net(), strict=True)):
        state = options.fresh_state(dict(trainer.model.named_parameters()))
        for _ in range(2):
            result = trained(trainer, options, momentum=state)[2]
            assert all(result.momentum[name] is tensor for name, tensor in state.items())
        results.append(state)
    same(*results)


def test_it_changes_engines_in_the_middle_of_a_training():
    """A hook on a gradient makes it masked, and no hook compact again; frozen and unfrozen parameters too."""
    trainers = MaskedTrainer(net()), CompactTrainer(net())
    engines = []
    for trainer in trainers:
        trainer.begin(SGDOptions(lr=0.1, momentum=0.9))
        p = trainer.model.a.weight
        for i, (x, y) in enumerate(batches(8)):
            if i == 2:
                handle = p.register_hook(lambda g: 2 * g)
            if i == 4:
                handle.remove()
            trainer.model.out.weight.requires_grad_(i < 6)
            trainer.step(x, y)
            engines.append(trainer.engine)
        trainer.finish()
    assert engines[8:] == ["compact"] * 2 + ["masked"] * 2 + ["compact"] * 4
    same(*(t.model.state_dict() for t in trainers))


class Fading(Net):
    strength = 1.0

    def forward(self, x):
        return super().forward(x) * self.strength


def fading():
    torch.manual_seed(0)
    model = Fading().double()
    return MaskedTrainer(copy.deepcopy(model)), make_trainer(model)


@pytest.fixture
def read(monkeypatch):
    """An entry for every time that a model is read."""
    times, trace = [], captures.check_traceable
    monkeypatch.setattr(captures, "check_traceable", lambda *a, **k: times.append(1) or trace(*a, **k))
    return times


def test_a_model_that_changes_at_every_step_is_not_read_at_every_step(read):
    trainers = fading()
    for trainer in trainers:
        trainer.begin(SGDOptions(lr=0.1, momentum=0.9))
        for i, (x, y) in enumerate(batches(80)):
            trainer.model.strength = 1 - i / 100
            trainer.step(x, y)
            if i == 10:
                assert trainer is trainers[0] or "'strength' has changed" in trainer.reason
        trainer.finish()
    assert len(read) == 6  # before the first batch, and at steps 0, 1, 2, 66, 67
    same(*(t.model.state_dict() for t in trainers))


def test_a_model_that_goes_to_and_fro_stays_compact():
    trainers = MaskedTrainer(net()), make_trainer(net())
    for trainer in trainers:
        trainer.begin(SGDOptions(lr=0.1, momentum=0.9))
        for i, (x, y) in enumerate(batches(6)):
            trainer.model.out.weight.requires_grad_(i % 2 == 0)
            trainer.step(x, y)
            assert trainer is trainers[0] or trainer.engine == "compact"
        trainer.finish()
    same(*(t.model.state_dict() for t in trainers))


def test_what_the_caller_says_the_model_computes_is_read_once(read):
    trainers = fading()
    for trainer in trainers:
        trainer.begin(SGDOptions(lr=0.1, momentum=0.9))
        for i, (x, y) in enumerate(batches(12)):
            trainer.form = trainer.model.strength = 1 + i % 3
            trainer.step(x, y)
        trainer.finish()
    assert trainers[1].engine == "compact" and len(read) <= 4
    same(*(t.model.state_dict() for t in trainers))


def test_a_loss_may_read_the_parameters():
    def loss(model):
        return lambda out, y: F.cross_entropy(out, y) + 0.1 * model.a.weight.square().sum()

    trainers = []
    for kind in (MaskedTrainer, CompactTrainer):
        model = net()
        trainers.append(kind(model, loss(model)))
        trained(trainers[-1], SGDOptions(lr=0.1))
    assert trainers[1].engine == "compact"
    same(*(t.model.state_dict() for t in trainers))


def test_the_module_gives_the_gradients_of_the_model():
    model = net()
    twin, module = copy.deepcopy(model), CompactModule(model, strict=True)
    for x, y in batches(2):
        for m in (twin, module):
            m.zero_grad()
            F.cross_entropy(m(x), y).backward()
        same(*({n: p.grad for n, p in m.named_parameters()} for m in (twin, model)))
    assert module.engine == "compact"
    same(twin.state_dict(), model.state_dict())


def test_auto_takes_it_where_the_prices_say_so():
    """LeNet-5 at the published batch gains, and not by a clock; a transformer is its matrix products."""
    lenet, vit = build_model("lenet5", 10, 1, 0), build_model("vit", 10, 3, 0)
    for model, shape, engine in ((lenet, (64, 1, 28, 28), "compact"), (vit, (16, 3, 32, 32), "masked")):
        trainer = make_trainer(to_dense(model))
        trainer.begin(SGDOptions(lr=0.01))
        trainer.step(torch.randn(shape), torch.zeros(shape[0], dtype=torch.int64))
        trainer.finish()
        assert trainer.engine == engine, trainer.reason
    assert "expected to take" in trainer.reason


def test_a_step_whose_loss_fails_has_passed_the_norms():
    def loss(out, y):
        if len(y) == 4:
            raise ValueError("no")
        return F.cross_entropy(out, y)

    states = []
    for kind in (MaskedTrainer, CompactTrainer):
        trainer = kind(net(), loss)
        trainer.begin(SGDOptions(lr=0.1))
        for size in (5, 4, 5):
            try:
                trainer.step(*next(batches(1, size)))
            except ValueError:
                assert size == 4
        trainer.finish()
        states.append(trainer.model.state_dict())
    assert trainer.engine == "compact" and states[1]["na.num_batches_tracked"] == 3
    same(*states)

"""The masked trainer against a loop written out with autograd and plain tensor arithmetic."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spafl.models import LeNet5
from spafl_kernels import ThresholdLinear, convert, reference, threshold_layers, threshold_penalty
from spafl_kernels.engines import make_trainer
from spafl_kernels.training import MaskedTrainer, SGDOptions


def batches(count, batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(batch, 1, 28, 28, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 10, (batch,), generator=generator)


def lenet(seed=0):
    torch.manual_seed(seed)
    return LeNet5().double()


def by_hand(model, options, data):
    """SGD written out; returns the losses and the momentum."""
    v = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    last = {name: 1.0 for name, _ in threshold_layers(model)}
    losses = []
    for x, y in data:
        with torch.no_grad():
            for name, layer in threshold_layers(model):
                if options.collapse_floor is not None and last[name] <= options.collapse_floor:
                    layer.threshold.zero_()
                scores = reference.filter_scores(layer.weight)
                last[name] = (scores > layer.threshold).double().mean().item()
        loss = F.cross_entropy(model(x), y)
        params = dict(model.named_parameters())
        total = loss + options.penalty * threshold_penalty(model)
        grads = dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True))
        norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))
        scale = 1.0 if options.max_grad_norm is None else min(1.0, (options.max_grad_norm / (norm + 1e-6)).item())
        with torch.no_grad():
            for name, p in params.items():
                v[name] = options.momentum * v[name] + scale * grads[name] + options.weight_decay * p
                p -= options.lr * v[name]
        losses.append(loss.item())
    return losses, v, last


@pytest.mark.parametrize(
    "options",
    [
        SGDOptions(lr=0.05),
        SGDOptions(lr=0.05, momentum=0.9, weight_decay=1e-3, max_grad_norm=0.5, penalty=0.02, collapse_floor=0.5),
    ],
)
def test_equals_the_loop_written_out(options):
    hand, model = lenet(), lenet()
    losses, v, last = by_hand(hand, options, batches(12))
    trainer = MaskedTrainer(model)
    trainer.begin(options)
    got = [trainer.step(x, y).item() for x, y in batches(12)]
    result = trainer.finish()
    assert got == pytest.approx(losses, rel=1e-12)
    for (name, p), q in zip(model.named_parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13, msg=name)
    for name, buffer in result.momentum.items():
        torch.testing.assert_close(buffer, v[name], rtol=1e-11, atol=1e-13)
    assert result.densities == pytest.approx(last)
    assert result.steps == 12 and result.rebuilds == 0
    # conv1 20*25*24^2, conv2 50*500*8^2, fc3, fc4; forward, weight gradient, input gradient except of conv1
    layers = 20 * 25 * 576, 50 * 500 * 64, 800 * 500, 5000
    assert result.macs == 12 * 4 * (3 * sum(layers) - layers[0])


def test_momentum_is_carried_in_place_between_trainings():
    whole, split = lenet(), lenet()
    options = SGDOptions(lr=0.02, momentum=0.9)
    data = list(batches(6))
    one = MaskedTrainer(whole)
    one.begin(options)
    for x, y in data:
        one.step(x, y)
    one.finish()
    two = MaskedTrainer(split)
    momentum = {name: torch.zeros_like(p) for name, p in split.named_parameters()}
    for part in (data[:3], data[3:]):
        two.begin(options, momentum)
        for x, y in part:
            two.step(x, y)
        assert two.finish() is two.finish()
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.equal(p, q)


def test_guard_fires_in_eval_and_reads_the_previous_density():
    model = lenet()
    with torch.no_grad():
        model.fc3.threshold.fill_(9.0)
    trainer = MaskedTrainer(model)
    x, y = next(batches(1))
    trainer.begin(SGDOptions(lr=0.1, collapse_floor=0.01))
    trainer.evaluate(x, y)
    assert model.fc3.threshold.max() == 9  # its previous density was 1
    loss, correct = trainer.evaluate(x, y)
    assert model.fc3.threshold.max() == 0
    assert trainer.finish().densities["fc3"] == 1
    model.eval()
    assert loss.item() == pytest.approx(F.cross_entropy(model(x), y, reduction="sum").item())
    assert correct.item() == (model(x).argmax(1) == y).sum().item()


def test_a_model_without_thresholds_is_plain_sgd():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.5)
    trainer = make_trainer(model, "masked")
    trainer.begin(SGDOptions(lr=0.1, momentum=0.5, penalty=1.0, collapse_floor=0.01))
    for _ in range(3):
        x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
        trainer.step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
    assert trainer.finish().densities == {}
    assert trainer.engine == "masked" and trainer.reason
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"lr": -1.0}, "lr must be a finite number >= 0; got -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr": True}, "lr must be"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\); got 1.0"),
        ({"weight_decay": float("inf")}, "weight_decay must be"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be None or a finite number > 0; got 0.0"),
        ({"penalty": float("nan")}, "penalty must be"),
        ({"collapse_floor": 1.0}, "collapse_floor must be"),
    ],
)
def test_bad_options_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        SGDOptions(**({"lr": 0.1} | change))


def test_bad_calls_are_refused():
    model = lenet()
    trainer = make_trainer(model, "masked")
    x, y = next(batches(1))
    options = SGDOptions(lr=0.1, momentum=0.9)
    with pytest.raises(RuntimeError, match=r"no training is open; call begin\(\) first"):
        trainer.step(x, y)
    good = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"differs in \['fc4.weight'\]"):
        trainer.begin(options, {k: v for k, v in good.items() if k != "fc4.weight"})
    with pytest.raises(ValueError, match=r"momentum\['fc4.threshold'\] must be \(10,\)"):
        trainer.begin(options, good | {"fc4.threshold": torch.zeros(11, dtype=torch.float64)})
    with pytest.raises(ValueError, match="densities must have one value for every threshold layer"):
        trainer.begin(options, good, {"fc9": 1.0})
    trainer.begin(options, good)
    with pytest.raises(RuntimeError, match="before the last training was finished"):
        trainer.begin(options, good)
    with pytest.raises(ValueError, match="engine must be one of auto, masked, compact; got 'fast'"):
        make_trainer(model, "fast")


# ------------------------------------------------------------------------------------------------ both engines
LOSSES = {
    "not reduced": (lambda o, y: F.cross_entropy(o, y, reduction="none"), r"got a tensor of shape \(4,\)"),
    "a number": (lambda o, y: F.cross_entropy(o, y).item(), "got a float"),
    "two": (lambda o, y: (F.cross_entropy(o, y), 0), "got a tuple"),
    "detached": (lambda o, y: F.cross_entropy(o.detach(), y), "differentiable in what the model returns"),
    "whole numbers": (lambda o, y: (o.argmax(1) == y).sum(), "differentiable in what the model returns"),
}


def small():
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)))


@pytest.mark.parametrize("engine", ["masked", "compact"])
@pytest.mark.parametrize("name", LOSSES)
def test_an_unsuitable_loss(engine, name):
    loss, text = LOSSES[name]
    trainer = make_trainer(small(), engine, loss, strict=True)
    trainer.begin(SGDOptions(lr=0.1, penalty=0.1))
    with pytest.raises(ValueError, match=f"^loss must.*{text}"):
        trainer.step(torch.randn(4, 6), torch.arange(4))


def _replaced(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def _exchanged(model):
    model[0] = ThresholdLinear(6, 16)


def _removed(model):
    model[0].bias = None


def _frozen(model):
    for p in model.parameters():
        p.requires_grad_(False)


@pytest.mark.parametrize("engine", ["masked", "compact"])
@pytest.mark.parametrize(
    "change, error, text",
    [
        (_replaced, RuntimeError, r"parameters of the model were replaced \(0\.weight\); make a new trainer"),
        (_exchanged, RuntimeError, r"were replaced \(0\.bias, 0\.threshold, 0\.weight\); make a new trainer"),
        (_removed, RuntimeError, r"were replaced \(0\.bias\); make a new trainer"),
        (_frozen, ValueError, "there is nothing to train: every parameter of the model is frozen"),
    ],
)
def test_a_model_that_changes_under_a_running_trainer(engine, change, error, text):
    model = small()
    trainer = make_trainer(model, engine)
    trainer.begin(SGDOptions(lr=0.1, momentum=0.9))
    x, y = torch.randn(4, 6), torch.arange(4)
    trainer.step(x, y)
    change(model)
    with pytest.raises(error, match=text):
        trainer.step(x, y)


@pytest.mark.parametrize("engine", ["masked", "compact"])
def test_only_class_scores_can_be_evaluated(engine):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            return {"scores": self.net(x)}

    trainer = make_trainer(Named(), engine, lambda out, y: F.cross_entropy(out["scores"], y))
    trainer.begin(SGDOptions(lr=0.1))
    x, y = torch.randn(4, 6), torch.arange(4)
    trainer.step(x, y)
    with pytest.raises(TypeError, match=r"needs a model that returns \(N, classes\); this one returned a dict"):
        trainer.evaluate(x, y)


@pytest.mark.parametrize("engine", ["masked", "compact"])
@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_a_pruned_weight_that_is_not_a_number_shows_in_the_loss(engine, estimator):
    """The score of its filter is not above the threshold, so it counts as pruned; 0 times NaN is NaN all the same."""
    model = convert(small(), estimator=estimator)
    for _, layer in threshold_layers(model):
        layer.estimator = estimator
    with torch.no_grad():
        model[0].threshold[::2] = 9.0
        model[0].weight[0, 0] = float("nan")
    trainer = make_trainer(model, engine, strict=True)
    trainer.begin(SGDOptions(lr=0.1))
    losses = [trainer.step(torch.randn(4, 6), torch.arange(4)) for _ in range(3)]
    assert not any(loss.isfinite() for loss in losses)
    assert not trainer.evaluate(torch.randn(4, 6), torch.arange(4))[0].isfinite()


@pytest.mark.parametrize("engine", ["masked", "compact"])
def test_an_extra_term_changes_the_gradient_before_it_is_clipped(engine):
    """A proximal term and a correction, against SGD written out on the same objective; both engines, same counts."""
    options = SGDOptions(lr=0.05, momentum=0.9, weight_decay=1e-3, max_grad_norm=0.5)
    model, hand = lenet(), lenet()
    anchor = {name: p.detach() + 0.1 for name, p in hand.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in hand.named_parameters()}
    for x, y in batches(4):
        near = sum((p - anchor[name]).square().sum() for name, p in hand.named_parameters())
        params = dict(hand.named_parameters())
        total = F.cross_entropy(hand(x), y) + 0.5 * 0.3 * near + 0.01 * hand.fc4.weight.sum()
        grads = dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True))
        norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))
        scale = min(1.0, (0.5 / (norm + 1e-6)).item())
        with torch.no_grad():
            for name, p in params.items():
                v[name] = 0.9 * v[name] + scale * grads[name] + 1e-3 * p
                p -= 0.05 * v[name]

    def extra(parameters):
        for name, p in parameters.items():
            p.grad.add_(p - anchor[name], alpha=0.3)
        parameters["fc4.weight"].grad.add_(0.01)

    trainer = make_trainer(model, engine)
    trainer.begin(options, extra=extra)
    for x, y in batches(4):
        trainer.step(x, y)
    result = trainer.finish()
    for (name, p), q in zip(model.named_parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13, msg=name)
    layers = 20 * 25 * 576, 50 * 500 * 64, 800 * 500, 5000
    assert result.steps == 4 and result.macs == 4 * 4 * (3 * sum(layers) - layers[0])
    assert trainer.engine == "masked"
    if engine == "compact":
        assert "extra gradient term" in trainer.reason
        trainer.begin(options)  # without one it is compact again
        trainer.step(*next(batches(1)))
        trainer.finish()
        assert trainer.engine == "compact"


def test_multiply_accumulates_are_counted_for_each_form():
    class Halves(nn.Linear):
        rows = 4

        def forward(self, x):
            return F.linear(x, self.weight[: self.rows])

    model = Halves(6, 4, bias=False)
    trainer = MaskedTrainer(model)
    trainer.begin(SGDOptions(lr=0.1))
    for rows in (4, 2, 2, 4):
        model.rows = trainer.form = rows
        trainer.step(torch.randn(5, 6), torch.zeros(5, dtype=torch.int64))
    assert trainer.finish().macs == 5 * 2 * 6 * (4 + 2 + 2 + 4)  # forward and weight gradient


@pytest.mark.parametrize("engine", ["masked", "compact"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_trainer_is_not_copied(engine, copied):
    """Its copy would share programs, graphs and memory with it."""
    with pytest.raises(TypeError, match="neither copied nor pickled; finish the training, copy or pickle its model"):
        copied(make_trainer(small(), engine))

"""From one training to the next: what is kept, what must not be, and the momentum that the trainer lends."""

import copy
import os

import pytest
import torch
from helpers import batches, compare, prune
from torch import nn

from spafl.models import LeNet5
from spafl_kernels import ThresholdConv2d, ThresholdLinear, native, threshold_layers
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.compact.run.memory import pages
from spafl_kernels.compact.train import session
from spafl_kernels.training import MaskedTrainer, SGDOptions

IMAGE = (2, 8, 8)
MOMENTUM = SGDOptions(lr=0.01, momentum=0.9)


def net():
    return nn.Sequential(
        ThresholdConv2d(2, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        ThresholdConv2d(12, 10, 3, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Flatten(),
        ThresholdLinear(160, 5),
    ).double()


def make(density=0.5, seed=0, estimator="window"):
    torch.manual_seed(seed)
    model = prune(net(), density)
    for _, layer in threshold_layers(model):
        layer.estimator = estimator
    return model


def data(count=3, seed=0):
    return list(batches(IMAGE, count, 4, classes=5, seed=seed))


def train(trainer, options, steps, momentum=None):
    trainer.begin(options, momentum)
    for x, y in steps:
        trainer.step(x, y)
    return trainer.finish()


def assert_same(model, twin):
    for (name, p), q in zip(twin.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9, msg=name)


def program(trainer):
    return trainer._session.program


def test_the_program_stays_while_masks_and_settings_stay():
    model = make()
    trainer = CompactTrainer(model, strict=True)
    train(trainer, SGDOptions(lr=1e-6), data())
    first = program(trainer)
    for p in model.parameters():
        p.data = p.data.clone()
    train(trainer, SGDOptions(lr=1e-5, weight_decay=1e-3, penalty=1e-6), data())
    assert program(trainer) is first
    train(trainer, SGDOptions(lr=1e-6, momentum=0.5), data())  # needs room for momentum
    second = program(trainer)
    assert second is not first
    with torch.no_grad():
        model[0].threshold[:] = 10.0
        model[0].threshold[4] = 0.0
    train(trainer, SGDOptions(lr=1e-6, momentum=0.5), data())
    assert program(trainer) is not second


def change_norm(model):
    model[1].momentum = 0.5


def change_estimator(model):
    model[7].estimator = "identity"


def change_activation(model):
    model[2] = nn.LeakyReLU(0.3)


@pytest.mark.parametrize("change", [change_norm, change_estimator, change_activation])
def test_a_setting_that_changes_between_trainings_counts(change):
    model = make()
    compare(model, MOMENTUM, data(6), rounds=2, evaluate_every=2, meddle=change)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [SGDOptions(lr=0.01), MOMENTUM, SGDOptions(lr=0.01, max_grad_norm=1.0)])
def test_a_training_that_diverged_leaves_nothing_behind(options, compiled):
    """Padding rows and unused gradients of the arena are NaN after it."""
    model = make(estimator="identity")
    before = copy.deepcopy(model.state_dict())
    trainer = CompactTrainer(model, strict=True, compiled=compiled)
    train(trainer, options, [(x * float("nan"), y) for x, y in data(2)])
    assert not all(torch.isfinite(p).all() for p in model.parameters())
    model.load_state_dict(before)
    twin = copy.deepcopy(model)
    train(trainer, options, data())
    train(MaskedTrainer(twin), options, data())
    assert_same(model, twin)


@pytest.mark.parametrize("fails", [{0}, {0, 1, 2, 3}, {2}])
def test_a_step_whose_loss_fails_has_seen_its_batch(fails):
    model = make()
    twin = copy.deepcopy(model)
    for trainer in (MaskedTrainer(twin), CompactTrainer(model, strict=True, verify="never")):
        trainer.begin(MOMENTUM)
        for k, (x, y) in enumerate(data(4)):
            if k in fails:
                with pytest.raises(IndexError):
                    trainer.step(x, y + 100)
            else:
                trainer.step(x, y)
        trainer.finish()
    assert_same(model, twin)


def test_a_plan_that_broke_off_is_not_used_again(monkeypatch):
    model, other = make(), make(0.3, seed=1).state_dict()
    trainer = CompactTrainer(model, strict=True)
    train(trainer, MOMENTUM, data())

    def broken(*args):
        raise MemoryError("no room")

    model.load_state_dict(other)
    with monkeypatch.context() as patch:
        patch.setattr(session, "Program", broken)
        trainer.begin(MOMENTUM)
        with pytest.raises(MemoryError):
            trainer.step(*data()[0])
        trainer.finish()
    twin = copy.deepcopy(model)
    train(trainer, MOMENTUM, data())
    train(MaskedTrainer(twin), MOMENTUM, data())
    assert_same(model, twin)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_own_momentum_starts_at_zero_every_time(steps, weight_decay):
    """Also where nobody has looked at it in between, rows were dropped and came back, or nothing was trained."""
    model = make()
    twin = copy.deepcopy(model)
    compact, masked = CompactTrainer(model, strict=True), MaskedTrainer(twin)
    options = SGDOptions(lr=0.02, momentum=0.9, weight_decay=weight_decay, penalty=0.05)
    for part in range(4):
        with torch.no_grad():
            for m in (model, twin):
                for _, layer in threshold_layers(m):
                    layer.threshold[part::4] *= 0.1
                    layer.threshold[part + 1 :: 4] *= 5
        train(compact, options, data(6, part))
        train(masked, options, data(6, part))
        assert_same(model, twin)
    a, b = train(masked, options, data(steps)), train(compact, options, data(steps))
    for name, v in a.momentum.items():
        torch.testing.assert_close(b.momentum[name], v, rtol=1e-9, atol=1e-9, msg=name)


def test_lent_momentum_may_be_handed_back_but_not_read_late():
    model = make()
    twin = copy.deepcopy(model)
    compact, masked = CompactTrainer(model, strict=True), MaskedTrainer(twin)
    first = train(compact, MOMENTUM, data())
    train(compact, MOMENTUM, data(seed=1), first.momentum)
    train(masked, MOMENTUM, data(seed=1), train(masked, MOMENTUM, data()).momentum)
    assert_same(model, twin)
    late = train(compact, MOMENTUM, data())
    compact.begin(MOMENTUM)
    assert set(late.momentum) == {name for name, _ in model.named_parameters()}
    with pytest.raises(RuntimeError, match="overwritten by its next begin"):
        late.momentum["0.weight"]


def test_clients_take_turns_in_one_model():
    """Each with its own weights, masks and memory, as a federated simulator does it."""
    torch.manual_seed(1)
    model = LeNet5().double()
    clients = [prune(LeNet5().double(), d, seed=k) for k, d in enumerate((0.5, 0.5, 0.2, 1.0))]
    twins = copy.deepcopy(clients)
    trainer = CompactTrainer(model, strict=True)
    for turn in range(3):
        for client, twin in zip(clients, twins, strict=True):
            for p, own in zip(model.parameters(), client.parameters(), strict=True):
                p.data = own.data
            steps = list(batches((1, 28, 28), 2, 2, seed=turn))
            assert train(trainer, MOMENTUM, steps).densities == train(MaskedTrainer(twin), MOMENTUM, steps).densities
    for client, twin in zip(clients, twins, strict=True):
        assert_same(client, twin)


@pytest.mark.skipif(not native.available(), reason="the C++ extension is not built")
def test_weights_of_which_nothing_is_dropped_are_not_copied():
    """They go to and fro as filters flip, with their momentum; a plan for another memory is made anew."""
    model = make(density=1.0)
    twin = copy.deepcopy(model)
    trainer, masked = CompactTrainer(model, strict=True, patience=0), MaskedTrainer(twin)
    options = SGDOptions(lr=0.01, momentum=0.9, weight_decay=1e-3)
    borrowed = []
    for m in (model, twin):
        with torch.no_grad():  # the second layer loses a filter after some steps
            m[3].threshold[2] = m[3].scores()[2] * 0.98
    momentum = [{n: torch.zeros_like(p) for n, p in m.named_parameters()} for m in (model, twin)]
    momentum[0]["3.threshold"][2] = momentum[1]["3.threshold"][2] = -2.0 * model[3].scores()[2].item()
    for one, mine in ((trainer, momentum[0]), (masked, momentum[1])):
        one.begin(options, mine)
        for x, y in data(6):
            one.step(x, y)
            if one is trainer:
                slots = [layer.slot.weight.data_ptr() for layer in trainer._session._pruned]
                borrowed.append([at == model[i].weight.data_ptr() for at, i in zip(slots, (0, 3, 7))])
        one.finish()
    assert borrowed[0] == [True, True, True] and borrowed[-1] == [True, False, False]
    assert_same(model, twin)
    for name, buffer in momentum[0].items():
        torch.testing.assert_close(buffer, momentum[1][name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_its_own_pages():
    part = pages(5000, torch.zeros((), dtype=torch.float64))
    assert part.dtype == torch.float64 and part.shape == (5000,) and not part.any()
    assert pages(0, part).shape == (0,)
    child = os.fork()
    if not child:
        part.fill_(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and not part.any()

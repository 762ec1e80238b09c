"""What was read of a model: one set of rules for the trainer and for the module."""

import copy
import pickle

import pytest
import torch
from helpers import prune
from torch import nn
from torch.nn import functional as F

from spafl_kernels import ThresholdLinear, convert, threshold_layers
from spafl_kernels.compact import CompactModule, CompactTrainer, captures
from spafl_kernels.training import MaskedTrainer, SGDOptions

OPTIONS = SGDOptions(lr=0.01, momentum=0.9)


class Gated(nn.Module):
    """Can be read as long as it does not look at numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.looks = False

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(-x if self.looks and float(x.sum()) < 0 else x)


class Module:
    """A module for anybody's loop, used as a trainer is."""

    def __init__(self, model, **settings):
        self.module = CompactModule(model, **settings)

    def __call__(self, x):
        self.module(x)
        return self.module.engine, self.module.reason


class Trained:
    def __init__(self, model, **settings):
        self.trainer = CompactTrainer(model, **settings)
        self.trainer.begin(OPTIONS)

    def __call__(self, x):
        self.trainer.step(x, torch.zeros(len(x), dtype=torch.int64))
        return self.trainer.engine, self.trainer.reason


INTERFACES = pytest.mark.parametrize("interface", [Module, Trained])
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def reads(monkeypatch):
    """Counts how often a model is read."""
    read, found = captures.check_traceable, []
    monkeypatch.setattr(captures, "check_traceable", lambda *a, **k: found.append(1) or read(*a, **k))
    return found


def gated():
    torch.manual_seed(0)
    return prune(convert(Gated()).double(), 0.5)


@INTERFACES
def test_it_is_read_anew_when_it_has_changed_and_refused_as_long_as_the_reason_stands(interface, reads):
    model = gated()
    run = interface(model)
    for looks, engine in ((False, "compact"), (True, "masked"), (False, "compact"), (True, "masked")):
        model.looks = looks
        reads.clear()
        engines = [run(X) for _ in range(3)]
        assert {e for e, _ in engines} == {engine} and len(reads) <= 1
        assert engine == "compact" or "cannot be traced" in engines[-1][1]


@INTERFACES
def test_what_stops_being_so_is_no_reason_any_more(interface):
    """A hook on a gradient, which counts for those that step parameters themselves."""
    model = gated()
    run = interface(model)
    assert run(X)[0] == "compact"
    handle = model.a.weight.register_hook(lambda g: g)
    engines = [run(X) for _ in range(2)]
    assert {e for e, _ in engines} == {"masked" if interface is Trained else "compact"}
    handle.remove()
    assert run(X)[0] == "compact"


@INTERFACES
def test_reasons_stay_the_same(interface):
    model = gated()
    run = interface(model)
    handle = model.b.register_forward_hook(lambda *a: None)
    assert {run(X) for _ in range(20)} == {("masked", "module 'b' has hooks")}
    handle.remove()
    assert run(X)[0] == "compact"


@INTERFACES
def test_nothing_is_learnt_of_an_empty_batch(interface, monkeypatch):
    counts = []
    monkeypatch.setattr(captures.Captures, "check", _counting(captures.Captures.check, counts))
    run = interface(gated())
    run(X[:0])
    run(X)
    run(X)
    assert [done for done, _ in counts if done] == [True] and counts[-1][1]


def _counting(check, counts):
    def counted(self, batch, captured, tensors, again=False):
        before = captured.verified
        check(self, batch, captured, tensors, again)
        counts.append((captured.verified and not before, captured.verified))

    return counted


@INTERFACES
def test_what_is_found_later_ends_in_the_masked_model_too(interface, monkeypatch):
    """Under "always": at a later plan of the module, and in a later training."""
    model = gated()
    twin, run = copy.deepcopy(model), interface(model, verify="always")
    assert run(X)[0] == "compact"
    monkeypatch.setattr(captures.Captures, "check", _failing(captures.Captures.check))
    if interface is Trained:
        run.trainer.finish()
        run.trainer.begin(OPTIONS)
    next(iter(threshold_layers(model)))[1].threshold.data.zero_()
    next(iter(threshold_layers(twin)))[1].threshold.data.zero_()
    assert run(X) == ("masked", "the output differs by 1")
    if interface is Module:
        assert torch.equal(run.module(X), twin(X))


def _failing(check):
    def failing(self, *args, **kwargs):
        self._differs = lambda *a: "the output differs by 1"
        check(self, *args, **kwargs)

    return failing


@pytest.mark.slow
@INTERFACES
def test_what_is_kept_is_bounded(interface):
    model = nn.Sequential(ThresholdLinear(3, 4), nn.ReLU(), ThresholdLinear(4, 2)).double()
    run = interface(model, verify="never")
    for size in range(1, 12):
        x = torch.randn(1, *(1,) * size, 3, dtype=torch.float64)
        if interface is Trained:
            run.trainer.loss = lambda out, y: out.sum()
        assert run(x)[0] == "compact"
    kept = (run.module if interface is Module else run.trainer)._captures
    assert len(kept) == captures.MOST and len(list(kept)) == captures.MOST


@pytest.mark.slow
def test_a_trainer_makes_the_same_choice_after_any_calls():
    """A module gives up on what always changes; a trainer does not, for others must come to the same numbers."""
    model = gated()
    run = Trained(model, verify="never")
    twin = copy.deepcopy(model)
    masked = MaskedTrainer(twin)
    masked.begin(OPTIONS)
    for turn in range(captures.KINDS_READ + 4):
        model.number = twin.number = turn
        model.looks = twin.looks = bool(turn % 2)
        assert run(X)[0] == ("masked" if turn % 2 else "compact")
        masked.step(X, torch.zeros(4, dtype=torch.int64))
    run.trainer.finish(), masked.finish()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("found", [None, "otherwise: made up"])
def test_a_verdict_counts_for_copies_of_the_model(found, monkeypatch):
    """Pickled, as for another process; not for a model that is read to be another one."""
    asked = []
    monkeypatch.setattr(CompactTrainer, "_differs", lambda *_: asked.append(1) or found)
    model = convert(Gated()).double()
    verdicts = pickle.loads(pickle.dumps(CompactTrainer(model).verdicts_on(X)))
    assert len(verdicts) == len(asked) == 1

    copied = Trained(copy.deepcopy(model), verdicts=verdicts)
    assert copied(X) == (("compact", "all channels can be traced") if found is None else ("masked", found))
    assert len(asked) == 1
    other = copy.deepcopy(model)
    other.b = nn.Sequential(other.b, nn.ReLU())
    Trained(other, verdicts=verdicts)(X)
    assert len(asked) == 2
    Trained(copy.deepcopy(model), verdicts=verdicts, verify="always")(X)
    assert len(asked) == 3


def test_verifying_ahead_changes_nothing_of_a_model():
    model = convert(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))).double().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trainer = CompactTrainer(model, strict=True)
    assert [v.found for v in trainer.verdicts_on(X).values()] == [None]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    trainer.begin(OPTIONS)
    trainer.step(X, torch.zeros(len(X), dtype=torch.int64))
    trainer.finish()


def test_nothing_is_found_ahead_of_a_model_that_cannot_be_read():
    model = convert(Gated()).double()
    trainer = CompactTrainer(model)
    model.looks = True
    assert trainer.verdicts_on(X) == {}


@INTERFACES
def test_a_model_that_goes_to_and_fro_between_two_states_is_read_twice(interface, reads):
    """As a discriminator that is frozen at every other step, or a dropout that is switched on to sample."""
    model = gated()
    run = interface(model)
    for k in range(40):
        model.a.weight.requires_grad_(k % 2 == 0)
        assert run(X) == ("compact", captures.FOLLOWED)
    assert len(reads) <= 3

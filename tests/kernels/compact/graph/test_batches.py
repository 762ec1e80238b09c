"""Models that take more than one tensor, trained, evaluated, exported and audited: as the masked model."""

import copy
import inspect
import io

import pytest
import torch
from helpers import prune
from test_calls import CASES, IDS, ByName, Nested, Second, Tokens, numbers, tensors

from spafl_kernels import convert, make_trainer
from spafl_kernels.compact import CompactTrainer, audit, export
from spafl_kernels.training import MaskedTrainer, SGDOptions, Unsupported

OPTIONS = SGDOptions(lr=0.01, momentum=0.9, weight_decay=0.01, penalty=0.01)


def batch_of(make, args, kwargs):
    """The call as a trainer's batch."""
    if kwargs and args:
        names = list(inspect.signature(make.forward).parameters)[1:]
        return {**dict(zip(names, args)), **kwargs}
    return kwargs or args


BATCHES = {name: (make, batch_of(make, args, kwargs)) for name, (make, args, kwargs) in CASES.items() if name != "any"}


def squares(out, y):
    return sum(t.square().mean() for t in tensors(out))


def built(make, estimator="identity"):
    torch.manual_seed(0)
    return prune(convert(make(), estimator=estimator).double(), 0.5)


def call(model, x):
    return model(**x) if isinstance(x, dict) else model(*x)


def same_state(twin, model):
    for (key, p), q in zip(twin.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11, msg=key)


def trained(model, given, **settings):
    """Twins of the model under both trainers, each after a step with every batch; the trainers, not yet finished."""
    twin = copy.deepcopy(model)
    trainers = MaskedTrainer(twin, squares), CompactTrainer(model, squares, **settings)
    for trainer in trainers:
        trainer.begin(OPTIONS)
        trainer.engines = [(trainer.step(batch, None), trainer.engine)[1] for batch in given]
    return trainers


def cases(fast, without=()):
    """All batches, a few of them in the fast tier."""
    return [pytest.param(n, marks=[] if n in fast else pytest.mark.slow) for n in BATCHES if n not in without]


@pytest.mark.sweep
@pytest.mark.parametrize("estimator", ["identity", "window"])
@pytest.mark.parametrize("name", cases(("tokens", "number and string")))
def test_trainings(name, estimator):
    make, x = BATCHES[name]
    trainers = trained(built(make, estimator), [x, x], strict=True)
    results = []
    for trainer in trainers:
        losses = [trainer.step(x, None)]
        if isinstance(call(trainers[0].model, x), torch.Tensor):
            losses.append(trainer.evaluate(x, torch.zeros(1, dtype=torch.int64))[0])
            losses.append(trainer.step(x, None))
        results.append((torch.stack(losses), trainer.finish()))
    (right, a), (ours, b) = results
    assert trainers[1].engine == "compact"
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)
    same_state(*(t.model for t in trainers))
    for key, v in a.momentum.items():
        torch.testing.assert_close(b.momentum[key], v, rtol=1e-9, atol=1e-11, msg=key)
    assert a.steps == b.steps and 0 < b.macs <= a.macs


@pytest.mark.parametrize("name", cases(("tokens",), ("square like the batch", "graph")))
def test_exports(name):
    make, x = BATCHES[name]
    model = built(make).eval()
    small = export(model, x)
    for ours, right in zip(tensors(small(*tensors(x))), tensors(call(model, x)), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_an_export_has_the_names_of_the_model_and_goes_to_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    model = built(Tokens).float().eval()
    given = {"mask": IDS % 3 > 0, "ids": IDS}
    small, right = export(model, given), model(**given).detach()
    torch.testing.assert_close(small(**given), right)
    file = io.BytesIO()
    torch.onnx.export(small, (), kwargs=given, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    (out,) = session.run(None, {name: t.numpy() for name, t in given.items()})
    torch.testing.assert_close(torch.from_numpy(out), right, rtol=1e-4, atol=1e-5)


def test_an_audit_counts_what_the_trainer_does():
    x = {"x": numbers(4, 6), "mask": numbers(4, 8)}
    _, trainer = trained(built(Second), [x], strict=True, verify="never")
    assert "; expected " in trainer.explain() and "; measured " in trainer.explain(x)
    assert "; measured " not in trainer.explain((x["x"],))
    macs = trainer.finish().macs
    found = audit(trainer.model, x, repeats=1)
    assert [a.name for a in found.layers] == ["a", "b", "c"] and found.total().masked_macs > macs > 0


@pytest.mark.slow
def test_one_training_may_be_called_in_several_ways():
    x = numbers(4, 6)
    given = [{"x": x, "scale": 2.0}, {"x": x, "scale": numbers(4, 8)}, {"scale": 2.0, "x": x[:2]}] * 2
    trainers = trained(built(ByName), given, strict=True)
    assert trainers[0].finish().steps == trainers[1].finish().steps == 6
    same_state(*(t.model for t in trainers))


@pytest.mark.slow
def test_numbers_that_always_change_run_masked():
    x = numbers(4, 6)
    trainers = trained(built(ByName), [{"x": x, "scale": float(k)} for k in range(20)], verify="never")
    assert trainers[1].engine == "masked" and "more than 16 kinds" in trainers[1].reason
    for trainer in trainers:
        trainer.finish()
    same_state(*(t.model for t in trainers))
    trainers[1].begin(OPTIONS)
    trainers[1].step({"x": x, "scale": 1.0}, None)
    assert trainers[1].engine == "compact"


@pytest.mark.parametrize("engine", ["masked", "compact"])
def test_what_is_no_batch_is_refused_in_words(engine):
    trainer = make_trainer(built(Second), engine, squares, verify="never")
    trainer.begin(OPTIONS)
    for bad, kind, words in (
        (3, TypeError, "x must be a tensor, a tuple or list .* got a int"),
        ({1: numbers(4, 6)}, TypeError, "got a dict"),
        ((), ValueError, "x must have a tensor with a dimension of samples"),
        ({"x": 3.0}, ValueError, "x must have a tensor"),
    ):
        for method in (trainer.step, trainer.evaluate):
            with pytest.raises(kind, match=words):
                method(bad, torch.zeros(4, dtype=torch.int64))
    assert trainer.step((numbers(4, 6),), None).isfinite()
    assert trainer.finish().steps == 1


class Switched(Second):
    def forward(self, x, how=None):
        return super().forward(x if how is None else x * how.factor)


class How:
    factor = 0.5


def test_what_is_not_known_runs_masked_as_long_as_it_is_there():
    x = numbers(4, 6)
    trainers = trained(built(Switched), [(x, How()), (x, How()), x, (x, How())])
    assert trainers[1].engines == ["masked", "masked", "compact", "masked"]
    assert "called with a How" in trainers[1].reason
    for trainer in trainers:
        trainer.finish()
    same_state(*(t.model for t in trainers))
    with pytest.raises(Unsupported, match="called with a How"):
        trained(trainers[1].model, [(x, How())], strict=True)


@pytest.mark.slow
def test_one_argument_that_is_a_dictionary_is_an_argument():
    inside = {"x": numbers(4, 6), "more": [numbers(4, 8), 0.5]}
    trainers = trained(built(Nested), [[inside], (inside,), {"batch": inside}], strict=True)
    assert trainers[0].finish().steps == trainers[1].finish().steps == 3
    same_state(*(t.model for t in trainers))

"""Models that take more than one tensor and return more than one: the call is the model's own, and the rest compact."""

import collections
import copy
import dataclasses

import pytest
import torch
from helpers import prune
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree

from spafl_kernels import convert
from spafl_kernels.compact import CompactModule, CompactTrainer
from spafl_kernels.training import MaskedTrainer, SGDOptions, Unsupported


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def rest(self, h):
        return self.c(F.relu(self.b(F.relu(h))))


class Second(Base):
    def forward(self, x, mask=None):
        h = self.a(x)
        return self.rest(h if mask is None else h * mask)


class ByName(Base):
    def forward(self, x, *, scale, act="relu"):
        return self.rest(getattr(F, act)(self.a(x) * scale))


class Any(Base):
    def forward(self, *xs, **more):
        return self.rest(self.a(xs[0] + xs[1] * more["self_"]))


class Nested(Base):
    def forward(self, batch):
        return self.rest(self.a(batch["x"]) + batch["more"][0] * batch["more"][1])


class Tokens(Base):
    """Integers, and a mask of booleans."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 6)

    def forward(self, ids, mask):
        return (F.relu(self.rest(self.a(self.words(ids)))) * mask.unsqueeze(-1)).sum(1)


class Tied(Base):
    """The embedding is the last layer."""

    def __init__(self):
        super().__init__()
        self.words, self.into = nn.Embedding(5, 8), nn.Linear(8, 6)
        self.c.weight = self.words.weight

    def forward(self, ids):
        return self.rest(self.a(self.into(self.words(ids)))).mean(1)


class Square(Base):
    """A tensor that is not by sample, and may have as many rows as there are samples."""

    def forward(self, x, graph):
        return self.c(graph @ F.relu(self.b(F.relu(self.a(x))))).mean(1)


class Graph(Base):
    """No batch at all."""

    def forward(self, x, edges):
        return self.c(edges @ F.relu(self.b(edges @ F.relu(self.a(x)))))


Pair = collections.namedtuple("Pair", "out hidden")


@dataclasses.dataclass
class Fields:
    out: torch.Tensor
    hidden: torch.Tensor


class Returns(Base):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.make(self.rest(h), h)


def dictionary(out, hidden):
    return {"out": out, "rest": (hidden.sum(1), [hidden]), "none": None, "number": 3}


def ordered(out, hidden):
    return collections.OrderedDict(hidden=hidden, out=out)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


IDS = torch.arange(28).view(4, 7) % 10
CASES = {
    "default": (Second, (numbers(4, 6),), {}),
    "second": (Second, (numbers(4, 6), numbers(4, 8)), {}),
    "second for all samples": (Second, (numbers(4, 6), numbers(8)), {}),
    "second without dimensions": (Second, (numbers(4, 6), torch.tensor(2.0, dtype=torch.float64)), {}),
    "by name": (Second, (), {"mask": numbers(4, 8), "x": numbers(4, 6)}),
    "none": (Second, (numbers(4, 6), None), {}),
    "keyword": (ByName, (numbers(4, 6),), {"scale": numbers(4, 8)}),
    "number and string": (ByName, (numbers(4, 6),), {"scale": -2.0, "act": "gelu"}),
    "any": (Any, (numbers(4, 6), numbers(4, 6)), {"self_": numbers(6)}),
    "nested": (Nested, ({"x": numbers(4, 6), "more": [numbers(4, 8), 0.5]},), {}),
    "tokens": (Tokens, (IDS, IDS % 3 > 0), {}),
    "tied": (Tied, (IDS % 5,), {}),
    "square": (Square, (numbers(4, 7, 6), numbers(7, 7)), {}),
    "square like the batch": (Square, (numbers(7, 7, 6), numbers(7, 7)), {}),
    "graph": (Graph, (numbers(5, 6), numbers(5, 5)), {}),
    "dictionary": (lambda: Returns(dictionary), (numbers(4, 6),), {}),
    "named tuple": (lambda: Returns(Pair), (numbers(4, 6),), {}),
    "ordered dictionary": (lambda: Returns(ordered), (numbers(4, 6),), {}),
    "dataclass": (lambda: Returns(Fields), (numbers(4, 6),), {}),
}


def tensors(value):
    value = vars(value) if isinstance(value, Fields) else value
    return [t for t in _pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def same_call(module, twin, args, kwargs):
    """Outputs, and all gradients of a sum of squares; both as the model itself gives them."""
    results = []
    for m in (twin, module):
        given, by_name = _pytree.tree_map(
            lambda t: t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
            (args, kwargs),
        )
        m.zero_grad()
        out = m(*given, **by_name)
        sum(t.square().sum() for t in tensors(out)).backward()
        inputs = [t.grad for t in tensors((given, by_name)) if t.is_floating_point()]
        results.append((type(out), tensors(out), inputs, [p.grad for p in m.parameters()]))
    (kind, *right), (other, *ours) = results
    assert kind is other
    for a, b in zip(_pytree.tree_leaves(right), _pytree.tree_leaves(ours), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


@pytest.mark.sweep
@pytest.mark.parametrize("estimator", ["identity", "window"])
@pytest.mark.parametrize("name", CASES)
def test_calls(name, estimator):
    make, args, kwargs = CASES[name]
    torch.manual_seed(0)
    model = prune(convert(make(), estimator=estimator).double(), 0.5)
    twin, module = copy.deepcopy(model), CompactModule(model, strict=True)
    for training in (True, False):
        twin.train(training), module.train(training)
        same_call(module, twin, args, kwargs)
    assert module.engine == "compact"


def test_integers_and_tied_weights_in_a_training():
    torch.manual_seed(0)
    model = prune(convert(Tied()).double(), 0.5)
    twin, y = copy.deepcopy(model), torch.arange(4)
    trainers = MaskedTrainer(twin), CompactTrainer(model, strict=True)
    for trainer in trainers:
        trainer.begin(SGDOptions(lr=0.1, momentum=0.9, weight_decay=0.01))
        for _ in range(3):
            trainer.step(IDS % 5, y)
        trainer.finish()
    for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11, msg=name)


def test_what_is_no_tensor_is_a_part_of_what_was_read():
    torch.manual_seed(0)
    model = prune(convert(ByName()).double(), 0.5)
    twin, module, x = copy.deepcopy(model), CompactModule(model, strict=True, verify="never"), numbers(4, 6)
    for options in ({"scale": 1}, {"scale": 1.0}, {"scale": True}, {"scale": -0.0}, {"scale": 0.0}, {"scale": 3.0}):
        for act in ("relu", "gelu"):
            out = module(x, **options, act=act)
            torch.testing.assert_close(out, twin(x, **options, act=act), rtol=1e-12, atol=1e-12)
            assert torch.equal(module(x, **options, act=act), out) and len(module._captures) <= 8


def test_one_bad_call_ends_nothing():
    model = prune(convert(Second()).double(), 0.5)
    module, x = CompactModule(model), numbers(4, 6)
    for args, error in (((numbers(4, 7),), RuntimeError), ((x, object()), TypeError), ((), TypeError)):
        with pytest.raises(error):
            module(*args)
        assert module.engine == "masked"
        module(x)
        assert module.engine == "compact"
    with pytest.raises(Unsupported, match="called with a object; tensors, numbers"):
        CompactModule(model, strict=True)(x, object())


def test_numbers_that_always_change_are_not_read_for_ever():
    model = prune(convert(ByName()).double(), 0.5)
    module, x, engines = CompactModule(model, verify="never"), numbers(4, 6), []
    for k in range(30):
        torch.testing.assert_close(module(x, scale=float(k)), model(x, scale=float(k)))
        engines.append(module.engine)
    assert engines[0] == "compact" and engines[-1] == "masked" and "changed" in module.reason
    assert len(module._captures) <= 8
    for _ in range(130):
        module(x, scale=1.0)
    assert module.engine == "compact"

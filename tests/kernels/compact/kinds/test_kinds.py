"""Every kind of operation between two layers, whatever is pruned: as the masked model, in training, eval and export."""

import copy

import pytest
import torch
from helpers import batches, compare, compare_steps, prune
from operations import DOCS, EACH, IMAGE, OPERATIONS, between, with_table
from torch import nn

from spafl_kernels.compact import CompactModule, trace_flow
from spafl_kernels.compact.export import _exported
from spafl_kernels.compact.kinds import KINDS
from spafl_kernels.training import SGDOptions

FRONTS = ("zero", "bias", "norm")
OPTIONS = SGDOptions(lr=0.01, momentum=0.9, weight_decay=0.01, penalty=0.05)
NAMES = list(EACH)
# A share of everything; the rest is slow.
FEW = [
    (name, FRONTS[k % 3] if k % 2 else "norm", ("window", "identity")[k // 2 % 2], (0.4, 0.4, 0.0, 0.4, 1.0)[k % 5])
    for k, name in enumerate(NAMES)
] + [(name, "bias", "window", 0.5) for name in NAMES]
ALL = [
    (name, front, estimator, density)
    for name in NAMES
    for front in FRONTS
    for estimator in ("window", "identity")
    for density in (0.0, 0.25, 0.6, 1.0)
]


def check(name, front, estimator, density):
    model = prune(between(*EACH[name], front, estimator), density, spread=0.2)
    data = list(batches(IMAGE, 3, 3, classes=5))
    train_like_masked(copy.deepcopy(model), data)
    for training in (True, False):
        twin, other = copy.deepcopy(model).train(training), copy.deepcopy(model).train(training)
        compact = CompactModule(other, strict=True, verify="never")
        outs = []
        for m in (twin, compact):
            torch.manual_seed(1)
            outs.append(m(data[0][0]))
            outs[-1].square().sum().backward()
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-9, atol=1e-10)
        for (key, p), q in zip(twin.named_parameters(), other.parameters(), strict=True):
            a, b = (torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q))
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
    model.eval()
    with torch.no_grad():
        small = _exported(model, IMAGE)
        torch.testing.assert_close(small(data[0][0]), model(data[0][0]), rtol=1e-9, atol=1e-10)


def train_like_masked(model, data):
    biased_norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) and model.first.bias is not None
    if biased_norm:  # rounding alone decides a sign, see docs/compact.md
        compare_steps(model, OPTIONS, data)
    else:
        compare(model, OPTIONS, data, evaluate_every=2, start_momentum=0.01)


@pytest.mark.parametrize("name, front, estimator, density", FEW)
def test_as_the_masked_model(name, front, estimator, density):
    check(name, front, estimator, density)


@pytest.mark.slow
@pytest.mark.parametrize("name, front, estimator, density", ALL)
def test_as_the_masked_model_everywhere(name, front, estimator, density):
    check(name, front, estimator, density)


def test_every_kind_is_among_them():
    models = [between(*EACH[name], front) for name in NAMES for front in ("zero", "norm")]
    seen = {type(op) for model in models for op in trace_flow(model, IMAGE).ops.values()}
    assert {k.kind for k in KINDS if k not in seen} == {"attention"}  # which has models of its own


def test_the_table_in_the_docs_is_up_to_date():
    text = DOCS.read_text()
    assert all(f"| {row} |" in text for row in OPERATIONS)
    assert with_table(text) == text, "run: python tests/kernels/compact/operations.py"

"""CompactModule against the wrapped model: outputs, every gradient, buffers, under any optimiser."""

import copy
import pickle

import pytest
import torch
from graphs import GRAPHS
from helpers import batches, prune
from test_trainer import Branch, Padded, warm_norms, with_estimator
from torch import nn
from torch.nn import functional as F

from spafl.models import Conv4, LeNet5, ResNet18, ViT
from spafl_kernels import convert, threshold_layers, threshold_penalty
from spafl_kernels.compact import CompactModule
from spafl_kernels.training import Unsupported

MODELS = {
    "lenet": (LeNet5, (1, 28, 28)),
    "conv4": (Conv4, (3, 32, 32)),
    "resnet": (lambda: ResNet18(10, width=8), (3, 32, 32)),
    "vit": (lambda: ViT(10, dim=16, depth=2, heads=2, head_dim=8, hidden=24), (3, 32, 32)),
    "padded": (Padded, (2, 7, 8)),
    "bias": (lambda: Padded(bias=True), (2, 7, 8)),
    "masked bias": (lambda: Padded(bias=True, mask_bias=True, act=nn.GELU), (2, 7, 8)),
}


def twins(name, estimator, density=0.5, dtype=torch.float64):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = prune(warm_norms(with_estimator(build().to(dtype), estimator)), density)
    return model, CompactModule(copy.deepcopy(model), strict=True), shape


@pytest.mark.sweep
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_outputs_gradients_and_buffers(name, estimator):
    model, compact, shape = twins(name, estimator)
    for x, y in batches(shape, 2, 3, classes=5):
        x.requires_grad_()
        results = []
        for m in (model, compact):
            m.zero_grad()
            out = m(x)
            loss = F.cross_entropy(out, y) + 0.01 * threshold_penalty(m)
            loss.backward()
            results.append((out, x.grad))
            x.grad = None
        for a, b in zip(*results):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
        for (key, p), q in zip(model.named_parameters(), compact.model.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
        for (key, a), b in zip(model.state_dict().items(), compact.state_dict().values(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")
    model.eval(), compact.eval()
    with torch.no_grad():
        torch.testing.assert_close(compact(x), model(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_optimiser(optimizer):
    model, compact, shape = twins("lenet", "identity")
    a, b = (optimizer(m.parameters(), lr=1e-4) for m in (model, compact))
    flips, last = 0, None
    for x, y in batches(shape, 12, 4):
        for m, o in ((model, a), (compact, b)):
            o.zero_grad()
            (F.cross_entropy(m(x), y) + 0.01 * threshold_penalty(m)).backward()
            o.step()
        now = [layer.density() for _, layer in threshold_layers(model)]
        flips += last is not None and now != last
        last = now
    assert flips > 0
    for p, q in zip(model.parameters(), compact.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-8)


def test_autocast():
    model, compact, shape = twins("conv4", "window", dtype=torch.float32)
    x, y = next(batches(shape, 1, 8, dtype=torch.float32))
    grads = []
    for m in (model, compact):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = m(x)
        assert out.dtype == torch.bfloat16
        F.cross_entropy(out.float(), y).backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters()]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.98


def test_copies_pickles_and_state_dicts_are_those_of_the_model():
    model, compact, shape = twins("padded", "identity")
    x, _ = next(batches(shape, 1, 2))
    compact.eval()
    expected = compact(x)
    for other in (copy.deepcopy(compact), pickle.loads(pickle.dumps(compact))):
        assert not other.training
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.model.net[0].weight.zero_()
        assert torch.equal(compact(x), expected)
    assert compact.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        compact.model.net[13].threshold.zero_()
    assert not torch.equal(compact(x), expected)
    compact.load_state_dict(model.state_dict())
    assert torch.equal(compact(x), expected)


def test_graphs_are_not_kept_alive():
    _, compact, shape = twins("lenet", "identity")
    x, _ = next(batches(shape, 1, 2))
    compact(x).sum().backward()
    ((_, captured),) = compact._captures
    (made,) = captured.made.values()
    assert all(layer.slot.weight is None for layer in made.layers.values())


def test_what_cannot_be_traced():
    compact = CompactModule(Branch())
    assert compact.engine == "masked" and "cannot be traced" in compact.explain()
    x = torch.randn(2, 4)
    assert torch.equal(compact(x), compact.model(x))
    with pytest.raises(Unsupported, match="cannot be traced"):
        CompactModule(Branch(), strict=True)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["vgg", "joined", "mobilenet", "chunks", "encoder", "attentions"])
@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_autocast_gives_the_type_of_the_model(name, estimator):
    torch.manual_seed(0)
    model = prune(warm_norms(with_estimator(convert(GRAPHS[name]()), estimator)), 0.5)
    compact = CompactModule(copy.deepcopy(model), strict=True, verify="never")
    x = torch.randn(4, 3, 8, 8)
    for training in (True, False):
        results = []
        for m in (model, compact):
            m.train(training)
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(training):
                torch.manual_seed(1)
                results.append(m(x))
        a, b = results
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.05)

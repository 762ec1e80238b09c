"""Layers that compute their active filters alone, on a CPU, against the reference: outputs and every gradient."""

import copy
import itertools

import pytest
import torch

from spafl_kernels import (
    ThresholdConv1d,
    ThresholdConv2d,
    ThresholdConvTranspose2d,
    ThresholdLinear,
    backend,
    executed,
    explain,
)
from spafl_kernels.cpu import skip

SHAPES = {
    "conv": (lambda **k: ThresholdConv2d(5, 13, 3, padding=1, **k), (3, 5, 7, 6)),
    "strided": (lambda **k: ThresholdConv2d(5, 16, (3, 2), (2, 1), (0, 1), (1, 2), **k), (3, 5, 9, 8)),
    "same": (lambda **k: ThresholdConv2d(5, 9, 3, padding="same", dilation=2, **k), (2, 5, 7, 6)),
    "reflected": (lambda **k: ThresholdConv2d(5, 9, 3, padding=2, padding_mode="reflect", **k), (2, 5, 7, 6)),
    "no batch": (lambda **k: ThresholdConv2d(5, 13, 1, **k), (5, 4, 4)),
    "one dimension": (lambda **k: ThresholdConv1d(4, 11, 3, 2, 1, **k), (3, 4, 9)),
    "transposed": (lambda **k: ThresholdConvTranspose2d(4, 10, 3, 2, 1, 1, **k), (2, 4, 5, 4)),
    "linear": (lambda **k: ThresholdLinear(6, 17, **k), (2, 3, 6)),
}
NAMES = ("output", "input", "weight", "threshold", "bias")


def prune(layer, active, far=()):
    with torch.no_grad():
        scores = layer.scores()
        margin = torch.where(active, 0.1, -0.1).to(scores.dtype)
        margin[list(far)] *= 20
        layer.threshold.copy_(scores - margin)


def results(layer, x, grad, request):
    """The output, and the gradients of input, weight, threshold and bias."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with backend.requesting(request):
        out = layer(x)
    out.backward(grad(out))
    gradients = [None if p is None else p.grad for p in (layer.weight, layer.threshold, layer.bias)]
    return [out.detach(), x.grad, *gradients]


def same(layer, x, grad=torch.ones_like):
    right, ours = (results(layer, x, grad, request) for request in ("reference", "narrow"))
    for name, a, b in zip(NAMES, right, ours, strict=True):
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12, equal_nan=True, msg=name)


def runs(layer, x):
    return explain(layer, x).backend == "narrow"


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("estimator", ["identity", "window"])
@pytest.mark.parametrize(
    ("bias", "mask_bias", "native"),
    [(False, False, True), (True, False, True), (True, True, True), (True, False, False)],
)
def test_every_gradient_at_every_density(kind, estimator, bias, mask_bias, native, monkeypatch):
    if not native:
        monkeypatch.setattr("spafl_kernels.cpu.compiled.ready", lambda: False)
    make, shape = SHAPES[kind]
    torch.manual_seed(0)
    layer = make(bias=bias, estimator=estimator, mask_bias=mask_bias).double()
    width = len(layer.threshold)
    for count, last in itertools.product((0, 1, width // 2, width - 1, width), (False, True)):
        active = torch.zeros(width, dtype=torch.bool)
        active[torch.randperm(width)[:count]] = True
        pruned = (~active).nonzero().flatten().tolist()
        prune(layer, active, far=pruned[:2] if last else ())
        x = torch.randn(shape, dtype=torch.float64)
        if x.dim() == 4 and last:
            x = x.contiguous(memory_format=torch.channels_last)
        with backend.requesting("narrow"):
            assert runs(layer, x) == (0 < count < width)

        # Gradients everywhere; then none at pruned filters but one.
        same(layer, x, lambda out: torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1)))

        def few(out, active=active, pruned=pruned):  # one pruned filter has a gradient
            channel = out.dim() - {"linear": 1, "one dimension": 2}.get(kind, 3)
            grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
            rows = active.clone()
            rows[pruned[:1]] = True
            return grad * rows.view([-1 if d == channel else 1 for d in range(out.dim())])

        same(layer, x, few)
        for frozen in ("weight", "threshold"):
            twin = copy.deepcopy(layer)
            getattr(twin, frozen).requires_grad_(False)
            right, ours = (results(twin, x, torch.ones_like, request) for request in ("reference", "narrow"))
            for a, b in zip(right, ours):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def half(estimator="identity", far=()):
    torch.manual_seed(0)
    layer = ThresholdConv2d(4, 8, 3, estimator=estimator).double()
    prune(layer, torch.arange(8) % 2 == 0, far)
    return layer, torch.randn(2, 4, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_what_is_not_finite_is_not_lost(estimator):
    layer, x = half(estimator)

    def spoilt(out):
        grad = torch.ones_like(out)
        grad[0, 1, 0, 0] = float("nan")  # of a pruned filter
        return grad

    same(layer, x, spoilt)
    with torch.no_grad():
        layer.weight[1, 0, 0, 0] = float("nan")
    same(layer, x)
    with backend.requesting("narrow"):
        assert not layer(x).isfinite().all() and not runs(layer, x)


@pytest.mark.parametrize("estimator", ["identity", "window"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_masked_bias_that_is_not_finite_is_not_lost(estimator, value):
    layer, x = half(estimator)
    layer.mask_bias = True
    layer.bias.data[1] = value  # of a pruned filter
    same(layer, x)
    with backend.requesting("narrow"):
        assert layer(x)[:, 1].isnan().all() and not runs(layer, x)


@pytest.mark.parametrize(("estimator", "far"), [("identity", ()), ("window", ()), ("window", (1,))])
def test_second_derivatives(estimator, far):
    layer, x = half(estimator, far)
    found = []
    for request in ("reference", "narrow"):
        with backend.requesting(request):
            inputs = [x.clone().requires_grad_(), layer.weight, layer.threshold, layer.bias]
            out = layer(inputs[0])
            first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("way", ["vmap", "compile", "forward mode", "autocast", "meta"])
def test_whoever_listens_gets_the_reference(way):
    layer, x = half()
    right = layer(x)
    with backend.requesting("narrow"):
        assert runs(layer, x)
        if way == "vmap":
            torch.testing.assert_close(torch.func.vmap(layer)(x), right)
        elif way == "compile":
            torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), right)
        elif way == "forward mode":
            y, t = torch.func.jvp(layer, (x,), (x,))
            torch.testing.assert_close(y, right)
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, x)
                torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, t)
        elif way == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer.float()(x.float()).dtype == torch.bfloat16
        else:
            assert layer.to("meta")(x.to("meta")).shape == right.shape


def test_groups_and_uneven_padding_run_the_reference():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with backend.requesting("narrow"):
        for layer in (ThresholdConv2d(4, 8, 3, groups=2), ThresholdConv2d(4, 8, 2, padding="same")):
            layer.double()
            prune(layer, torch.arange(8) < 3)
            assert not runs(layer, x)
            same(layer, x)


def test_bad_shapes_are_refused_as_ever():
    layer, x = half()
    with pytest.raises(RuntimeError, match=r"expected input.* to have 4 channels"):
        layer(x[:, :3])


def test_it_is_chosen_where_it_pays_and_the_choice_can_be_asked_for():
    torch.manual_seed(0)
    layer = ThresholdConv2d(64, 64, 3, padding=1)
    x = torch.randn(8, 64, 16, 16)
    assert explain(layer, x).reason == "64 of 64 filters are active, where skipping does not pay"
    prune(layer, torch.arange(64) < 32)
    found = explain(layer, x)
    assert (found.backend, found.fallback) == ("narrow", False)
    assert found.reason == "32 of 64 filters are active and computed, the others skipped"
    with backend.requesting("reference"):
        assert explain(layer, x).reason == "SPAFL_BACKEND=reference asks for it"
    small = ThresholdLinear(8, 8)
    prune(small, torch.arange(8) < 4)
    assert explain(small, torch.randn(2, 8)).reason == "the layer is too small for skipping to pay"


def test_what_pays():
    macs, outputs = 64 * 64 * 9 * 16 * 1024, 64 * 16 * 1024
    for products in (1, 2, 3):
        choices = [skip.pays(products, macs, outputs, 64, filters) for filters in range(65)]
        assert choices[32] and not choices[57] and choices == sorted(choices, reverse=True)  # from some density on
        assert not skip.pays(products, macs // 1000, outputs // 100, 64, 8)
        assert not skip.pays(products, macs, outputs, 16, 2)


@pytest.mark.parametrize(("estimator", "rows"), [("identity", 24), ("window", 8)])
def test_what_is_skipped_is_told_to_whoever_counts(estimator, rows):
    """Of 24 filters 8 are active; the gradient of the weight of the others is 0 under ``window`` only."""
    torch.manual_seed(0)
    layer = ThresholdConv2d(4, 24, 3, estimator=estimator)
    prune(layer, torch.arange(24) < 8)
    counter, x = executed.Executed(), torch.randn(2, 4, 6, 6, requires_grad=True)
    with backend.requesting("narrow"), counter.counting():
        layer(x).sum().backward()
    assert counter.total() == -2 * 16 * 36 * (16 + 16 + (24 - rows))

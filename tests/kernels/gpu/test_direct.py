"""Layers in plain eager mode on a GPU: one autograd function around the launchers, run here in the interpreter."""

import contextlib

import pytest
from support.process import INTERPRETED, pytest_in_own_process

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

if not INTERPRETED:

    def test_direct_calls_in_the_interpreter():
        pytest_in_own_process(__file__, interpret=True)

else:
    import torch
    from support import interpreter as checks
    from support.poison import poisoned
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode

    from spafl_kernels import ThresholdConv2d, ThresholdLinear, backend, functional, reference
    from spafl_kernels.gpu import choice, direct, operators, single
    from spafl_kernels.gpu.tables import choices
    from spafl_kernels.threshold_layer import Selected

    checks.install()

    @pytest.fixture(autouse=True)
    def layers_as_on_cuda(monkeypatch):
        """CPU tensors count as CUDA tensors, for layers and for operators; nothing is remembered from other tests."""
        monkeypatch.setattr(choice, "on_gpu", lambda tensor: True)
        monkeypatch.setattr(single, "_known", {})
        monkeypatch.setattr(single, "_repeated", {})
        with operators.kernels_of_cuda_on_the_cpu(), poisoned(monkeypatch):
            yield

    @pytest.fixture
    def direct_calls(monkeypatch):
        """Every call that goes around the dispatcher."""
        seen, stock = [], direct.run
        monkeypatch.setattr(direct, "run", lambda *a: (seen.append(a), stock(*a))[1])
        return seen

    def pruned(layer, seed=0):
        """The layer with about half its filters pruned, far from the threshold and from the window's edge."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            layer.weight.copy_(3 * torch.randn(layer.weight.shape, generator=generator))
            keep = torch.rand(len(layer.threshold), generator=generator) < 0.5
            layer.threshold.copy_(layer.scores() + torch.where(keep, -0.5, 1.5))
        return layer

    LAYERS = {
        "linear": (lambda: ThresholdLinear(7, 6), (5, 7)),
        "linear of three dimensions": (lambda: ThresholdLinear(7, 6, bias=False, estimator="window"), (2, 3, 7)),
        "convolution": (lambda: ThresholdConv2d(3, 6, 3, stride=2, padding=1, mask_bias=True), (2, 3, 7, 6)),
        "one image": (lambda: ThresholdConv2d(3, 6, (3, 2), bias=False), (3, 5, 6)),
        "uneven": (lambda: ThresholdConv2d(3, 6, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 6, 7)),
        "reflected": (lambda: ThresholdConv2d(3, 6, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 7)),
    }

    def by_reference(layer, x):
        """The definition on the same parameters."""
        with backend.requesting("reference"):
            return layer(x)

    def gradients(y, upstream, *tensors):
        return torch.autograd.grad(y, tensors, upstream, retain_graph=True)

    @pytest.mark.parametrize("name", LAYERS)
    def test_a_layer_equals_the_definition_on_the_first_calls_and_when_recognised(name, direct_calls):
        make, shape = LAYERS[name]
        layer = pruned(make())
        for seed in range(3):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            got, want = layer(x), by_reference(layer, x)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            upstream = torch.randn(want.shape)
            for a, b in zip(*(gradients(y, upstream, x, *layer.parameters()) for y in (got, want)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                assert torch.equal(layer(x), got)
        assert len(direct_calls) == 6 and len(single._known) == 1
        assert single._repeated or direct.same_as(x) is None

    @pytest.mark.parametrize("needs", [(True, False), (False, True)])
    def test_only_what_needs_a_gradient_gets_one(needs):
        layer = pruned(ThresholdConv2d(3, 6, 3)).requires_grad_(needs[1])
        x = torch.randn(2, 3, 5, 6).requires_grad_(needs[0])
        layer(x).sum().backward()
        assert (x.grad is not None) == needs[0]
        assert all((p.grad is not None) == needs[1] for p in layer.parameters())
        layer.requires_grad_(False).threshold.requires_grad_(True)
        layer.zero_grad()
        layer(x).sum().backward()
        assert layer.threshold.grad is not None and layer.weight.grad is None and layer.bias.grad is None

    def test_results_can_be_changed_in_place():
        layer = pruned(ThresholdConv2d(3, 6, 3))
        x = torch.randn(2, 3, 5, 6).requires_grad_()
        got, want = nn.Sequential(layer, nn.ReLU(inplace=True))(x), by_reference(layer, x).relu()
        assert not got._is_view()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        for a, b in zip(*(gradients(y.sum(), None, x, layer.weight) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        layer(x).sum().backward()
        assert not any(p.grad._is_view() for p in (x, *layer.parameters()))

    def test_a_changed_weight_is_noticed():
        layer, x = pruned(ThresholdLinear(7, 6)), torch.randn(5, 7).requires_grad_()
        y = layer(x)
        with torch.no_grad():
            layer.weight.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("name", ["linear", "convolution"])
    def test_second_derivatives_are_refused_in_words(name):
        make, shape = LAYERS[name]
        layer, x = pruned(make()), torch.randn(shape).requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not implemented by the packed threshold"):
            dx.sum().backward()

    @pytest.mark.parametrize("name", ["linear", "convolution"])
    def test_many_gradients_at_once_are_clients_of_one_call(name):
        make, shape = LAYERS[name]
        layer, x = pruned(make()), torch.randn(shape).requires_grad_()
        y = layer(x)
        upstream = torch.randn(3, *y.shape)
        many = torch.autograd.grad(y, (x, layer.weight), upstream, is_grads_batched=True, retain_graph=True)
        for i, each in enumerate(upstream):
            for a, b in zip(many, gradients(y, each, x, layer.weight), strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-5, atol=1e-5)

    class Seen(TorchDispatchMode):
        """Names of the operators that are called."""

        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    @pytest.mark.parametrize("number", range(4))
    def test_a_lazy_negation_is_resolved(number):
        """A tensor with the negation bit holds the negatives of its values in memory."""
        layer, x = pruned(ThresholdLinear(7, 6)), torch.randn(5, 7)
        args = [x, layer.weight.detach(), layer.threshold.detach(), layer.bias.detach()]
        want = functional.threshold_linear(*args)
        args[number] = torch._neg_view(-args[number])
        assert args[number].is_neg()
        torch.testing.assert_close(functional.threshold_linear(*args), want)

    def test_modes_see_operators(direct_calls):
        layer, x = pruned(ThresholdLinear(7, 6)), torch.randn(5, 7).requires_grad_()
        for before in (0, 3):  # also when the call would be recognised
            for _ in range(before):
                layer(x).sum().backward()
            assert len(direct_calls) == before
            with Seen() as seen:
                y = layer(x)
            assert "spafl::threshold_linear" in seen.names and len(direct_calls) == before
        y = layer(x)
        assert len(direct_calls) == 4
        with Seen() as seen:  # a mode that is entered between the two
            y.sum().backward()
        assert "spafl::threshold_linear_backward" in seen.names

    @contextlib.contextmanager
    def autocast_of_cuda(dtype):
        """What torch.autocast("cuda") sets, which does nothing where there is no GPU."""
        before = torch.get_autocast_dtype("cuda")
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)

    def test_the_input_is_cast_under_autocast_and_masks_are_decided_on_the_weights():
        layer = ThresholdLinear(4, 1, bias=False)
        with torch.no_grad():
            layer.weight.fill_(1.0 + 2**-12)  # the margin vanishes in bfloat16
            layer.threshold.fill_(1.0)
        for _ in range(3):
            x = torch.ones(2, 4, requires_grad=True)
            with autocast_of_cuda(torch.bfloat16):
                y = layer(x)
            assert y.dtype == torch.bfloat16 and y.tolist() == [[4.0], [4.0]]
            y.sum().backward()
            assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
        with pytest.raises(ValueError, match="input must have the dtype of weight outside autocast"):
            layer(x.detach().bfloat16())

    def test_what_was_known_does_not_outlive_its_facts(direct_calls):
        """Calls that differ from a known one in a single fact are checked, and chosen for, anew."""
        layer, x = pruned(ThresholdLinear(7, 6)), torch.randn(5, 7)
        args = (x, layer.weight, layer.threshold, layer.bias)
        for _ in range(3):
            functional.threshold_linear(*args)
        wrong = {
            "features": (torch.randn(5, 6), *args[1:]),
            "dtype of weight": (x.double(), *args[1:]),
            "threshold must": (*args[:2], torch.zeros(5), args[3]),
            "bias must": (*args[:3], torch.zeros(5)),
            "threshold has dtype": (*args[:2], torch.zeros(6).double(), args[3]),
            "bias has dtype": (*args[:3], torch.zeros(6).double()),
            "threshold is on meta": (*args[:2], torch.zeros(6, device="meta"), args[3]),
        }
        for message, given in wrong.items():
            with pytest.raises(ValueError, match=message):
                functional.threshold_linear(*given)
        with pytest.raises(ValueError, match="estimator must be one of"):
            functional.threshold_linear(*args, estimator="sigmoid")
        with pytest.raises(ValueError, match="selection and packed must have shapes"):
            functional.threshold_linear(*args, selected=Selected(torch.zeros(3).int(), torch.zeros(16, 16)))
        before = len(direct_calls)
        table = choices.Table(
            "made-up GPU", {}, {"conv1x1/1 in8 out8 positions4": {"fp32": {"eager": {1.0: "narrow"}}}}
        )
        with choices.SHELF.using(table):
            functional.threshold_linear(*args)
        with backend.requesting("reference"):
            functional.threshold_linear(*args)
        assert len(direct_calls) == before

    def test_other_memory_behind_the_same_parameters_is_noticed():
        layer, x = pruned(ThresholdConv2d(3, 6, 3)), torch.randn(2, 3, 5, 6).requires_grad_()
        for dtype, order in (
            (torch.float32, torch.contiguous_format), (torch.float32, torch.channels_last),
            (torch.bfloat16, torch.channels_last), (torch.float32, torch.contiguous_format),
        ):  # fmt: skip
            for parameter in layer.parameters():
                parameter.grad = None
                parameter.data = parameter.data.to(dtype)
            layer.weight.data = layer.weight.data.contiguous(memory_format=order)
            error = 1e-4 if dtype == torch.float32 else 0.05
            given, close = x.to(dtype), {"rtol": error, "atol": error}
            for _ in range(3):
                got, want = layer(given), by_reference(layer, given)
                torch.testing.assert_close(got, want, **close)
                for a, b in zip(*(gradients(y.sum(), None, x, layer.weight) for y in (got, want)), strict=True):
                    torch.testing.assert_close(a, b, **close)

    def test_what_is_known_is_bounded(monkeypatch):
        monkeypatch.setattr(single, "_MOST", 3)
        layer = pruned(ThresholdLinear(7, 6))
        for rows in range(1, 9):
            x = torch.randn(rows, 7)
            for _ in range(2):
                torch.testing.assert_close(layer(x), by_reference(layer, x), rtol=1e-4, atol=1e-4)
            assert len(single._known) <= 3 and len(single._repeated) <= 3

    def test_estimators_are_told_apart():
        layer, x = pruned(ThresholdLinear(7, 6)), torch.randn(5, 7)
        found = []
        for layer.estimator in (*reference.ESTIMATORS, *reference.ESTIMATORS):
            layer.zero_grad()
            layer(x).sum().backward()
            found.append(layer.threshold.grad.clone())
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
        assert not torch.equal(found[0], found[1])

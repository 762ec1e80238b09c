"""The layers against the plain ones: PyTorch's own samples, with nothing pruned and with half pruned."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

from spafl_kernels import (
    ThresholdConv1d,
    ThresholdConv2d,
    ThresholdConvTranspose2d,
    ThresholdLayer,
    ThresholdLinear,
    importance_update_,
    reference,
)

CLASSES = {
    nn.Conv1d: ThresholdConv1d,
    nn.Conv2d: ThresholdConv2d,
    nn.ConvTranspose2d: ThresholdConvTranspose2d,
    nn.Linear: ThresholdLinear,
}
INFOS = {info.module_cls: info for info in module_db if info.module_cls in CLASSES}


def forward_tensors(forward_input):
    return (*forward_input.args, *forward_input.kwargs.values())


def samples(cls):
    """(constructor arguments, input) of PyTorch's own module tests."""
    inputs = INFOS[cls].module_inputs_func(
        INFOS[cls], device="cpu", dtype=torch.float64, requires_grad=False, training=True
    )
    return [
        (s.constructor_input.args, s.constructor_input.kwargs, forward_tensors(s.forward_input), s.desc)
        for s in inputs
    ]  # fmt: skip


SAMPLES = [pytest.param(cls, *sample[:3], id=f"{cls.__name__}-{i}-{sample[3]}")
           for cls in CLASSES for i, sample in enumerate(samples(cls))]  # fmt: skip


def filter_slices(layer):
    """What makes each output channel, as index of the weight, by the definition."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return [(o,) for o in range(layer.weight.shape[0])]
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    places = (divmod(o, outputs) for o in range(layer.out_channels))
    return [(slice(g * inputs, (g + 1) * inputs), j) for g, j in places]


def test_pytorch_has_samples_of_all():
    assert {param.values[0] for param in SAMPLES} == set(CLASSES) and len(SAMPLES) > 5


@pytest.mark.parametrize(("cls", "args", "kwargs", "inputs"), SAMPLES)
@pytest.mark.parametrize("half", [False, True], ids=["dense", "half-pruned"])
def test_module_samples(cls, args, kwargs, inputs, half):
    kwargs = {key: value for key, value in kwargs.items() if key != "device"}
    torch.manual_seed(0)
    plain = cls(*args, **kwargs).double()
    layer = CLASSES[cls](*args, **kwargs).double()
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["threshold"] and not unexpected
    if half:
        scores = layer.scores()
        with torch.no_grad():
            # The smaller half of the scores is pruned, the larger kept.
            layer.threshold.copy_(scores.median().expand_as(scores))
            for index, active in zip(filter_slices(layer), layer.mask().tolist()):
                plain.weight[index] *= active
        assert 0 < layer.mask().sum() < len(scores) or len(scores) == 1
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    out, expected = layer(*inputs), plain(*copies)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    for x, y in zip(inputs, copies):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    # plain.weight.grad is G = dL/dW~: the closed form gives what the layer must have.
    grad_weight, grad_threshold = reference.mask_gradients(
        layer.weight.detach(), layer.threshold.detach(), plain.weight.grad, layer.estimator, layer.transposed_groups
    )
    torch.testing.assert_close(layer.weight.grad, grad_weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.threshold.grad, grad_threshold, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("estimator", ["identity", "window"])
@pytest.mark.parametrize("mask_bias", [False, True])
def test_the_filter_of_a_transposed_convolution_is_what_makes_an_output_channel(groups, estimator, mask_bias):
    torch.manual_seed(0)
    layer = ThresholdConvTranspose2d(6, 12, 3, 2, 1, 1, groups, estimator=estimator, mask_bias=mask_bias).double()
    slices = filter_slices(layer)
    scores = torch.stack([layer.weight[i].abs().mean() for i in slices]).detach()
    torch.testing.assert_close(layer.scores(), scores)
    with torch.no_grad():
        layer.threshold.copy_(scores + torch.tensor([-0.1, 0.1, -2.0, 2.0] * 3))
    active = torch.tensor([True, False] * 6)
    assert torch.equal(layer.mask(), active)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    out = layer(x)
    # Another weight in a pruned filter changes nothing; in an active one, its own channel alone.
    for o, index in enumerate(slices):
        other = copy.deepcopy(layer)
        with torch.no_grad():
            other.weight[index] *= -1
        changed = (other(x) != out).any(0).flatten(1).any(1)
        assert torch.equal(changed, torch.arange(12).eq(o) & active)
    # The closed form, filter by filter, from the gradient of the masked weight.
    masked = torch.zeros_like(layer.weight)
    for o, index in enumerate(slices):
        masked[index] = layer.weight[index].detach() * active[o]
    masked.requires_grad_()
    bias = layer.bias.detach() * (active if mask_bias else 1)
    right = nn.functional.conv_transpose2d(x, masked, bias, 2, 1, 1, groups)
    torch.testing.assert_close(out, right)
    grad = torch.randn_like(out)
    out.backward(grad)
    (g,) = torch.autograd.grad(right, masked, grad)
    for o, index in enumerate(slices):
        w = layer.weight[index].detach()
        far = estimator == "identity" or abs(float(scores[o] - layer.threshold.detach()[o])) > 1
        r = (g[index] * w).sum() + (grad[:, o].sum() * layer.bias[o] if mask_bias else 0)
        r = r * far
        expected = active[o] * g[index] + r * w.sign() / w.numel()
        torch.testing.assert_close(layer.weight.grad[index], expected)
        torch.testing.assert_close(layer.threshold.grad[o], -r)
    # The importance update shifts each filter along the sign of its sum.
    delta, weight = torch.randn(12, dtype=torch.float64), layer.weight.detach().clone()
    for normaliser, d in (("kernel", 9), ("row", 9 * 6 // groups)):
        moved = weight.clone()
        importance_update_(moved, delta, normaliser, groups)
        for o, index in enumerate(slices):
            torch.testing.assert_close(moved[index], weight[index] - delta[o] / d * weight[index].sum().sign())


@pytest.mark.parametrize("size", [(8, 9), (7, 8)])
def test_a_transposed_convolution_takes_an_output_size(size):
    torch.manual_seed(0)
    layer = ThresholdConvTranspose2d(4, 6, 3, 2, 1)
    plain = nn.ConvTranspose2d(4, 6, 3, 2, 1)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(1, 4, 4, 4) if size == (7, 8) else torch.randn(1, 4, 4, 5)
    torch.testing.assert_close(layer(x, size), plain(x, size))


def conv(**kwargs):
    torch.manual_seed(1)
    return ThresholdConv2d(4, 6, 3, **kwargs).double()


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, (1, 2), "same", "valid"])
@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (1, 2, 2)])
def test_padding_modes(mode, padding, stride, dilation, groups):
    layer = conv(padding=padding, padding_mode=mode, stride=stride, dilation=dilation, groups=groups)
    plain = nn.Conv2d(
        4, 6, 3, padding=padding, padding_mode=mode, stride=stride, dilation=dilation, groups=groups
    ).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("mask_bias", [False, True])
def test_bias_of_a_pruned_filter(mask_bias):
    layer = conv(mask_bias=mask_bias)
    with torch.no_grad():
        layer.threshold[2] = 10.0
    out = layer(torch.randn(1, 4, 5, 5, dtype=torch.float64))
    expected = 0.0 if mask_bias else layer.bias[2].item()
    assert (out[0, 2] == expected).all()
    out.sum().backward()
    assert (layer.bias.grad[2] == 0) == mask_bias


def test_gradcheck_of_what_is_differentiable():
    """With the step held fixed (window, margins inside) the layer is an ordinary function of weight and input."""
    layer = conv(estimator="window")
    with torch.no_grad():
        layer.threshold[1] = 1.0
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = {"weight": layer.weight, "bias": layer.bias}

    def call(x, weight, bias):
        return torch.func.functional_call(layer, {**parameters, "weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.weight, layer.bias))
    assert torch.autograd.gradgradcheck(call, (x, layer.weight, layer.bias))


def test_autocast_deepcopy_and_pickle():
    layer = ThresholdLinear(8, 5)
    with torch.no_grad():
        layer.threshold[:2] = 9.0
    x = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and (out[:, :2] == layer.bias[:2].bfloat16()).all()
    assert layer.weight.grad.dtype == torch.float32
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(twin, ThresholdLayer) and torch.equal(twin(x), layer(x))
        assert twin.threshold is not layer.threshold


def test_half_precision_and_other_devices_are_built_there():
    layer = ThresholdConv2d(3, 4, 3, dtype=torch.float16, device="meta")
    assert layer.threshold.dtype == torch.float16 and layer.threshold.device.type == "meta"


@pytest.mark.parametrize("transform", ["vmap", "compile"])
def test_function_transforms(transform):
    layer = ThresholdLinear(6, 4).double()
    with torch.no_grad():
        layer.threshold[0] = 9.0
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    if transform == "vmap":
        out = torch.func.vmap(layer)(x)
        per_sample = torch.func.vmap(
            torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, (x,)).sum()), (None, 0)
        )
        grads = per_sample(dict(layer.named_parameters()), x)
        for i in range(3):
            layer.zero_grad()
            layer(x[i]).sum().backward()
            torch.testing.assert_close(grads["threshold"][i], layer.threshold.grad)
    else:
        out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, layer(x))


def test_state_dict_and_representation():
    layer = ThresholdConv2d(3, 4, 3, estimator="window", mask_bias=True)
    assert list(layer.state_dict()) == ["weight", "bias", "threshold"]
    assert (layer.threshold == 0).all() and layer.density() == 1.0
    assert "estimator=window, mask_bias=True" in repr(layer)
    with torch.no_grad():
        layer.threshold += 1
    layer.reset_parameters()
    assert (layer.threshold == 0).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="estimator must be one of identity, window; got 'ste'"):
        ThresholdLinear(3, 4, estimator="ste")
    layer = ThresholdLinear(3, 4)
    from spafl_kernels import threshold_linear

    with pytest.raises(ValueError, match=r"expected shape \(4,\) for a weight of shape \(4, 3\); got \(3,\)"):
        threshold_linear(torch.ones(1, 3), layer.weight, torch.zeros(3))
    with pytest.raises(ValueError, match=r"threshold has dtype torch\.float64 but weight has torch\.float32"):
        threshold_linear(torch.ones(1, 3), layer.weight, torch.zeros(4).double())
    with pytest.raises(ValueError, match="threshold is on meta but weight is on cpu"):
        threshold_linear(torch.ones(1, 3), layer.weight, torch.zeros(4, device="meta"))


# ----------------------------------------------------------------------------------------------- bad thresholds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_threshold_that_is_not_finite_is_refused_where_work_begins(value):
    from spafl_kernels import observe
    from spafl_kernels.functional import check_thresholds
    from spafl_kernels.training import MaskedTrainer, SGDOptions

    model = nn.Sequential(ThresholdLinear(3, 4), nn.ReLU(), ThresholdLinear(4, 2))
    check_thresholds(model)
    good = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model[2].threshold[1] = value
    message = r"thresholds must be finite; NaN or infinite in 2 \(1 of 2\)"
    for begin in (check_thresholds, observe, lambda m: MaskedTrainer(m).begin(SGDOptions(0.1))):
        with pytest.raises(ValueError, match=message):
            begin(model)
    bad = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(good)
    trainer = MaskedTrainer(model)
    trainer.begin(SGDOptions(0.1))  # a refused begin leaves nothing open, a good one works
    with pytest.raises(RuntimeError, match=r"2.threshold must be finite; NaN or infinite at filters \[1\]"):
        model.load_state_dict(bad)

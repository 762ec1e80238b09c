import copy
import warnings

import pytest
import torch
from torch import nn

from spafl_kernels import (
    ThresholdConv2d,
    ThresholdLinear,
    convert,
    density,
    threshold_layers,
    threshold_penalty,
    to_dense,
)
from spafl_kernels.cost import layer_macs


def model():
    torch.manual_seed(0)
    shared = nn.Linear(12, 12)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 12), shared, nn.ReLU(), shared, nn.ModuleDict({"head": nn.Linear(12, 3)})["head"],
    )  # fmt: skip


def test_round_trip_keeps_the_function_and_the_original():
    net = model().eval()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(2, 3, 6, 6)
    sparse = convert(net, estimator="window")
    assert [type(m) for m in net if isinstance(m, nn.Linear)] == [nn.Linear] * 4
    assert torch.equal(sparse(x), net(x))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert [layer.estimator for _, layer in threshold_layers(sparse)] == ["window"] * 4
    with torch.no_grad():
        for _, layer in threshold_layers(sparse):
            layer.threshold.copy_(layer.scores().median().expand_as(layer.threshold))
    assert all(0 < d < 1 for d in density(sparse).values())
    dense = to_dense(sparse)
    assert not list(threshold_layers(dense)) and list(dense.state_dict()) == list(net.state_dict())
    assert torch.equal(dense(x), sparse(x)) and not dense.training


def test_a_shared_layer_stays_shared():
    sparse = convert(model())
    assert sparse[6] is sparse[8]
    assert len(list(threshold_layers(sparse))) == 4


def test_in_place_keeps_parameters_hooks_and_freezing():
    net = model()
    weight = net[0].weight
    weight.requires_grad_(False)
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    assert convert(net, inplace=True) is net
    assert isinstance(net[0], ThresholdConv2d) and net[0].weight is weight and not net[0].weight.requires_grad
    net(torch.randn(2, 3, 6, 6))
    assert seen == [1]


def test_where_chooses_layers_and_a_bare_layer_converts():
    sparse = convert(model(), where=lambda name, layer: isinstance(layer, nn.Conv2d))
    assert [name for name, _ in threshold_layers(sparse)] == ["0"]
    assert isinstance(convert(nn.Linear(2, 3)), ThresholdLinear)


def test_layers_a_mask_could_not_reach():
    attention = nn.MultiheadAttention(8, 2)
    assert not list(threshold_layers(convert(attention)))  # out_proj is read, never called
    with pytest.raises(ValueError, match="layer 'out_proj' is a NonDynamicallyQuantizableLinear"):
        convert(attention, where=lambda name, layer: name == "out_proj")
    normed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    assert not list(threshold_layers(convert(normed)))
    with pytest.raises(ValueError, match="layer '0' is a ParametrizedLinear"):
        convert(normed, where=lambda name, layer: isinstance(layer, nn.Linear))


def test_mask_bias_burns_in():
    layer = ThresholdLinear(3, 2, mask_bias=True)
    with torch.no_grad():
        layer.threshold[0] = 5
    dense = to_dense(layer)
    assert dense.bias[0] == 0 and dense.bias[1] == layer.bias[1]


def test_penalty_and_its_gradient():
    sparse = convert(model())
    with torch.no_grad():
        for i, (_, layer) in enumerate(threshold_layers(sparse)):
            layer.threshold.fill_(0.1 * i)
    expected = sum(len(layer.threshold) * torch.exp(torch.tensor(-0.1 * i)) for i, (_, layer) in
                   enumerate(threshold_layers(sparse)))  # fmt: skip
    penalty = threshold_penalty(sparse)
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    torch.testing.assert_close(sparse[0].threshold.grad, -torch.exp(-sparse[0].threshold.detach()))
    assert threshold_penalty(model()) == 0


def test_computed_weights_are_left_alone():
    from torch.nn.utils import prune, spectral_norm, weight_norm

    makers = [weight_norm, spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)]
    for make in makers:
        for inplace in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                net = nn.Sequential(make(nn.Linear(3, 3)), nn.Linear(3, 2))
            x = torch.randn(2, 3)
            right = net.eval()(x)
            sparse = convert(net, inplace=inplace)
            assert [type(m) for m in sparse] == [nn.Linear, ThresholdLinear]
            assert torch.equal(sparse(x), right) and torch.equal(to_dense(sparse)(x), right)
            with pytest.raises(ValueError, match="layer '0' has a computed weight"):
                convert(net, where=lambda name, layer: name == "0")


KINDS = {
    nn.Conv1d: (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 8)),
    nn.Conv2d: (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
    nn.ConvTranspose2d: (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (2, 4, 8, 8)),
    nn.Linear: (lambda: nn.Linear(8, 6), (2, 4, 8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_there_and_back(kind):
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    plain, x = make().requires_grad_(False), torch.randn(shape)
    layer = convert(plain, mask_bias=True)
    assert isinstance(layer, kind) and type(layer) is not kind and not layer.threshold.requires_grad
    assert torch.equal(layer(x), plain(x)) and layer.threshold.shape == (6,)
    with torch.no_grad():
        layer.threshold[::2] = 9
    back = to_dense(layer)
    assert type(back) is kind and list(back.state_dict()) == list(plain.state_dict())
    assert torch.equal(back(x), layer(x)) and (back.bias[::2] == 0).all()
    assert layer_macs(layer, x[:1]) == layer_macs(plain, x[:1])


def test_a_computed_bias_is_left_alone_too():
    from torch.nn.utils import prune

    net = nn.Sequential(prune.l1_unstructured(nn.Linear(3, 3), "bias", 0.5))
    assert type(convert(net)[0]) is nn.Linear
    with pytest.raises(ValueError, match="layer '0' has a computed weight or bias"):
        convert(net, where=lambda name, layer: True)


@pytest.mark.parametrize("kind", [nn.LazyConv1d, nn.LazyConv2d, nn.LazyConvTranspose2d])
def test_every_kind_of_lazy_layer_is_refused(kind):
    with pytest.raises(ValueError, match="is lazy and has no weight yet"):
        convert(nn.Sequential(kind(3, 3)))


def test_lazy_layers_are_refused():
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyConv2d(3, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="layer '0' is lazy and has no weight yet"):
        convert(net)
    assert len(list(threshold_layers(convert(net, where=lambda name, layer: name == "2")))) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_an_encoder_layer_calls_its_layers_in_eval_mode_too(nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2) if nested else layer
    net = convert(plain).eval()
    for _, m in threshold_layers(net):
        nn.init.constant_(m.threshold, 1e9)
    x = torch.randn(2, 3, 8)
    given = {"src_key_padding_mask": torch.tensor([[False, False, True], [False, False, False]])}
    for kwargs in ({}, given):
        right = net(x, **kwargs)
        with torch.no_grad():
            torch.testing.assert_close(net(x, **kwargs), right)
            torch.testing.assert_close(to_dense(net)(x, **kwargs)[:, :2], right[:, :2])
    dense = to_dense(net)
    first = dense.layers[0] if nested else dense
    assert first.activation_relu_or_gelu == 1 and getattr(dense, "use_nested_tensor", nested) == nested
    assert plain.training and layer.activation_relu_or_gelu == 1


def test_frozen_weights_get_frozen_thresholds():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    assert [layer.threshold.requires_grad for _, layer in threshold_layers(convert(net))] == [False, True]

import copy

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

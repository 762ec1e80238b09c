"""MAC counts against the published tables of the four models."""

import pytest
import torch
from torch import nn

from spafl.models import MODELS, build_model
from spafl_kernels import threshold_layers
from spafl_kernels.cost import layer_macs


@pytest.mark.parametrize(
    ("name", "channels", "macs", "thresholds", "weights"),
    [
        ("lenet5", 1, 2_293_000, 580, 430_500),
        ("conv4", 3, 82_489_600, 650, 804_800),
        ("resnet18", 3, 139_296_768, 2_400, 2_790_240),
        ("resnet18-full", 3, 555_417_600, 4_800, 11_159_232),
        ("vit", 3, 1_966_080, 12_288, 1_966_080),
    ],
)
def test_published_models(name, channels, macs, thresholds, weights):
    model = build_model(name, 100 if "resnet" in name else 10, channels, seed=0)
    layers = dict(threshold_layers(model))
    size = MODELS[name].image
    counted = layer_macs(model, torch.zeros(1, channels, size, size), per_token=False)
    assert sum(counted[layer] for layer in layers) == macs
    assert sum(len(layer.threshold) for layer in layers.values()) == thresholds
    assert sum(layer.weight.numel() for layer in layers.values()) == weights


def test_tokens_strides_groups_and_repeated_calls():
    shared = nn.Linear(6, 6)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Flatten(2), nn.LazyLinear(6), shared, shared)
    net(torch.zeros(1, 4, 9, 9))
    net.train()
    counts = layer_macs(net, torch.zeros(1, 4, 9, 9))
    assert counts["0"] == 6 * 2 * 9 * 16
    assert counts["2"] == 16 * 6 * 6
    assert counts["3"] == 2 * 6 * 36
    assert net.training


@pytest.mark.parametrize("name", list(MODELS))
def test_seeded_initialisation_repeats_and_leaves_random_state_alone(name):
    if name == "resnet18-full":
        pytest.skip("same code as resnet18, four times the weights")
    state = torch.get_rng_state()
    a, b = build_model(name, 10, 3, seed=5), build_model(name, 10, 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

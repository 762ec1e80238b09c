"""The inventory notices every change of a model's modules and parameters, and only these."""

import pytest
import torch
from torch import nn

from spafl_kernels import ThresholdLinear, threshold_layers
from spafl_kernels.inventory import Inventory


def build():
    return nn.Sequential(ThresholdLinear(4, 4, bias=False), nn.ReLU(), nn.Sequential(nn.Linear(4, 3)))


def replace_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def replace_module(model):
    model[1] = nn.GELU()


def append(model):
    model.append(ThresholdLinear(3, 2))


def remove(model):
    del model[2]


def give_a_bias(model):
    model[0].bias = nn.Parameter(torch.zeros(4))


def rename(model):
    inner = model[2]
    inner.register_module("last", inner._modules.pop("0"))


@pytest.mark.parametrize("change", [replace_parameter, replace_module, append, remove, give_a_bias, rename])
def test_a_change_is_seen_once(change):
    model = build()
    inventory = Inventory(model)
    assert not inventory.refresh()
    change(model)
    assert inventory.refresh()
    assert not inventory.refresh()
    now = dict(model.named_parameters())
    assert inventory.parameters.keys() == now.keys() and all(inventory.parameters[k] is p for k, p in now.items())
    assert inventory.thresholds == list(threshold_layers(model))


def test_values_and_memory_are_not_its_business():
    model = build()
    inventory = Inventory(model)
    parameters = inventory.parameters
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data.clone()
            p.add_(1)
    assert not inventory.refresh() and inventory.parameters is parameters

"""``TrainResult.macs`` of both engines at full density against what hooks on the layers add up to."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from spafl_kernels import convert, threshold_layers
from spafl_kernels.engines import make_trainer
from spafl_kernels.training import MaskedTrainer, SGDOptions


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, 2)
        self.f = nn.Linear(8, 5)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.f(torch.relu(self.c(h + torch.relu(self.b(h)))).mean((2, 3)))


class Attention(nn.Module):
    """Two heads of 8 channels on 7 tokens."""

    def __init__(self):
        super().__init__()
        self.q, self.o, self.f = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        q, k, v = self.q(x).view(-1, 7, 3, 2, 8).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 7, 16)
        return self.f(self.o(heads).mean(1))


def frozen():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 5))
    model[0].requires_grad_(False)
    return model


def stack(*layers, features):
    parts = [part for layer in layers for part in (layer, nn.ReLU())]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(features, 5))


# The model, the shape of a sample, and what attention multiplies for one sample, forward and backward.
MODELS = {
    "plain": (lambda: stack(nn.Conv2d(4, 8, 3, 2, 1), features=200), (4, 9, 9), 0),
    "groups": (lambda: stack(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=4), features=200), (4, 9, 9), 0),
    "depthwise": (
        lambda: stack(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=8), features=400),
        (4, 9, 9), 0,
    ),
    "transposed": (
        lambda: stack(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 6, 3, 2, groups=2), features=6 * 225), (4, 9, 9), 0
    ),
    "one dimension": (lambda: stack(nn.Conv1d(4, 8, 3), features=56), (4, 9), 0),
    "residual": (Residual, (4, 8, 8), 0),
    "frozen": (frozen, (4, 9, 9), 0),
    "attention": (Attention, (7, 16), 3 * 2 * 16 * 7 * 7),
}  # fmt: skip


def by_hand(model, shape, batch):
    """A product per layer, one more for the gradient of its input and of its weight, where there is one."""
    total = 0

    def hook(layer, args, out):
        nonlocal total
        if isinstance(layer, nn.Linear):
            positions = out.numel() // out.shape[-1]
        else:
            # Every input position of a transposed convolution meets the kernel, else every output position.
            place = args[0] if isinstance(layer, _ConvTransposeNd) else out
            positions = len(place) * place.shape[2:].numel()
        products = 1 + int(args[0].requires_grad) + int(layer.weight.requires_grad)
        total += products * layer.weight.numel() * positions

    for layer in model.modules():
        if isinstance(layer, (nn.Linear, _ConvNd)):
            layer.register_forward_hook(hook)
    model(torch.randn(batch, *shape))
    return total


@pytest.mark.parametrize("engine", ["masked", "compact"])
@pytest.mark.parametrize("name", MODELS)
def test_macs_of_a_step(engine, name):
    make, shape, attention = MODELS[name]
    torch.manual_seed(0)
    model = convert(make())
    right = by_hand(copy.deepcopy(model), shape, 4) + 4 * attention
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(model, engine, strict=True)
        trainer.begin(SGDOptions(lr=0.0))
        trainer.step(torch.randn(4, *shape), torch.arange(4))
        assert trainer.finish().macs == right


def test_a_layer_frozen_later_is_counted_anew():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)))
    trainer, counts = MaskedTrainer(model), []
    for freeze in (False, True):
        model[2].requires_grad_(not freeze)
        trainer.begin(SGDOptions(lr=0.0))
        trainer.step(torch.randn(4, 6), torch.arange(4))
        counts.append(trainer.finish().macs)
    assert counts == [4 * (2 * 48 + 3 * 40), 4 * (2 * 48 + 2 * 40)]


def test_lstm():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.cells(x)[0][:, -1])

    trainer = MaskedTrainer(Net())
    trainer.begin(SGDOptions(lr=0.0))
    trainer.step(torch.randn(4, 7, 8), torch.arange(4))
    # Its gradient of the input is made whether anybody needs it or not.
    assert trainer.finish().macs == 4 * 3 * (7 * 4 * 16 * (8 + 16) + 80)


@pytest.mark.parametrize("groups", [1, 8])
def test_pruned_filters_that_fill_up_or_have_a_gradient_are_counted(groups):
    """The last layer of an ``identity`` model computes every row."""
    torch.manual_seed(0)
    layers = nn.Conv2d(8, 16, 3, groups=groups, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6)
    model = convert(nn.Sequential(*layers))
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            layer.threshold[::2] = 9.0
    trainer = make_trainer(model, "compact", strict=True)
    trainer.begin(SGDOptions(lr=0.0))
    trainer.step(torch.randn(4, 8, 5, 5), torch.arange(4))
    rows = 8 if groups == 1 else 16  # filters in groups keep their places
    assert trainer.finish().macs == 4 * (2 * rows * 8 // groups * 9 * 9 + 3 * 6 * 9 * rows)

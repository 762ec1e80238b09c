"""``TrainResult.macs`` of both engines at full density against what hooks on the layers add up to."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode

from spafl_kernels import convert
from spafl_kernels.compact import CompactTrainer
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


class Products(TorchDispatchMode):
    """Adds up the products that PyTorch is asked for, by the shapes of the tensors it is given."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        match func.overloadpacket:
            case torch.ops.aten.convolution:
                out = func(*args, **(kwargs or {}))
                self.total += out[:, 0].numel() * args[1].numel()
                return out
            case torch.ops.aten.convolution_backward:
                gradient, _, weight = args[:3]
                self.total += sum(args[-1][:2]) * gradient[:, 0].numel() * weight.numel()
            case torch.ops.aten.mm:
                self.total += args[0].numel() * args[1].shape[1]
            case torch.ops.aten.addmm:
                self.total += args[1].numel() * args[2].shape[1]
        return func(*args, **(kwargs or {}))


# Filters 0 to 15; those of a group are neighbours, and zeros make the groups equally large. Where a group has one
# input, every kept filter is given that for its own.
@pytest.mark.parametrize(
    ("groups", "kept", "rows"),
    [(1, range(0, 16, 2), 8), (8, range(0, 16, 2), 8), (8, range(15), 15), (4, (0, 4, 5, 8), 6), (2, (2, 3), 2)],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_pruned_filters_that_fill_up_or_have_a_gradient_are_counted(groups, kept, rows, compiled):
    """Groups without kept filters are not there. The last layer of an ``identity`` model computes every row."""
    torch.manual_seed(0)
    layers = nn.Conv2d(8, 16, 3, groups=groups, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6)
    model = convert(nn.Sequential(*layers))
    with torch.no_grad():
        model[0].threshold.fill_(9.0)[list(kept)] = 0.0
        model[3].threshold[::2] = 9.0
    trainer = CompactTrainer(model, compiled=compiled, strict=True, verify="never")
    trainer.begin(SGDOptions(lr=0.0))
    x, y = torch.randn(4, 8, 5, 5), torch.arange(4)
    trainer.evaluate(x, y)  # reads the model, which runs it once
    with Products() as executed:
        trainer.step(x, y)
    inputs = 9 * (len(kept) if groups > 1 else -(-len(kept) // 8) * 8)
    by_hand = 4 * (2 * rows * 8 // groups * 9 * 9 + 3 * 6 * inputs)
    assert trainer.finish().macs == executed.total == by_hand

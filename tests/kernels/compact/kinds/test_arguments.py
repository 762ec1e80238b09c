"""Every operation that channels are followed through, with every argument it takes: as the masked model.

Pruned filters with a bias are constants, which is where an argument that nobody looked at shows.
"""

import copy

import pytest
import torch
from helpers import prune
from torch import nn
from torch.nn import functional as F

from spafl_kernels import ThresholdConv2d, ThresholdLinear, threshold_layers
from spafl_kernels.compact import CompactModule, CompactTrainer
from spafl_kernels.compact.export import _exported
from spafl_kernels.training import MaskedTrainer, SGDOptions


class Around(nn.Module):
    """An operation between a biased convolution and one that reads it."""

    def __init__(self, operation, module=None, estimator="window"):
        super().__init__()
        self.first = ThresholdConv2d(2, 8, 3, padding=1, estimator=estimator)
        self.second = ThresholdConv2d(8, 8, 1, estimator=estimator)
        self.operation, self.module = operation, module
        shown = (operation or copy.deepcopy(module).double())(torch.randn(2, 8, 7, 7, dtype=torch.float64))
        self.read = shown.dim() == 4

    def forward(self, x):
        y = self.first(x)
        y = self.module(y) if self.operation is None else self.operation(y)
        return F.relu(self.second(y)).flatten(1) if self.read else y.flatten(1)


FUNCTIONS = {
    "relu": lambda x: F.relu(x),
    "relu keyword": lambda x: F.relu(input=x),
    "relu inplace": lambda x: F.relu(x, True),
    "relu inplace keyword": lambda x: F.relu(input=x, inplace=True),
    "torch.relu": lambda x: torch.relu(input=x),
    "relu_": lambda x: x.relu_(),
    "F.relu_": lambda x: F.relu_(x),
    "relu6": lambda x: F.relu6(4 * x, inplace=True),
    "gelu": lambda x: F.gelu(x),
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu keyword": lambda x: F.gelu(input=x, approximate="tanh"),
    "silu": lambda x: F.silu(x, inplace=True),
    "tanh": lambda x: x.tanh(),
    "tanh_": lambda x: x.tanh_(),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "leaky_relu inplace": lambda x: F.leaky_relu(x, 0.3, True),
    "leaky_relu keyword": lambda x: F.leaky_relu(x, negative_slope=0.7, inplace=True),
    "elu": lambda x: F.elu(x, 2.0, True),
    "elu keyword": lambda x: F.elu(x, alpha=0.5),
    "hardswish": lambda x: F.hardswish(x, True),
    "mish": lambda x: F.mish(x, inplace=True),
    "softsign": lambda x: F.softsign(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "max": lambda x: F.max_pool2d(x, 2),
    "max stride": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max dilation": lambda x: F.max_pool2d(x, 2, 1, 0, 2),
    "max ceil": lambda x: F.max_pool2d(x, 3, 2, 1, 1, True),
    "max keyword": lambda x: F.max_pool2d(x, kernel_size=2, stride=1, ceil_mode=True, return_indices=False),
    "max indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, [2, 2], stride=[1, 2], ceil_mode=True),
    "average": lambda x: F.avg_pool2d(x, 2),
    "average padding": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average ceil": lambda x: F.avg_pool2d(x, 3, 2, 0, True),
    "average ceil padding": lambda x: F.avg_pool2d(x, 3, 2, padding=1, ceil_mode=True, count_include_pad=True),
    "average without padding": lambda x: F.avg_pool2d(x, 3, 2, 1, True, False),
    "average divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=1),
    "average divisor place": lambda x: F.avg_pool2d(x, 2, 2, 0, False, True, 3),
    "adaptive average": lambda x: F.adaptive_avg_pool2d(x, (3, None)),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, 2, False),
    "adaptive max indices": lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0],
    "mean": lambda x: x.mean((2, 3)),
    "mean one": lambda x: x.mean(-1),
    "mean keep": lambda x: torch.mean(x, (2, 3), True),
    "mean keyword": lambda x: torch.mean(input=x, dim=[2, 3], keepdim=True),
    "mean channels": lambda x: x.mean(1, keepdim=True) + x,
    "mean batch": lambda x: x.mean(0, keepdim=True) + x,
    "mean all": lambda x: x * x.mean(),
    "mean dtype": lambda x: x.mean((2, 3), dtype=torch.float64),
    "flatten": lambda x: torch.flatten(x, 1),
    "flatten keyword": lambda x: torch.flatten(input=x, start_dim=1),
    "flatten end": lambda x: x.flatten(2, 3),
    "view": lambda x: x.view(x.size(0), -1),
    "view keyword": lambda x: x.view(size=(-1, 8 * 49)),
    "view tuple": lambda x: x.view((x.shape[0], 8, 49)),
    "view dtype": lambda x: x + x.view(torch.int64).view(dtype=torch.float64),
    "view own dtype": lambda x: x + F.softsign(x).view(x.dtype),
    "view batch": lambda x: x.view(2, -1).sum() + x,
    "reshape": lambda x: x.reshape(x.shape),
    "reshape keyword": lambda x: torch.reshape(input=x, shape=(-1, 392)),
    "contiguous": lambda x: x.transpose(2, 3).contiguous(memory_format=torch.contiguous_format).view(x.size(0), -1),
    "clone": lambda x: x.clone(memory_format=torch.channels_last),
    "size keyword": lambda x: x.reshape(x.size(dim=0), -1),
    "add": lambda x: torch.add(x, x),
    "add alpha": lambda x: torch.add(x, x, alpha=3),
    "add keyword": lambda x: torch.add(input=x, other=F.relu(x)),
    "add keyword alpha": lambda x: x.add(other=F.relu(x), alpha=-2),
    "add_": lambda x: F.gelu(x).add_(x),
    "add_ alpha": lambda x: F.gelu(x).add_(x, alpha=0.5),
    "add number": lambda x: 1 + x + 2.5,
    "add broadcast": lambda x: x + x.mean((2, 3), keepdim=True),
    "add in place": lambda x: _in_place(x),
    "sum of three": lambda x: sum([x, F.relu(x), x]),
    "subtract": lambda x: x - F.relu(x),
    "multiply": lambda x: x * 0.5 * torch.sigmoid(x),
    "cat": lambda x: torch.cat([x[:, :4], F.relu(x)[:, 4:]], 1),
    "cat twice": lambda x: torch.cat([x, x], 1)[:, ::2],
    "cat keyword": lambda x: torch.cat(tensors=(F.gelu(x), x), dim=2),
    "cat axis": lambda x: torch.cat([x, x], axis=1)[:, 4:12],
    "concatenate": lambda x: torch.concatenate((x, F.relu(x)), dim=-1),
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "chunk keyword": lambda x: torch.chunk(input=x, chunks=2, dim=1)[1].repeat(1, 2, 1, 1),
    "chunk items": lambda x: _swapped(torch.chunk(x, 2, dim=1)),
    "chunk negative": lambda x: _swapped(x.chunk(chunks=2, dim=-3)),
    "chunk rows": lambda x: x.chunk(7, 2)[1],
    "split": lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1),
    "dropout off": lambda x: F.dropout(x, 0.5, False),
    "dropout zero": lambda x: F.dropout(x, p=0.0),
    "dropout on": lambda x: F.dropout(F.relu(x), 0.5, training=True),
    "dropout in place": lambda x: F.dropout(x, 0.3, True, True),
    "dropout default": lambda x: F.dropout(x),
    "dropout of maps": lambda x: F.dropout2d(x, 0.5, training=True),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "channels": lambda x: x.flip(1),
    "shuffle": lambda x: x.view(x.size(0), 2, 4, 7, 7).transpose(1, 2).contiguous().view(x.size(0), -1, 7, 7),
    "pad": lambda x: F.pad(x, (1, 1, 0, 2), value=0.5),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "item": lambda x: x[:, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])],
    "where": lambda x: torch.where(x > 0, x, -x),
    "softmax": lambda x: x.softmax(1),
    "clamp": lambda x: x.clamp_(-0.1, 0.2),
    "multiply in place": lambda x: _scaled(x),
    "written in places": lambda x: _written(x),
    "chunk list": lambda x: torch.cat(list(x.chunk(2, 1))[::-1], 1),
    "split list": lambda x: torch.cat([*x.split([3, 5], dim=1)][::-1], 1),
}


def _in_place(x):
    y = F.gelu(x)
    y += x
    return y


def _scaled(x):
    y = F.gelu(x)
    y *= 0.5
    return y


def _written(x):
    """Indices of several kinds, a number and a tensor, with a reader between the writes."""
    y = F.gelu(x)
    y[:, ::3] = 0.5
    read = y.mean((2, 3), keepdim=True)
    y[..., 0, 1:] = x[..., 0, 1:]
    y[x > 1] = 0
    return y * read


def _swapped(parts):
    a, b = parts[0], parts[1]
    return torch.cat([F.relu(b), a], 1)


MODULES = {
    "relu": nn.ReLU(True),
    "relu6": nn.ReLU6(True),
    "gelu": nn.GELU("tanh"),
    "silu": nn.SiLU(True),
    "tanh": nn.Tanh(),
    "leaky relu": nn.LeakyReLU(0.4, True),
    "elu": nn.ELU(0.3, True),
    "hardswish": nn.Hardswish(True),
    "mish": nn.Mish(True),
    "softsign": nn.Softsign(),
    "selu": nn.SELU(True),
    "prelu": nn.PReLU(8),
    "max": nn.MaxPool2d(2, 1, 1, 1, ceil_mode=True),
    "max dilation": nn.MaxPool2d(2, dilation=2),
    "average": nn.AvgPool2d(2),
    "average padding": nn.AvgPool2d(3, 2, 1),
    "average ceil": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average divisor": nn.AvgPool2d(2, divisor_override=1),
    "average divisor padding": nn.AvgPool2d(3, 2, 1, divisor_override=4),
    "adaptive average": nn.AdaptiveAvgPool2d((2, None)),
    "adaptive max": nn.AdaptiveMaxPool2d(3),
    "flatten": nn.Flatten(),
    "flatten part": nn.Flatten(2),
    "unflatten": nn.Sequential(nn.Flatten(), nn.Unflatten(1, (8, 7, 7))),
    "identity": nn.Identity(),
    "dropout zero": nn.Dropout(0.0),
    "dropout": nn.Dropout(0.3),
    "dropout in place": nn.Sequential(nn.GELU(), nn.Dropout(0.3, inplace=True)),
    "dropout2d": nn.Dropout2d(0.3),
    "alpha dropout": nn.AlphaDropout(0.3),
    "norm": nn.BatchNorm2d(8),
    "norm settings": nn.BatchNorm2d(8, eps=0.1, momentum=0.7),
    "norm plain": nn.BatchNorm2d(8, affine=False),
    "norm cumulative": nn.BatchNorm2d(8, momentum=None),
    "norm of the batch": nn.BatchNorm2d(8, track_running_stats=False),
    "group norm": nn.GroupNorm(4, 8),
    "instance norm": nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "layer norm": nn.LayerNorm([8, 7, 7]),
    "softmax": nn.Softmax2d(),
    "depthwise": ThresholdConv2d(8, 8, 3, padding=1, groups=8),
    "depthwise reflect": ThresholdConv2d(8, 8, 3, padding="same", groups=8, padding_mode="reflect", mask_bias=True),
    "depthwise twofold": nn.Sequential(ThresholdConv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 8, 1)),
    "grouped": ThresholdConv2d(8, 8, 3, padding=1, groups=2),
    "grouped to one": ThresholdConv2d(8, 8, 1, groups=4, bias=False),
    "circular": ThresholdConv2d(8, 8, 3, padding=2, padding_mode="circular", dilation=2),
    "strided": nn.Conv2d(8, 8, (3, 2), (2, 1), (2, 0), (1, 2)),
    "transposed": nn.ConvTranspose2d(8, 8, 2, 2),
    "upsample": nn.Upsample(scale_factor=2),
    "pad": nn.ReflectionPad2d(1),
    "shuffle": nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(2, 8, 1)),
}


def built(name):
    torch.manual_seed(0)
    kind, key = name
    model = Around(FUNCTIONS[key]) if kind == "function" else Around(None, copy.deepcopy(MODULES[key]))
    model = model.double()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d) and m.affine:
                m.weight.uniform_(0.5, 1.5), m.bias.uniform_(-0.5, 0.5)
            if isinstance(m, nn.BatchNorm2d) and m.track_running_stats:
                m.running_mean.uniform_(-0.5, 0.5), m.running_var.uniform_(0.5, 2)
        for _, layer in threshold_layers(model):
            layer.bias.uniform_(0.1, 1) if layer.bias is not None else None
    return prune(model, 0.5)


def drawn(model, x):
    torch.manual_seed(2)
    return model(x)


@pytest.mark.parametrize(
    "name", [("function", k) for k in FUNCTIONS] + [("module", k) for k in MODULES], ids=lambda n: " ".join(n)
)
def test_every_argument(name):
    """The first check is the engine's own, and it must find nothing: only rules that are right count."""
    model = built(name)
    x = torch.randn(4, 2, 7, 7, dtype=torch.float64)
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    compact = CompactModule(other, strict=True, verify="never")
    a, b = drawn(twin, x), drawn(compact, x)
    torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
    weights = torch.randn(a.shape, dtype=a.dtype)
    for out in (a, b):
        (out * weights).sum().backward()
    for (key, p), q in zip(twin.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
    for (key, p), q in zip(twin.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")
    with torch.no_grad():
        twin.eval(), compact.eval()
        torch.testing.assert_close(drawn(compact, x), drawn(twin, x), rtol=1e-9, atol=1e-11)
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    results = []
    for trainer in (MaskedTrainer(twin), CompactTrainer(other, strict=True, verify="never")):
        trainer.begin(SGDOptions(lr=0.1, momentum=0.9, weight_decay=0.01, penalty=0.1))
        for step in range(2):
            torch.manual_seed(step)
            results.append(trainer.step(x, torch.arange(4)))
            torch.manual_seed(step)
            results.append(trainer.evaluate(x, torch.arange(4))[0])
        trainer.finish()
    torch.testing.assert_close(results[4:], results[:4], rtol=1e-9, atol=1e-11)
    for (key, p), q in zip(twin.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")
    small = _exported(model.eval(), (2, 7, 7))
    with torch.no_grad():
        torch.testing.assert_close(drawn(small, x), drawn(model, x), rtol=1e-9, atol=1e-11)
    assert not list(threshold_layers(small)) and ThresholdLinear not in map(type, small.modules())

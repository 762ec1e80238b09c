"""Operations between two layers, one of each kind at least: for tests, and for the table in docs/compact.md.

``python tests/kernels/compact/operations.py`` writes the table anew.
"""

import copy
import re
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from spafl_kernels import ThresholdConv1d, ThresholdConv2d, ThresholdConvTranspose2d, ThresholdLinear
from spafl_kernels.compact import trace_flow
from spafl_kernels.compact.graph.trace import check_traceable
from spafl_kernels.training import Unsupported

IMAGE = (3, 6, 6)
WIDTH = 8


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.down, self.up = ThresholdConv2d(WIDTH, 4, 1), ThresholdConv2d(4, WIDTH, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class LayerScale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.gamma * x


def shuffled(x, groups=2):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def parts(x):
    a, b = x.split([3, 5], 1)
    return torch.cat([b, a], 1)


def halves(x):
    a, b = x.chunk(2, 1)
    return torch.cat([a * torch.sigmoid(b), b], 1)


def chunks(x):
    a, b = x.chunk(2, 1)
    return torch.cat([b, F.relu(a)], 1)


def branch(x):
    return F.gelu(x)


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def images(x):
    return x.permute(0, 2, 1).unflatten(2, (6, 6))


def depthwise(times, **settings):
    return nn.Sequential(
        ThresholdConv2d(WIDTH, WIDTH * times, 3, padding=1, groups=WIDTH, **settings),
        nn.Conv2d(WIDTH * times, WIDTH, 1),
    )


def line(*layers):
    """Layers over the positions of an image in a row."""
    return nn.Sequential(nn.Flatten(2), *layers, nn.Unflatten(2, (6, 6)))


# Of the operations of one row, the last is the one that the row is about.
OPERATIONS = {
    "ReLU, ReLU6, Hardtanh(0, b)": [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0.0, 0.3)],
    "GELU, SiLU, Tanh, LeakyReLU, ELU, CELU, SELU, Hardswish, Mish, Softsign, Hardtanh": [
        nn.GELU(),
        nn.SiLU(),
        nn.Tanh(),
        nn.LeakyReLU(0.2),
        nn.ELU(),
        nn.CELU(0.5),
        nn.SELU(),
        nn.Hardswish(),
        nn.Mish(),
        nn.Softsign(),
        nn.Hardtanh(-0.2, 0.3),
    ],
    "Sigmoid, LogSigmoid, Softplus, Hardsigmoid": [
        nn.Sigmoid(),
        nn.LogSigmoid(),
        nn.Softplus(2.0),
        nn.Hardsigmoid(),
    ],
    "PReLU, one slope or one per channel": [nn.PReLU(), nn.PReLU(WIDTH)],
    "BatchNorm": [nn.BatchNorm2d(WIDTH)],
    "GroupNorm": [
        nn.GroupNorm(2, WIDTH),
        nn.GroupNorm(1, WIDTH, affine=False),
        nn.GroupNorm(WIDTH, WIDTH),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.GroupNorm(2, WIDTH), nn.Unflatten(1, (WIDTH, 1, 1))),
    ],
    "max-pool, adaptive pools, average pool": [
        nn.MaxPool2d(2),
        nn.AdaptiveMaxPool2d(3),
        nn.AdaptiveAvgPool2d(2),
        nn.AvgPool2d(2),
    ],
    "average pool that counts padding, or with another divisor": [
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(2, divisor_override=3),
    ],
    "mean, amax over positions": [lambda x: x.mean((2, 3), keepdim=True), lambda x: torch.amax(x, (2, 3), True)],
    "upsampling": [
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        lambda x: F.interpolate(x, size=(5, 9), mode="bicubic", align_corners=True),
    ],
    "padding with zeros or a number": [nn.ZeroPad2d((1, 0, 2, 1)), nn.ConstantPad2d(1, 0.7), nn.ConstantPad2d(1, -0.7)],
    "padding by reflection, replication, around": [
        nn.ReflectionPad2d(1),
        nn.ReplicationPad2d((2, 0, 0, 1)),
        nn.CircularPad2d(1),
    ],
    "PixelShuffle": [nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(2, WIDTH, 1))],
    "arithmetic with a number": [
        lambda x: 0.5 * x,
        lambda x: x / 3,
        lambda x: -x,
        lambda x: x + 1.5,
        lambda x: 1 - x,
        lambda x: x.square(),
        lambda x: torch.sub(x, 2, alpha=0.5),
    ],
    "product with a parameter (layer scale)": [LayerScale(WIDTH, 1, 1), LayerScale(1), LayerScale()],
    "product with a gate (squeeze and excitation)": [Gate(), lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))],
    "product of branches (gated units)": [halves, lambda x: x * torch.tanh(x), lambda x: torch.sigmoid(x) * x],
    "product with a map": [lambda x: x * torch.linspace(-1, 1, 6, dtype=x.dtype)],
    "product with a gate by sample and position": [lambda x: x * torch.sigmoid(x.mean(1, keepdim=True))],
    "sum, difference, add(alpha=)": [
        lambda x: x + branch(x),
        lambda x: x - branch(x),
        lambda x: torch.add(x, branch(x), alpha=-0.3),
    ],
    "sum with another shape": [lambda x: x + x.mean((2, 3), keepdim=True)],
    "concatenation, chunk, split": [lambda x: torch.cat([x, branch(x)], 1)[:, 4:12], chunks, parts],
    "slices": [lambda x: x[:, :, 1:, ::2], lambda x: torch.cat([x[:, 1::2], x[:, :4]], 1), lambda x: x.narrow(2, 1, 4)],
    "channel shuffle": [shuffled, lambda x: shuffled(x, 4)],
    "permute, transpose, flatten(2), unflatten, squeeze": [
        lambda x: images(tokens(x)),
        lambda x: x.mean(2, keepdim=True).squeeze(2).unsqueeze(3),
    ],
    "flatten(1)": [nn.Sequential(nn.Flatten(), nn.Linear(WIDTH * 36, WIDTH * 4), nn.Unflatten(1, (WIDTH, 2, 2)))],
    "grouped convolution": [
        ThresholdConv2d(WIDTH, WIDTH, 3, padding=1, groups=2, bias=False),
        ThresholdConv2d(WIDTH, WIDTH, 3, padding=1, groups=4, padding_mode="reflect"),
        ThresholdConv2d(WIDTH, WIDTH, 1, groups=2, mask_bias=True),
    ],
    "depthwise convolution, with a multiplier too": [depthwise(1), depthwise(2), depthwise(3, mask_bias=True)],
    "convolution over one dimension": [
        line(ThresholdConv1d(WIDTH, WIDTH, 3, padding=1)),
        line(nn.Conv1d(WIDTH, WIDTH, 5, padding=2, padding_mode="circular", bias=False)),
        line(ThresholdConv1d(WIDTH, WIDTH, 4, padding="same", dilation=2, mask_bias=True)),
        line(ThresholdConv1d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm1d(WIDTH)),
    ],
    "transposed convolution": [
        ThresholdConvTranspose2d(WIDTH, WIDTH, 3, 2, 1, 1),
        nn.ConvTranspose2d(WIDTH, WIDTH, 2, dilation=2, bias=False),
        ThresholdConvTranspose2d(WIDTH, WIDTH, (1, 3), (2, 1), mask_bias=True),
        nn.Sequential(ThresholdConvTranspose2d(WIDTH, WIDTH, 2, 2, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()),
    ],
    "convolution over one dimension, in groups or depthwise": [
        line(ThresholdConv1d(WIDTH, WIDTH, 5, padding=2, groups=4, padding_mode="reflect")),
        line(ThresholdConv1d(WIDTH, 2 * WIDTH, 3, padding=1, groups=WIDTH), nn.Conv1d(2 * WIDTH, WIDTH, 1)),
    ],
    "transposed convolution, in groups or depthwise": [
        nn.Sequential(
            ThresholdConvTranspose2d(WIDTH, 2 * WIDTH, (1, 3), dilation=2, groups=2, bias=False),
            ThresholdConvTranspose2d(2 * WIDTH, WIDTH, 3, 2, 1, 1, groups=4, mask_bias=True),
        ),
        nn.Sequential(
            ThresholdConvTranspose2d(WIDTH, WIDTH, 2, 2, groups=WIDTH),
            nn.ConvTranspose2d(WIDTH, 2 * WIDTH, 3, groups=WIDTH, bias=False),
            nn.Conv2d(2 * WIDTH, WIDTH, 1),
        ),
    ],
    "Dropout": [nn.Dropout(0.3)],
    "Identity, contiguous, clone": [nn.Identity(), lambda x: x.contiguous().clone()],
    "LayerNorm, InstanceNorm, softmax": [nn.LayerNorm([WIDTH, 6, 6]), nn.InstanceNorm2d(WIDTH), nn.Softmax2d()],
    "what is not in this table": [lambda x: x.flip(1), lambda x: torch.where(x > 0, x, -x)],
}
EACH = {f"{row} {i}": (row, i) for row, operations in OPERATIONS.items() for i in range(len(operations))}


class Between(nn.Module):
    """An operation between a layer whose pruned filters are 0, or constants, and one that reads it."""

    def __init__(self, operation, front, estimator="window"):
        super().__init__()
        self.first = ThresholdConv2d(3, WIDTH, 3, padding=1, bias=front == "bias")
        self.norm = nn.BatchNorm2d(WIDTH) if front == "norm" else None
        self.operation = copy.deepcopy(operation)
        self.second, self.head = ThresholdConv2d(WIDTH, 6, 3, padding=1), ThresholdLinear(6, 5)
        for m in self.modules():
            if hasattr(m, "estimator"):
                m.estimator = estimator

    def forward(self, x):
        x = self.first(x)
        x = self.operation(x if self.norm is None else self.norm(x))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def between(row, i, front, estimator="window"):
    torch.manual_seed(0)
    model = Between(OPERATIONS[row][i], front, estimator).double()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)) and m.weight is not None:
                m.weight.uniform_(0.5, 1.5), m.bias.uniform_(-0.5, 0.5)
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.running_mean.uniform_(-0.5, 0.5), m.running_var.uniform_(0.5, 2)
    return model


def verdict(model, stored):
    """What becomes of the channels between the two layers."""
    try:
        trace = check_traceable(model, "eval", gradients=False) if stored else None
        flow = trace_flow(model, IMAGE, trace, stored=stored)
    except Unsupported:
        return "masked"
    return "full width" if any("first" in edge for edge, _ in flow.stops) else "followed"


def table():
    lines = [
        "| operation | pruned channels are 0 | they are constants | exported: 0 | constants |",
        "|---|---|---|---|---|",
    ]
    for row, operations in OPERATIONS.items():
        cells = []
        for stored in (False, True):
            for front in ("zero", "bias"):
                found = [verdict(between(row, i, front).eval() if stored else between(row, i, front), stored)
                         for i in range(len(operations))]  # fmt: skip
                worst = next(v for v in ("masked", "full width", "followed") if v in found)
                cells.append(worst)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


DOCS = Path(__file__).parents[3] / "docs" / "compact.md"
MARKS = "<!-- operations: python tests/kernels/compact/operations.py -->\n", "\n<!-- end of operations -->"


def with_table(text):
    begin, end = map(re.escape, MARKS)
    return re.sub(f"({begin}).*?({end})", lambda m: m[1] + table() + m[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    DOCS.write_text(with_table(DOCS.read_text()))
    sys.exit(0)

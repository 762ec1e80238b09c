"""Models drawn at random from all operations that docs/compact.md has a row for.

``draw(seed, steps)`` gives the same first operations for any number of ``steps``, so a failure is made small by
lowering it.
"""

from __future__ import annotations

import copy
import random
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from spafl_kernels import (
    ThresholdConv1d,
    ThresholdConv2d,
    ThresholdConvTranspose2d,
    ThresholdLinear,
    threshold_layers,
)

IMAGE, CLASSES = (3, 6, 6), 3
WIDEST, LONGEST = 12, 9  # channels, and positions along a side


class Step(nn.Module):
    """One operation on values that were there before."""

    def __init__(self, function, sources):
        super().__init__()
        self.function, self.sources = function, tuple(sources)

    def forward(self, values):
        return self.function(*(values[i] for i in self.sources))


class Graph(nn.Module):
    """Runs its steps. ``returns``: the values that it gives back; a dictionary, unless it is one."""

    def __init__(self):
        super().__init__()
        self.steps, self.returns = nn.ModuleList(), (0,)

    def run(self, *values):
        values = list(values)
        for step in self.steps:
            values.append(step(values))
        if len(self.returns) == 1:
            return values[self.returns[0]]
        return {f"out{i}": values[i] for i in self.returns}

    def forward(self, x):
        return self.run(x)


class Pair(Graph):
    """With a second image, of another size, and a vector."""

    def forward(self, x, other, *, vector):
        return self.run(x, other, vector)


# -- operations, as people write them ----------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(0.5 + torch.rand(shape))

    def forward(self, x):
        return x * self.gamma


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, down, up, act, gate):
        super().__init__()
        self.down, self.up, self.act, self.gate = down, up, act, gate

    def forward(self, x):
        return x * self.gate(self.up(self.act(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Attention(nn.Module):
    """``(N, tokens, channels)``."""

    def __init__(self, q, k, v, heads):
        super().__init__()
        self.q, self.k, self.v, self.heads = q, k, v, heads

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def shuffled(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def halves(x):
    a, b = x.chunk(2, 1)
    return a * torch.sigmoid(b)


def swapped(x, first):
    a, b = x.split([first, x.shape[1] - first], 1)
    return torch.cat([b, a], 1)


def thirds(x):
    a, b, c = torch.chunk(x, 3, dim=1)
    return torch.cat((c, F.relu(a), b), dim=1)


def part(x, low, high):
    return x[:, low:high]


def every_other(x):
    return x[:, ::2]


def corner(x):
    return x[:, :, 1:, ::2]


def narrow(x, dim, low, length):
    return x.narrow(dim, low, length)


def positions(x):
    return x.flatten(2)


def tokens(x):
    return x.transpose(1, 2)


def permuted(x):
    return x.permute(0, 2, 1)


def as_image(x):
    return x.unsqueeze(-1)


def squeezed(x):
    return x.squeeze(-1)


def as_map(x, height):
    return x.unflatten(2, (height, -1))


def of_vector(x, channels):
    return x.unflatten(1, (channels, -1))


def rows(x):
    return x.view(x.size(0), -1)


def half(x):
    return 0.5 * x


def shift(x):
    return x + 0.7


def rest(x):
    return 1 - x


def third(x):
    return x / 3


def negative(x):
    return -x


def square(x):
    return x.square()


def less(x):
    return torch.sub(x, 2, alpha=0.3)


def of_map(x):
    return x * torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)


def flipped(x):
    return x.flip(1)


def where(x):
    return torch.where(x > 0.1, x, -x)


def copied(x):
    return x.contiguous().clone()


def added(x, y):
    return x + y


def subtracted(x, y):
    return x - y


def weighted(x, y):
    return torch.add(x, y, alpha=-0.3)


def in_place(x, y):
    out = x.clone()
    out += y
    return out


def multiplied(x, y):
    return x * torch.tanh(y)


def spread(x, y):
    return x + y.mean((2, 3), keepdim=True)


def gated(x, y):
    return x * torch.sigmoid(y.mean((2, 3), keepdim=True))


def gated_places(x, y):
    return x * torch.sigmoid(y.mean(1, keepdim=True))


def together(x, y):
    return torch.cat([x, y], 1)


def three(x, y):
    return torch.cat([y, x, F.gelu(y)], dim=1)


ACTIVATIONS = [
    nn.ReLU, nn.ReLU, nn.ReLU, partial(nn.ReLU, inplace=True), nn.ReLU6, partial(nn.Hardtanh, 0.0, 0.3), nn.GELU,
    nn.SiLU,
    nn.Tanh, partial(nn.LeakyReLU, 0.2), nn.ELU, partial(nn.CELU, 0.5), nn.SELU, nn.Hardswish, nn.Mish, nn.Softsign,
    partial(nn.Hardtanh, -0.2, 0.3), nn.Sigmoid, nn.LogSigmoid, partial(nn.Softplus, 2.0), nn.Hardsigmoid, nn.PReLU,
    lambda: F.relu, lambda: F.gelu, lambda: torch.sigmoid, lambda: F.silu,
    lambda: partial(F.leaky_relu, negative_slope=0.1),
]  # fmt: skip
ANYWHERE = [half, shift, rest, third, negative, square, less, copied, where, nn.Identity]


class _Draw:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.estimator = self.pick(["identity", "window"])

    def pick(self, values):
        return self.random.choice(values)

    def often(self, share):
        return self.random.random() < share

    def act(self):
        return self.pick(ACTIVATIONS)()

    # -- layers --------------------------------------------------------------------------------------------------------

    def layer(self, kind, *args, **settings):
        plain = {
            ThresholdConv1d: nn.Conv1d, ThresholdConv2d: nn.Conv2d, ThresholdConvTranspose2d: nn.ConvTranspose2d,
            ThresholdLinear: nn.Linear,
        }  # fmt: skip
        settings["bias"] = bias = self.often(0.5)
        if self.often(0.15):
            return plain[kind](*args, **settings)
        return kind(*args, **settings, mask_bias=bias and self.often(0.3), estimator=self.estimator)

    def width(self, multiple=1):
        return multiple * self.random.randint(1, max(1, 9 // multiple))

    def conv(self, channels, kind=ThresholdConv2d, groups=1):
        size = self.pick([1, 2, 3, 3])
        settings = {"stride": self.pick([1, 1, 1, 2]), "dilation": self.pick([1, 1, 1, 2]), "groups": groups}
        settings["padding"] = self.pick([0, 1, size // 2, "same" if settings["stride"] == 1 else 0])
        settings["padding_mode"] = self.pick(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
        return self.layer(kind, channels, self.width(groups), size, **settings)

    def transposed(self, channels, groups=1):
        size, stride = self.pick([1, 2, 3]), self.pick([1, 2])
        settings = {
            "stride": stride,
            "padding": self.pick([0, size // 2]),
            "groups": groups,
            "dilation": self.pick([1, 1, 2]),
        }
        settings["output_padding"] = self.pick([0, stride - 1])
        return self.layer(ThresholdConvTranspose2d, channels, self.width(groups), size, **settings)

    def depthwise(self, channels):
        return self.layer(
            ThresholdConv2d, channels, channels * self.pick([1, 1, 2]), self.pick([1, 3]), padding=1, groups=channels,
            padding_mode=self.pick(["zeros", "reflect"]),
        )  # fmt: skip

    def divisor(self, channels):
        return self.pick([g for g in range(2, channels + 1) if channels % g == 0])

    def norm(self, channels, dims):
        kind = nn.BatchNorm2d if dims == 2 else nn.BatchNorm1d
        return kind(channels, affine=self.often(0.85), momentum=self.pick([0.1, 0.3]))

    def group_norm(self, channels):
        groups = self.pick([g for g in range(1, channels + 1) if channels % g == 0])
        return nn.GroupNorm(groups, channels)

    # -- operations ----------------------------------------------------------------------------------------------------

    def mostly(self, layers, norms, others):
        """One of the makers: layers, activations and norms as often as all others."""
        acts = [self.act]
        return self.pick(self.pick([layers, layers, layers, acts, acts, norms, others, others, others]))

    def of_image(self, shape):
        c, _, w = shape[1:]
        layers = [
            lambda: self.conv(c), lambda: self.conv(c), lambda: self.conv(c),
            lambda: self.conv(c, groups=self.divisor(c)),
            lambda: self.depthwise(c), lambda: self.transposed(c), lambda: self.transposed(c, self.divisor(c)),
        ]  # fmt: skip
        norms = [lambda: self.norm(c, 2), lambda: self.norm(c, 2), lambda: self.group_norm(c)]
        return self.mostly(layers, norms, [
            lambda: nn.PReLU(c),
            lambda: nn.MaxPool2d(self.pick([2, 3]), self.pick([1, 2]), self.pick([0, 1]), ceil_mode=self.often(0.2)),
            lambda: nn.AvgPool2d(2, self.pick([1, 2]), self.pick([0, 1]), self.often(0.3), self.often(0.5),
            self.pick([None, None, 3])),
            lambda: nn.AdaptiveAvgPool2d(self.pick([1, 2])), lambda: nn.AdaptiveMaxPool2d(2),
            lambda: partial(torch.mean, dim=(2, 3), keepdim=True), lambda: partial(torch.mean, dim=(2, 3)),
            lambda: partial(torch.amax, dim=(2, 3)), lambda: partial(torch.mean, dim=3),
            lambda: nn.Upsample(scale_factor=2, mode=self.pick(["nearest", "bilinear"])),
            lambda: partial(F.interpolate, size=(5, 4), mode="bicubic", align_corners=self.often(0.5)),
            lambda: nn.ZeroPad2d((1, 0, 2, 1)), lambda: nn.ConstantPad2d(1, self.pick([0.7, -0.7])),
            lambda: self.pick([nn.ReflectionPad2d(1), nn.ReplicationPad2d((1, 0, 0, 2)), nn.CircularPad2d(1)]),
            lambda: nn.PixelShuffle(2), lambda: Scale(c, 1, 1), lambda: Scale(1), self.gate(c), lambda: halves,
            lambda: partial(swapped, first=self.random.randint(1, c - 1)), lambda: thirds,
            lambda: partial(part, low=self.random.randint(0, c - 1), high=c), lambda: every_other, lambda: corner,
            lambda: partial(narrow, dim=self.pick([1, 2]), low=1, length=2),
            lambda: partial(shuffled, groups=self.divisor(c)),
            lambda: positions, lambda: positions, lambda: partial(torch.flatten, start_dim=1), lambda: nn.Dropout(0.3),
            lambda: nn.Dropout2d(0.3), lambda: partial(F.dropout, p=0.2, training=True), lambda: of_map,
            lambda: flipped,
            lambda: squeezed, lambda: nn.InstanceNorm2d(c, affine=True), lambda: nn.LayerNorm([w]),
            lambda: nn.Softmax2d(),
            lambda: self.pick(ANYWHERE),
        ])  # fmt: skip

    def gate(self, channels):
        def make():
            hidden = self.width()
            down, up = (self.layer(ThresholdConv2d, a, b, 1) for a, b in ((channels, hidden), (hidden, channels)))
            return Gate(down, up, self.act(), self.pick([torch.sigmoid, F.hardsigmoid, nn.Hardsigmoid()]))

        return make

    def of_line(self, shape):
        c, length = shape[1:]
        layers = [lambda: self.conv(c, ThresholdConv1d), lambda: self.conv(c, ThresholdConv1d, self.divisor(c))]
        return self.mostly(layers, [lambda: self.norm(c, 1), lambda: self.group_norm(c)], [
            lambda: nn.PReLU(c), lambda: nn.MaxPool1d(2, 1), lambda: nn.AvgPool1d(2, 1, self.pick([0, 1])),
            lambda: tokens, lambda: tokens, lambda: permuted, lambda: partial(torch.mean, dim=2),
            lambda: partial(torch.amax, dim=2),
            lambda: as_image, lambda: partial(as_map, height=2), lambda: nn.AdaptiveAvgPool1d(3), lambda: Scale(c, 1),
            lambda: nn.Dropout(0.3), lambda: partial(torch.flatten, start_dim=1), lambda: thirds, lambda: every_other,
            lambda: self.layer(ThresholdLinear, length, self.width()), lambda: self.pick(ANYWHERE),
        ])  # fmt: skip

    def of_tokens(self, shape):
        c = shape[2]
        layers = [lambda: self.layer(ThresholdLinear, c, self.width()), lambda: self.attention(c)]
        return self.mostly(layers, [lambda: nn.LayerNorm(c)], [
            lambda: Scale(c), lambda: tokens, lambda: permuted, lambda: partial(torch.mean, dim=1),
            lambda: nn.Dropout(0.2),
            lambda: self.pick(ANYWHERE),
        ])  # fmt: skip

    def attention(self, channels):
        heads = self.pick([1, 2])
        q, k, v = (self.layer(ThresholdLinear, channels, 4) for _ in range(3))
        return Attention(q, k, v, heads)

    def of_vector(self, shape):
        c = shape[1]
        layers = [lambda: self.layer(ThresholdLinear, c, self.width())]
        return self.mostly(layers, [lambda: self.norm(c, 1), lambda: self.group_norm(c)], [
            lambda: nn.PReLU(c), lambda: halves, lambda: partial(of_vector, channels=self.divisor(c)),
            lambda: every_other,
            lambda: nn.Dropout(0.3), lambda: Scale(c), lambda: nn.LayerNorm(c), lambda: self.pick(ANYWHERE),
            lambda: partial(swapped, first=self.random.randint(1, c - 1)),
        ])  # fmt: skip

    def operation(self, values, kinds):
        """A function and what it reads."""
        if len(values) > 3 and self.often(0.25):
            a = self.pick(range(max(0, len(values) - 4), len(values)))
            alike = [i for i, v in enumerate(values) if v.shape == values[a].shape]
            images = [i for i, v in enumerate(values) if v.dim() == 4 and v.shape[1] == values[a].shape[1]]
            same = [
                i for i, v in enumerate(values) if v.dim() == values[a].dim() > 1 and v.shape[2:] == values[a].shape[2:]
            ]
            choices = [(added, alike), (added, alike), (subtracted, alike), (weighted, alike), (in_place, alike),
                       (multiplied, alike),
                       (together, same), (together, same), (three, same)]  # fmt: skip
            if values[a].dim() == 4:
                choices += [(spread, images), (gated, images), (gated_places, images)]
            function, others = self.pick(choices)
            return function, (a, self.pick(others)), kinds[a]
        a = len(values) - 1 if self.often(0.8) else self.pick(range(len(values)))
        kind = kinds[a]
        by_kind = {"image": self.of_image, "line": self.of_line, "tokens": self.of_tokens, "vector": self.of_vector}
        make = by_kind[kind](values[a].shape)
        function = make()
        function = function() if isinstance(function, type) else function
        after = {tokens: "tokens" if kind == "line" else "line", permuted: "tokens" if kind == "line" else "line"}
        return function, (a,), after.get(function, kind)

    def fits(self, value):
        if (
            not isinstance(value, torch.Tensor)
            or value.dim() < 2
            or value.dim() > 4
            or len(value) != 2
            or value.numel() == 0
        ):
            return False
        sizes = value.shape[1:]
        return max(sizes) <= (WIDEST if value.dim() > 2 else 160) * (3 if value.dim() == 3 else 1) and bool(
            value.isfinite().all()
        )


def kind_of(value, kind):
    """What the dimensions of a value mean."""
    return {2: "vector", 4: "image"}.get(value.dim(), kind if kind in ("line", "tokens") else "line")


def draw(seed, steps=7):
    """A model and its inputs' shapes, without the batch; ``seed`` decides all."""
    torch.manual_seed(seed)
    d = _Draw(seed)
    pair = d.often(0.25)
    model = Pair() if pair else Graph()
    shapes = [IMAGE, (4, 3, 3), (5,)] if pair else [IMAGE]
    values = [torch.randn(2, *shape) for shape in shapes]
    kinds = ["image", "image", "vector"] if pair else ["image"]

    def put(function, sources, kind):
        with torch.no_grad():
            try:
                step = Step(function, sources).eval()
                value = step([v.clone() for v in values])
            except (RuntimeError, ValueError, IndexError, AssertionError):
                return False
        if not d.fits(value):
            return False
        model.steps.append(step)
        values.append(value)
        kinds.append(kind_of(value, kind))
        return True

    tries = 0
    while len(model.steps) < steps and tries < 50 * steps:
        tries += 1
        try:
            function, sources, kind = d.operation(values, kinds)
        except (IndexError, ValueError):  # nothing to choose from at this width
            continue
        if d.often(0.05) and len(sources) == 1 and model.steps and isinstance(model.steps[-1].function, nn.Module):
            function = model.steps[-1].function  # the same layer once more
        put(function, sources, kind)
    finish = random.Random(seed + 1)
    last = len(values) - 1
    if values[last].dim() > 2:
        put(finish.choice([partial(torch.flatten, start_dim=1), rows, nn.Flatten()]), (last,), "vector")
    flat = values[-1]
    put(ThresholdLinear(flat[0].numel(), CLASSES, estimator=d.estimator), (len(values) - 1,), "vector")
    model.returns = (len(values) - 1,)
    if pair and finish.random() < 0.5:
        model.returns = (len(values) - 1, finish.randrange(len(shapes), len(values)))
    return settle(model.double().train(), finish), shapes


def settle(model, choice):
    """Weights, masks, what is frozen and what is tied."""
    generator = torch.Generator().manual_seed(choice.randrange(2**30))

    def rand(like):
        return torch.rand(like.shape, generator=generator, dtype=like.dtype)

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
                if m.weight is not None:
                    m.weight.copy_(0.5 + rand(m.weight))
                    m.bias.copy_((0.1 + 0.5 * rand(m.bias)) * torch.sign(rand(m.bias) - 0.5))
                if getattr(m, "running_mean", None) is not None:
                    m.running_mean.copy_(rand(m.running_mean) - 0.5), m.running_var.copy_(0.3 + rand(m.running_var))
        for m in layers:
            fan_in = max(1, m.weight.numel() // m.weight.shape[0])
            m.weight.copy_(torch.randn(m.weight.shape, generator=generator, dtype=torch.float64) * fan_in**-0.5)
    if choice.random() < 0.15:
        same = [(a, b) for a in layers for b in layers if a is not b and a.weight.shape == b.weight.shape]
        if same:
            a, b = choice.choice(same)
            b.weight = a.weight
    for m in layers:
        if choice.random() < 0.06:
            m.requires_grad_(False)
        elif choice.random() < 0.05:
            m.weight.requires_grad_(False)
    model.fixed = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and choice.random() < 0.15
    ]
    mask(model, choice, generator)
    return model


def mask(model, choice, generator):
    """Thresholds that make some filters active, near enough to their scores that a few steps change that."""
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            share = choice.choice([0.0, 0.3, 0.5, 0.7, 1.0])
            scores = layer.scores()
            active = torch.rand(scores.shape, generator=generator) < share
            near = choice.choice([0.003, 0.02, 0.3])
            layer.threshold.copy_(scores * torch.where(active, 1 - near, 1 + near))
            if choice.random() < 0.15:
                layer.threshold[0] = scores[0] + choice.choice([1.7, -1.7])  # beyond the window


def fix_norms(model):
    for m in model.fixed:
        m.eval()


def call(model, tensors):
    return model(*tensors) if len(tensors) == 1 else model(*tensors[:2], vector=tensors[2])


def usable(model, shapes):
    """Whether the model itself can be trained: autograd refuses some writes in place, norms some sizes; and it may be
    that nothing which is trained is in the result."""
    twin = copy.deepcopy(model)
    fix_norms(twin)
    try:
        for count in (3, 1):
            inputs = [torch.randn(count, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
            out = call(twin, inputs)
            loss = sum(t.sum() for t in (out.values() if isinstance(out, dict) else [out]))
            loss.backward()
            twin.eval()
    except (RuntimeError, ValueError):
        return False
    return bool(loss.isfinite()) and any(p.grad is not None for p in twin.parameters())

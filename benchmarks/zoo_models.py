"""Twenty small models of the kinds people train, for 32 x 32 images and the like; all layers get thresholds.

They are written as their authors' papers describe them, narrow and short, so that a step takes some ten milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spafl.models import ResNet18, ViT, build_model
from spafl_kernels import convert, threshold_layers
from spafl_kernels.training import SGDOptions

__all__ = ["ZOO", "Specimen"]

SPREAD = 0.1  # of the norms' biases: half are positive, as they become in training
CLASSES = 10
WORDS = 200
OPTIONS = SGDOptions(0.01, 0.9, max_grad_norm=5.0, penalty=1e-4, collapse_floor=0.01)


def act_conv(inside: int, out: int, kernel: int, stride: int = 1, groups: int = 1, act: Any = nn.ReLU) -> nn.Sequential:
    """Convolution, BatchNorm, activation."""
    conv = nn.Conv2d(inside, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), act()) if act else nn.Sequential(conv, nn.BatchNorm2d(out))


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, inside: int, gate: Any = nn.Sigmoid) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(width, inside, 1), nn.Conv2d(inside, width, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Residual(nn.Module):
    """``act(x + inner(x))``, with a projection of ``x`` where the shapes differ."""

    def __init__(self, inner: nn.Module, shortcut: nn.Module | None = None, act: Any = nn.ReLU) -> None:
        super().__init__()
        self.inner, self.shortcut, self.act = inner, shortcut, act() if act else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) + (x if self.shortcut is None else self.shortcut(x))
        return y if self.act is None else self.act(y)


def inverted(inside: int, out: int, stride: int, expand: int = 4, kernel: int = 3, act: Any = nn.ReLU6,
             squeeze: bool = False) -> nn.Module:  # fmt: skip
    """Expansion, depthwise convolution, projection: the block of MobileNetV2 and V3."""
    hidden = inside * expand
    inner = nn.Sequential(
        act_conv(inside, hidden, 1, act=act),
        act_conv(hidden, hidden, kernel, stride, groups=hidden, act=act),
        *([SqueezeExcite(hidden, hidden // 4, nn.Hardsigmoid)] if squeeze else []),
        act_conv(hidden, out, 1, act=None),
    )
    return Residual(inner, act=None) if stride == 1 and inside == out else inner


def mobilenet_v2() -> nn.Module:
    blocks = [inverted(16, 16, 1), inverted(16, 24, 2), inverted(24, 24, 1), inverted(24, 40, 2), inverted(40, 40, 1)]
    return nn.Sequential(
        act_conv(3, 16, 3, act=nn.ReLU6), *blocks, act_conv(40, 160, 1, act=nn.ReLU6), head(160)
    )  # fmt: skip


def mobilenet_v3() -> nn.Module:
    blocks = [
        inverted(16, 16, 1, act=nn.ReLU),
        inverted(16, 24, 2, act=nn.ReLU, squeeze=True),
        inverted(24, 24, 1, kernel=5, act=nn.ReLU, squeeze=True),
        inverted(24, 40, 2, kernel=5, act=nn.Hardswish, squeeze=True),
        inverted(40, 40, 1, kernel=5, act=nn.Hardswish, squeeze=True),
    ]
    return nn.Sequential(
        act_conv(3, 16, 3, act=nn.Hardswish), *blocks, act_conv(40, 160, 1, act=nn.Hardswish), head(160)
    )  # fmt: skip


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm over channels, two linear layers with GELU, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 48, 2, 2), ConvNeXtBlock(48), ConvNeXtBlock(48),
        nn.Conv2d(48, 96, 2, 2), ConvNeXtBlock(96), ConvNeXtBlock(96), head(96),
    )  # fmt: skip


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half of the channels pass, the others are computed, both are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            act_conv(half, half, 1), act_conv(half, half, 3, groups=half, act=None), act_conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet() -> nn.Module:
    return nn.Sequential(
        act_conv(3, 64, 3), ShuffleUnit(64), ShuffleUnit(64), act_conv(64, 128, 3, 2), ShuffleUnit(128),
        ShuffleUnit(128), act_conv(128, 256, 1), head(256),
    )  # fmt: skip


def bottleneck(inside: int, width: int, out: int, stride: int = 1, groups: int = 1) -> nn.Module:
    inner = nn.Sequential(
        act_conv(inside, width, 1), act_conv(width, width, 3, stride, groups), act_conv(width, out, 1, act=None)
    )
    return Residual(inner, None if stride == 1 and inside == out else act_conv(inside, out, 1, stride, act=None))


def resnext() -> nn.Module:
    return nn.Sequential(
        act_conv(3, 32, 3), bottleneck(32, 32, 64, groups=4), bottleneck(64, 32, 64, groups=4),
        bottleneck(64, 64, 128, 2, groups=4), bottleneck(128, 64, 128, groups=4), head(128),
    )  # fmt: skip


class InceptionBlock(nn.Module):
    """1x1, 3x3, 5x5 and pooled branches side by side; ``width`` channels each."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.a = act_conv(inside, width, 1)
        self.b = nn.Sequential(act_conv(inside, width, 1), act_conv(width, width, 3))
        self.c = nn.Sequential(act_conv(inside, width // 2, 1), act_conv(width // 2, width, 5))
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1), act_conv(inside, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)


def inception() -> nn.Module:
    return nn.Sequential(
        act_conv(3, 32, 3), nn.MaxPool2d(2), InceptionBlock(32, 24), InceptionBlock(96, 24), nn.MaxPool2d(2),
        InceptionBlock(96, 48), head(192),
    )  # fmt: skip


class UNet(nn.Module):
    """Two levels; a class for every pixel."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width

        def double(inside: int, out: int) -> nn.Sequential:
            return nn.Sequential(act_conv(inside, out, 3), act_conv(out, out, 3))

        self.down1, self.down2, self.bottom = double(3, w), double(w, 2 * w), double(2 * w, 4 * w)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), nn.ConvTranspose2d(2 * w, w, 2, 2)
        self.join2, self.join1, self.last = double(4 * w, 2 * w), double(2 * w, w), nn.Conv2d(w, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.up2(self.bottom(F.max_pool2d(b, 2)))
        y = self.up1(self.join2(torch.cat([b, y], 1)))
        return self.last(self.join1(torch.cat([a, y], 1)))


class DenseLayer(nn.Module):
    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


def densenet() -> nn.Module:
    growth = 16
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), *(DenseLayer(32 + growth * i, growth) for i in range(3)),
        nn.BatchNorm2d(80), nn.ReLU(), nn.Conv2d(80, 40, 1, bias=False), nn.AvgPool2d(2),
        *(DenseLayer(40 + growth * i, growth) for i in range(3)), nn.BatchNorm2d(88), nn.ReLU(), head(88),
    )  # fmt: skip


class MixerBlock(nn.Module):
    """Two linear layers over the tokens, two over the channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(MixerBlock(64, width) for _ in range(depth)))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.last(self.norm(x).mean(1))


def basic(inside: int, out: int, stride: int = 1, norm: Any = nn.BatchNorm2d, squeeze: bool = False) -> nn.Module:
    """Two 3x3 convolutions with norms, as in ResNet-18."""
    inner = nn.Sequential(
        nn.Conv2d(inside, out, 3, stride, 1, bias=False), norm(out), nn.ReLU(),
        nn.Conv2d(out, out, 3, padding=1, bias=False), norm(out), *([SqueezeExcite(out, out // 4)] if squeeze else []),
    )  # fmt: skip
    same = stride == 1 and inside == out
    return Residual(inner, None if same else nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), norm(out)))


def groupnorm_resnet() -> nn.Module:
    def norm(width: int) -> nn.Module:
        return nn.GroupNorm(4, width)

    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), norm(32), nn.ReLU(), basic(32, 32, norm=norm),
        basic(32, 64, 2, norm), basic(64, 128, 2, norm), head(128),
    )  # fmt: skip


def se_resnet() -> nn.Module:
    return nn.Sequential(
        act_conv(3, 32, 3), basic(32, 32, squeeze=True), basic(32, 64, 2, squeeze=True),
        basic(64, 128, 2, squeeze=True), head(128),
    )  # fmt: skip


def super_resolution() -> nn.Module:
    """Twice as large by PixelShuffle, no norms."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding=2), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip


def signal_net() -> nn.Module:
    """Convolutions over time."""

    def block(inside: int, out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv1d(inside, out, 9, stride, 4, bias=False), nn.BatchNorm1d(out), nn.ReLU()]

    return nn.Sequential(
        *block(4, 64, 2), *block(64, 64, 1), *block(64, 128, 2), *block(128, 128, 2), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(128, CLASSES),
    )  # fmt: skip


def autoencoder() -> nn.Module:
    """Convolutions down, transposed convolutions up."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, CLASSES)
    )  # fmt: skip


class EncoderLayer(nn.Module):
    """Attention, then two linear layers with ReLU, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(F.relu(self.up(self.norm2(x))))


class TextEncoder(nn.Module):
    """Words to a class."""

    def __init__(self, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.layers = nn.Sequential(*(EncoderLayer(width, 4) for _ in range(depth)))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.layers(self.words(x))).mean(1))


Target = Literal["class", "pixels", "values"]


@dataclass(frozen=True)
class Specimen:
    """A model of the zoo and what it is trained with.

    Args:
        name: how it is called on the command line.
        build: the dense model.
        sample: shape of one sample; of whole numbers for ``words``.
        target: a class per sample, a class per pixel, or the values of the result.
        result: shape of one target; empty for a class per sample.
        words: the sample is word numbers.
        batch: samples in a step.
        estimator: of all its thresholds.
    """

    name: str
    build: Callable[[], nn.Module]
    sample: tuple[int, ...] = (3, 32, 32)
    target: Target = "class"
    result: tuple[int, ...] = ()
    words: bool = False
    batch: int = 16
    estimator: Literal["identity", "window"] = "window"
    options: SGDOptions = OPTIONS

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.mse_loss if self.target == "values" else F.cross_entropy

    def pruned(self, density: float, seed: int = 0) -> nn.Module:
        """The model with this density in every layer, and margins so wide that no mask changes while it is timed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = convert(self.build(), inplace=True)
            for m in model.modules():
                if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)):
                    nn.init.normal_(m.bias, 0.0, SPREAD)
        self.prune_(model, density, seed)
        return model

    @torch.no_grad()
    def prune_(self, model: nn.Module, density: float, seed: int = 0) -> None:
        """Set the thresholds of ``model`` to this density and its layers to this estimator."""
        generator = torch.Generator().manual_seed(seed)
        for _, layer in threshold_layers(model):
            layer.estimator = self.estimator
            score = layer.scores()
            order = torch.randperm(len(score), generator=generator)
            factor = torch.full_like(score, 0.3)
            factor[order[max(round(density * len(score)), 1) :]] = 2.0
            layer.threshold.copy_(score * factor)

    def batches(self, count: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Random samples and targets, the same in any precision."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            if self.words:
                x = torch.randint(0, WORDS, (self.batch, *self.sample), generator=generator)
            else:
                x = torch.randn(self.batch, *self.sample, generator=generator).to(dtype)
            if self.target == "values":
                yield x, torch.randn(self.batch, *self.result, generator=generator).to(dtype)
            else:
                yield x, torch.randint(0, CLASSES, (self.batch, *self.result), generator=generator)

    def small(self) -> Specimen:
        """The same with two samples in a batch, for checks and smoke runs."""
        return replace(self, batch=2)


def _published(name: str) -> Callable[[], nn.Module]:
    return lambda: build_model(name, CLASSES, 1 if name == "lenet5" else 3, 0)


ZOO = {
    one.name: one
    for one in (
        Specimen("mlp", mlp, (1, 28, 28), batch=64),
        Specimen("lenet5", _published("lenet5"), (1, 28, 28), batch=64),
        Specimen("conv4", _published("conv4")),
        Specimen("resnet18", lambda: ResNet18(CLASSES, 3, 16)),
        Specimen("groupnorm_resnet", groupnorm_resnet),
        Specimen("se_resnet", se_resnet),
        Specimen("resnext", resnext),
        Specimen("densenet", densenet),
        Specimen("inception", inception),
        Specimen("mobilenet_v2", mobilenet_v2),
        Specimen("mobilenet_v3", mobilenet_v3),
        Specimen("shufflenet", shufflenet),
        Specimen("convnext", convnext),
        Specimen("vit", lambda: ViT(CLASSES, 3, depth=2)),
        Specimen("mixer", Mixer),
        Specimen("text_encoder", TextEncoder, (64,), words=True),
        Specimen("unet", UNet, target="pixels", result=(32, 32)),
        Specimen("super_resolution", super_resolution, (3, 16, 16), target="values", result=(3, 32, 32)),
        Specimen("autoencoder", autoencoder, target="values", result=(3, 32, 32)),
        Specimen("signal_net", signal_net, (4, 256)),
    )
}

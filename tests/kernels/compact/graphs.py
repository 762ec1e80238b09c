"""Small models in plain torch.nn, in the shapes people write them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class VGG(nn.Module):
    """Convolutions with biases and BatchNorm, in-place ReLUs, dropout between linears, view with a size."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (6, "M", 9, 10, "M"):
            if width == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(40, 16), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(16, 16), nn.ReLU(True), nn.Dropout(),
            nn.Linear(16, 5),
        )  # fmt: skip

    def forward(self, x):
        x = self.avgpool(self.features(x))
        return self.classifier(x.view(x.size(0), -1))


class Bottleneck(nn.Module):
    """Post-activation, ``out += identity``."""

    def __init__(self, inside, width, out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNetBottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(Bottleneck(8, 6, 12), Bottleneck(12, 6, 12), Bottleneck(12, 8, 16, 2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.blocks(self.maxpool(self.stem(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Basic(nn.Module):
    """Post-activation with two 3x3 convolutions: padded convolutions read sums of constants."""

    def __init__(self, inside, out, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNetBasic(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Basic(9, 9), Basic(9, 9), Basic(9, 18, 2), Basic(18, 18))
        self.fc = nn.Linear(18, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Joined(nn.Module):
    """A sum of layers of different widths put together, one with constants, and another layer; and a flattened sum."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Conv2d(3, 7, 3, padding=1)
        self.whole, self.after = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 3, padding=1)
        self.skip, self.fc1, self.fc2 = nn.Conv2d(12, 6, 1), nn.Linear(96, 9), nn.Linear(9, 5)

    def forward(self, x):
        x = F.relu(torch.cat([self.left(x), self.right(x)], 1) + self.whole(x))
        x = F.max_pool2d(F.relu(self.after(x)) + F.relu(self.skip(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn3, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv0(x)
        out = self.conv1(F.relu(self.bn1(x)))
        x = x + self.conv2(torch.relu(self.bn2(out)))
        return self.fc(F.relu(self.bn3(x)).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, inside, out, stride, expand):
        super().__init__()
        hidden = inside * expand
        self.use_res = stride == 1 and inside == out
        self.conv = nn.Sequential(
            nn.Conv2d(inside, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True), nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x) if self.use_res else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True),
            InvertedResidual(6, 8, 1, 2), InvertedResidual(8, 8, 1, 3), InvertedResidual(8, 10, 2, 2),
            nn.Conv2d(10, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3))
        self.norm = nn.BatchNorm2d(18)
        self.transition = nn.Conv2d(18, 8, 1, bias=False)
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x):
        features = [self.conv0(x)]
        for norm, conv in zip(self.norms, self.convs):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = self.pool(self.transition(F.relu(self.norm(torch.cat(features, 1)))))
        return self.fc(torch.flatten(x, 1))


class Grouped(nn.Module):
    """Grouped convolution, chunks along channels, GroupNorm and reflection padding."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.conv3 = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(6 * 64, 5)

    def forward(self, x):
        x = F.silu(self.conv1(x))
        x = F.relu(self.norm(self.conv2(x)))
        a, b = self.conv3(x).chunk(2, dim=1)
        return self.fc((torch.sigmoid(a) * b).reshape(x.shape[0], -1))


class Encoder(nn.Module):
    """Attention in plain calls, LayerNorm, a convolution as patch embedding."""

    def __init__(self, dim=12, heads=3):
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 20), nn.Linear(20, dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


class Attentions(nn.Module):
    """The ways people write attention; queries and values of other widths than the tokens, cross attention."""

    def __init__(self, dim=6, heads=2):
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.qkv = nn.Linear(dim, 3 * 8, bias=False)
        self.q, self.k = nn.Linear(8, 10, bias=False), nn.Linear(dim, 10, bias=False)
        self.v = nn.Linear(dim, 14, bias=False)
        self.out, self.biased = nn.Linear(14, 3 * 4, bias=False), nn.Linear(4, 12)
        self.head = nn.Linear(4, 5)

    def split(self, x):
        n, tokens, width = x.shape
        return x.view(n, tokens, self.heads, width // self.heads).permute(0, 2, 1, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = torch.softmax((q @ k.transpose(2, 3)) / 3, dim=-1)
        y = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(x.size(0), -1, 8)
        # Few queries, as many keys and values as there are tokens.
        q, k, v = self.split(self.q(y[:, :2])), self.split(self.k(x)), self.split(self.v(x))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.7).transpose(1, 2).flatten(2)
        a, b, c = self.out(y).chunk(3, 2)
        y = 0.5 * torch.matmul(self.split(a), self.split(b).transpose(-2, -1))
        y = (y.softmax(-1) @ self.split(c)).transpose(1, 2).reshape(x.shape[0], 2, 4)
        q, k, v = (self.split(t) for t in self.biased(y).chunk(3, 2))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(y.mean(1))


class Chunks(nn.Module):
    """Chunks with constants, some of equal layers' channels, taken one by one and all together."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 8, 3, padding=1, bias=False)
        self.conv3, self.fc = nn.Conv2d(7, 9, 1), nn.Linear(9, 5)

    def forward(self, x):
        a, b, c = torch.chunk(F.relu(self.conv1(x)), 3, 1)
        x = self.conv2(torch.cat([c, a, b], 1))
        x = torch.cat(x.chunk(2, 1), 1).chunk(8, 1)
        x = self.conv3(torch.cat([x[-1], *(x[i] for i in range(6))], 1))
        return self.fc(F.relu(x).mean((2, 3)))


GRAPHS = {
    "vgg": VGG,
    "basic": ResNetBasic,
    "bottleneck": ResNetBottleneck,
    "joined": Joined,
    "preactivation": PreActivation,
    "mobilenet": MobileNetV2,
    "chunks": Chunks,
    "densenet": DenseNet,
    "grouped": Grouped,
    "encoder": Encoder,
    "attentions": Attentions,
}

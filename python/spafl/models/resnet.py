"""ResNet-18 as published with SpaFL: pre-activation blocks, a threshold on every convolution, a plain classifier.

The published code has widths 32..256; the costs in the paper's table only come out with 64..512.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from spafl_kernels import ThresholdConv2d


class BasicBlock(nn.Module):
    """BN - ReLU - conv3x3 - BN - ReLU - conv3x3, plus the input (or a 1x1 convolution of the activated input)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = ThresholdConv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = ThresholdConv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut: ThresholdConv2d | None = None
        if stride != 1 or in_channels != channels:
            self.convShortcut = ThresholdConv2d(in_channels, channels, 1, stride, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out = self.conv1(activated)
        out = self.conv2(self.relu(self.bn2(out)))
        return out + shortcut


class ResNet18(nn.Module):
    """``(N, in_channels, 32, 32) -> (N, classes)``; 2,400 thresholds at width 32, 4,800 at width 64."""

    def __init__(self, classes: int = 100, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.conv1 = ThresholdConv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        self.linear = nn.Linear(8 * width, classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))

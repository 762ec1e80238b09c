"""Conv4 as published with SpaFL: 32x32 images, four unpadded 5x5 convolutions and three linear layers, BatchNorm."""

from __future__ import annotations

from torch import Tensor, nn

from spafl_kernels import ThresholdConv2d, ThresholdLinear


class Conv4(nn.Module):
    """``(N, in_channels, 32, 32) -> (N, classes)``; 650 thresholds for ten classes."""

    def __init__(self, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = ThresholdConv2d(in_channels, 64, 5, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = ThresholdConv2d(64, 64, 5, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.pool1 = nn.MaxPool2d(2)
        self.conv3 = ThresholdConv2d(64, 128, 5, bias=False)
        self.bn3 = nn.BatchNorm2d(128)
        self.conv4 = ThresholdConv2d(128, 128, 5, bias=False)
        self.bn4 = nn.BatchNorm2d(128)
        self.pool2 = nn.MaxPool2d(2)
        self.dense1 = ThresholdLinear(512, 128, bias=False)
        self.bn5 = nn.BatchNorm1d(128)
        self.dense2 = ThresholdLinear(128, 128, bias=False)
        self.bn6 = nn.BatchNorm1d(128)
        self.dense3 = ThresholdLinear(128, classes, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.pool1(self.relu(self.bn2(self.conv2(x))))
        x = self.relu(self.bn3(self.conv3(x)))
        x = self.pool2(self.relu(self.bn4(self.conv4(x))))
        x = self.relu(self.bn5(self.dense1(x.flatten(1))))
        x = self.relu(self.bn6(self.dense2(x)))
        return self.dense3(x)

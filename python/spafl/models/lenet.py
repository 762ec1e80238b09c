"""LeNet-5 as published with SpaFL: 28x28 grey images, no biases, a threshold on every layer."""

from __future__ import annotations

from torch import Tensor, nn

from spafl_kernels import ThresholdConv2d, ThresholdLinear


class LeNet5(nn.Module):
    """``(N, in_channels, 28, 28) -> (N, classes)``; 580 thresholds for one channel and ten classes."""

    def __init__(self, classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = ThresholdConv2d(in_channels, 20, 5, bias=False)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = ThresholdConv2d(20, 50, 5, bias=False)
        self.pool2 = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.fc3 = ThresholdLinear(800, 500, bias=False)
        self.fc4 = ThresholdLinear(500, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.conv1(x)))
        x = self.pool2(self.relu(self.conv2(x)))
        x = self.relu(self.fc3(x.flatten(1)))
        return self.fc4(x)

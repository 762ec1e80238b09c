"""The worked example of docs/architecture.md: which of four filters are computed."""

import pytest
import torch
from torch import nn

from spafl_kernels import CompactModule, convert


def model(norm, act, estimator):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=False), *([nn.BatchNorm2d(4)] if norm else []), act, nn.AdaptiveAvgPool2d(1)]
    net = convert(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 5)), lambda n, m: n == "0", estimator=estimator)
    with torch.no_grad():
        scores = torch.tensor([0.9, 0.2, 0.6, 0.1])
        net[0].weight.mul_((scores / net[0].scores()).view(-1, 1, 1, 1))
        net[0].threshold.fill_(0.5)
        if norm:
            net[1].bias.copy_(torch.tensor([0.1, 0.3, 0.0, -0.2]))
    return net


@pytest.mark.parametrize(
    ("norm", "act", "estimator", "rows"),
    [
        (False, nn.ReLU(), "identity", 2),
        (False, nn.ReLU(), "window", 2),
        (True, nn.ReLU(), "window", 2),
        (True, nn.ReLU(), "identity", 3),
        (False, nn.GELU(), "identity", 4),
    ],
)
def test_rows_that_are_computed(norm, act, estimator, rows):
    compact = CompactModule(model(norm, act, estimator), strict=True, multiple=1)
    compact(torch.randn(4, 2, 6, 6)).sum().backward()
    assert f"0: {rows} of 4 rows are computed, 2 are active" in compact.explain()

"""Graphs made by hypothesis: train, evaluate and export must equal the masked model, whatever the blocks and masks."""

from functools import partial
from unittest import mock

import pytest
import torch
from helpers import batches, compare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_trainer import warm_norms
from torch import nn

from spafl_kernels import ThresholdConv2d, ThresholdLinear, threshold_layers
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.compact.export import _exported
from spafl_kernels.compact.session import Session
from spafl_kernels.training import SGDOptions


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Concat(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


@st.composite
def graphs(draw):
    """A model for ``(N, 2, 7, 7)`` inputs."""
    estimator = draw(st.sampled_from(["identity", "window"]))

    def conv(inside, out, **kwargs):
        bias = draw(st.booleans())
        size = draw(st.sampled_from([1, 2, 3]))
        padding = draw(st.sampled_from([0, 1, "same"])) if size < 3 else 1
        return ThresholdConv2d(
            inside, out, size, padding=padding, bias=bias, mask_bias=bias and draw(st.booleans()), estimator=estimator,
            **kwargs,
        )  # fmt: skip

    def same(inside, out):
        return ThresholdConv2d(inside, out, 3, padding=1, bias=draw(st.booleans()), estimator=estimator)

    def act():
        return draw(st.sampled_from([nn.ReLU, nn.ReLU6, nn.GELU, nn.Sigmoid, nn.LeakyReLU, nn.Identity]))()

    layers, width = [], 2
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "conv", "conv-norm", "depthwise", "residual", "concat", "pool", "norm"]))
        out = draw(st.integers(1, 9))
        if kind == "conv":
            layers += [conv(width, out), act()]
            width = out
        elif kind == "conv-norm":
            layers += [conv(width, out), nn.BatchNorm2d(out), act()]
            width = out
        elif kind == "depthwise":
            layers += [ThresholdConv2d(width, width, 3, padding=1, groups=width, bias=False, estimator=estimator)]
        elif kind == "residual":
            layers += [Residual(nn.Sequential(same(width, width), act()))]
        elif kind == "concat":
            layers += [Concat(same(width, out), nn.Sequential(same(width, 3), nn.BatchNorm2d(3), act()))]
            width = out + 3
        elif kind == "pool":
            layers += [draw(st.sampled_from([nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1), nn.MaxPool2d(2, 1, padding=1)]))]
        else:
            layers += [nn.BatchNorm2d(width), act()]
    spatial = nn.Sequential(*layers)(torch.zeros(2, 2, 7, 7)).shape[2:]
    if draw(st.booleans()):
        layers += [nn.AdaptiveAvgPool2d(1)]
        spatial = (1, 1)
    hidden = draw(st.integers(1, 7))
    layers += [
        nn.Flatten(),
        ThresholdLinear(width * spatial[0] * spatial[1], hidden, bias=draw(st.booleans()), estimator=estimator),
        act(),
        ThresholdLinear(hidden, 3, estimator=estimator),
    ]
    model = warm_norms(nn.Sequential(*layers).double(), draw(st.integers(0, 99)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / p[0].numel() ** 0.5)
        for _, layer in threshold_layers(model):
            share = draw(st.sampled_from([0.0, 0.3, 0.6, 1.0]))
            rows = len(layer.threshold)
            active = torch.rand(rows, generator=generator) < share
            layer.threshold.copy_(layer.scores() * torch.where(active, 0.98, 1.02))
            if draw(st.integers(0, 5)) == 0:
                layer.threshold[0] = 2.5  # far beyond the window
    return model


@pytest.mark.parametrize("examples", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_random_graphs(examples):
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        model=graphs(),
        multiple=st.sampled_from([1, 8]),
        kind=st.sampled_from(["compiled", "plain", "gpu"]),
        patience=st.sampled_from([0, 0.1, 1e9]),
    )
    def property_holds(model, multiple, kind, patience):
        options = SGDOptions(1e-3, 0.9, weight_decay=0.01, max_grad_norm=5.0, penalty=0.1, collapse_floor=0.05)
        trainer = CompactTrainer(
            model, strict=True, multiple=multiple, compiled=kind == "compiled", patience=patience, verify="never"
        )
        data = batches((2, 7, 7), 4, 3, classes=3)
        # Plans and memory order as a GPU wants them.
        with mock.patch("spafl_kernels.compact.trainer.Session", partial(Session, gpu=kind == "gpu")):
            compare(model, options, data, evaluate_every=2, start_momentum=0.01, tolerance=1e-7, trainer=trainer)
        model.eval()
        x = torch.randn(2, 2, 7, 7, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(_exported(model, (2, 7, 7))(x), model(x), rtol=1e-8, atol=1e-9)

    property_holds()

"""Graphs written in plain torch.nn, converted: the compact trainer equals the masked one, and channels are followed."""

import pytest
import torch
from graphs import GRAPHS
from helpers import batches, compare, compare_steps, prune
from test_trainer import warm_norms, with_estimator
from torch import nn
from torch.nn import functional as F

from spafl_kernels import ThresholdLinear, convert, threshold_layers
from spafl_kernels.compact import CompactTrainer, trace_flow
from spafl_kernels.compact.graph.flow import Flow
from spafl_kernels.compact.graph.layout import Layout, Segment
from spafl_kernels.training import SGDOptions


def build(name, estimator):
    torch.manual_seed(0)
    return prune(warm_norms(with_estimator(convert(GRAPHS[name]().double()), estimator)), 0.5)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_training(name, estimator):
    model = build(name, estimator)
    options = SGDOptions(lr=0.003, momentum=0.9, weight_decay=1e-3, max_grad_norm=2.0, penalty=0.05)
    data = list(batches((3, 8, 8), 10, 4, classes=5))
    if estimator == "identity" and name == "vgg":
        return compare_steps(model, options, data)  # biases in front of BatchNorm, see test_trainer.py
    trainer = CompactTrainer(model, strict=True, verify="never", multiple=1 if name == "bottleneck" else 8)
    a, b, _, _ = compare(model, options, data, evaluate_every=3, trainer=trainer)
    if estimator == "window":
        assert (
            b.macs
            < (
                0.75
                if name in ("vgg", "basic", "bottleneck", "joined", "preactivation", "mobilenet", "densenet")
                else 0.95
            )
            * a.macs
        )


@pytest.mark.parametrize(
    "name, layer, sources",
    [
        ("vgg", "features.4", ["features.0"]),
        ("vgg", "classifier.0", ["features.7"]),
        ("bottleneck", "blocks.0.conv1", ["stem.0"]),
        ("bottleneck", "blocks.1.conv1", ["blocks.0.conv3", "blocks.0.downsample.0"]),
        ("bottleneck", "blocks.2.conv1", ["blocks.0.conv3", "blocks.0.downsample.0", "blocks.1.conv3"]),
        ("basic", "blocks.1.conv1", ["blocks.0.conv2", "stem.0"]),
        ("joined", "after", ["left", "whole", "right"]),
        ("joined", "fc1", ["after", "skip"]),
        ("preactivation", "fc", ["conv0", "conv2"]),
        ("bottleneck", "blocks.1.conv3", ["blocks.1.conv2"]),
        ("mobilenet", "features.3.conv.3", ["features.3.conv.0"]),
        ("densenet", "convs.2", ["conv0", "convs.0", "convs.1"]),
        ("densenet", "fc", ["transition"]),
        ("encoder", "fc2", ["fc1"]),
        ("attentions", "out", ["v"]),
        ("attentions", "biased", ["out"]),
    ],
)
def test_channels_are_followed(name, layer, sources):
    flow = trace_flow(build(name, "window"), (3, 8, 8))
    assert list(flow.layout_in(layer).sources) == sources


def test_the_layout_of_a_sum():
    a, b = Segment((("a", 0),), 5), Segment((("b", 0),), 7)
    whole, dense = Layout(1, (Segment((("whole", 0),), 12),)), Segment((), 12)
    summed = Layout(1, (a, b)).plus(whole)
    assert summed == Layout(1, (Segment((("a", 0), ("whole", 0)), 5), Segment((("b", 0), ("whole", 5)), 7)))
    assert summed.summed and summed.width == 12 and summed.sources == ("a", "whole", "b")
    assert summed.plus(summed) == summed == whole.plus(Layout(1, (a, b)))
    assert summed.narrow(4, 6) == Layout(
        1, (Segment((("a", 4), ("whole", 4)), 1), Segment((("b", 0), ("whole", 5)), 1))
    )
    assert not Layout(1, (dense,)).plus(whole).summed  # never dropped in one of them: never dropped
    assert Layout(1, (dense,)).plus(whole).sources == ("",)
    assert whole.repeated(4, 1).plus(whole.repeated(4, 1)) == whole.repeated(4, 1)
    assert whole.repeated(4, 1).plus(Layout(1, (Segment((("c", 0),), 48),))) is None


@pytest.mark.parametrize(
    "name, text",
    [
        ("chunks", "full width at conv2 -> chunk_1: chunks that are not taken one by one"),
        ("grouped", "multiplication of pruned channels by what varies over samples and over positions"),
        ("encoder", "LayerNorm is not followed"),
        ("encoder", "full width at q, k, v -> flatten_1: attention over pruned channels that are not zero"),
    ],
)
def test_where_channels_stop_is_said(name, text):
    assert text in trace_flow(build(name, "window"), (3, 8, 8)).explain()


class Head(nn.Module):
    """Attention with ``change`` made to it."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.q, self.k, self.v = (ThresholdLinear(6, 8, bias=False) for _ in range(3))
        self.out, self.softmax, self.drop = (
            ThresholdLinear(8, 5),
            nn.Softmax(2 if change == "axis" else -1),
            nn.Dropout(0.5),
        )

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.change == "mask":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.change == "dropout":
            y = self.drop(self.softmax(q @ k.transpose(2, 3))) @ v
        elif self.change == "tensor scale":
            y = self.softmax(q @ k.transpose(2, 3) * q.mean()) @ v
        elif self.change == "order":
            y = self.softmax(k.transpose(2, 3) @ q)
            y = v @ y
        else:
            scores = q @ k.transpose(2, 3)
            y = self.softmax(scores) @ v
            if self.change == "reader":
                y = y + scores.mean()
        y = y.flatten(2).unflatten(-1, (5, 4)).transpose(1, 2) if self.change == "no heads" else y.transpose(1, 2)
        return self.out(y.flatten(2)).mean(1)


@pytest.mark.parametrize("change", ["", "mask", "dropout", "tensor scale", "order", "axis", "reader", "no heads"])
def test_what_is_not_plain_attention_runs_as_it_stands(change):
    torch.manual_seed(0)
    model = prune(Head(change).double(), 0.5)
    for _, layer in threshold_layers(model):
        layer.estimator = "window"
    flow = trace_flow(model, (5, 6))
    assert (flow.layout_in("out") is not None) == (not change)
    data = [(torch.randn(4, 5, 6, dtype=torch.float64), torch.randint(0, 5, (4,))) for _ in range(4)]
    compare(model, SGDOptions(lr=0.1, momentum=0.9, weight_decay=1e-3, penalty=0.05), data, evaluate_every=2)


class Doubling(nn.Module):
    """Twice as many ways to the result at every step, and no layer that reads channels on any of them."""

    def __init__(self, steps):
        super().__init__()
        self.a, self.b, self.steps = ThresholdLinear(6, 8), ThresholdLinear(6, 8), steps

    def forward(self, x):
        y = self.a(x) + self.b(x)
        for _ in range(self.steps):
            y = y + torch.relu(y)
        return torch.cat([y, self.b(x)], 1)


def test_the_work_of_following_grows_with_the_operations_not_with_the_ways(monkeypatch):
    asked, users = [], Flow.users

    def counted(flow, op):
        asked.append(op)
        assert len(asked) < 10_000, "every way is gone"
        return users(flow, op)

    monkeypatch.setattr(Flow, "users", counted)
    trace_flow(Doubling(30), (6,))

"""Graphs written in plain torch.nn, converted: the compact trainer equals the masked one, and channels are followed."""

import pytest
import torch
from graphs import GRAPHS
from helpers import batches, compare, compare_steps, prune
from test_trainer import warm_norms, with_estimator

from spafl_kernels import convert
from spafl_kernels.compact import CompactTrainer, trace_flow
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
    trainer = CompactTrainer(model, strict=True, multiple=1 if name == "bottleneck" else 8)
    a, b, _, _ = compare(model, options, data, evaluate_every=3, trainer=trainer)
    if estimator == "window":
        assert b.macs < (0.75 if name in ("vgg", "bottleneck", "mobilenet", "densenet") else 0.95) * a.macs


@pytest.mark.parametrize(
    "name, layer, sources",
    [
        ("vgg", "features.4", ["features.0"]),
        ("vgg", "classifier.0", ["features.7"]),
        ("bottleneck", "blocks.0.conv1", ["stem.0"]),
        ("bottleneck", "blocks.1.conv3", ["blocks.1.conv2"]),
        ("mobilenet", "features.3.conv.3", ["features.3.conv.0"]),
        ("densenet", "convs.2", ["conv0", "convs.0", "convs.1"]),
        ("densenet", "fc", ["transition"]),
        ("encoder", "fc2", ["fc1"]),
    ],
)
def test_channels_are_followed(name, layer, sources):
    flow = trace_flow(build(name, "window"), (3, 8, 8))
    assert [s.source for s in flow.layout_in(layer).segments] == sources


@pytest.mark.parametrize(
    "name, text",
    [
        ("bottleneck", "full width at blocks.1.conv3 -> "),
        ("grouped", "grouped convolution"),
        ("grouped", "GroupNorm is not followed"),
        ("encoder", "unflatten is not followed"),
    ],
)
def test_where_channels_stop_is_said(name, text):
    assert text in trace_flow(build(name, "window"), (3, 8, 8)).explain()

"""``explain()`` says of every layer what is computed, why, and what that brings; it claims no success where none is."""

import pytest
import torch
from torch import nn

from spafl_kernels import CompactModule, ThresholdConv2d, ThresholdLinear, make_trainer
from spafl_kernels.training import SGDOptions

X, Y = torch.randn(4, 3, 8, 8), torch.arange(4)


def net(estimator, activation, norm=None):
    torch.manual_seed(0)
    model = nn.Sequential(
        ThresholdConv2d(3, 8, 3, bias=False, estimator=estimator), *([norm] if norm else []), activation, nn.Flatten(),
        ThresholdLinear(288, 4, bias=False, estimator=estimator),
    )  # fmt: skip
    with torch.no_grad():
        model[0].threshold[3:] = 1.0 if estimator == "identity" else 0.5
    return model


def told(model, measure=None):
    trainer = make_trainer(model, "compact", strict=True)
    trainer.begin(SGDOptions(lr=0.01))
    trainer.step(X, Y)
    text = trainer.explain() if measure is None else trainer.explain(measure)
    trainer.finish()
    return text.splitlines()


def test_identity_with_gelu_is_no_success():
    lines = told(net("identity", nn.GELU()))
    assert lines[0].startswith("compact: nothing is skipped, all 5 pruned filters are computed: estimator 'identity'")
    assert "no ReLU behind the layer" in lines[0]
    (layer,) = (line for line in lines if line.startswith("0: 8 of 8 rows are computed, 3 are active; estimator"))
    assert "; expected " in layer and "measured" not in layer
    module = CompactModule(net("identity", nn.GELU()), strict=True)
    module(X).sum().backward()
    assert module.explain().startswith("compact: nothing is skipped, all 5 pruned filters")


def test_a_module_expects_of_its_layers_what_a_trainer_does():
    lines = told(net("window", nn.ReLU()))
    module = CompactModule(net("window", nn.ReLU()), strict=True)
    with torch.no_grad():
        module(X)
    assert "expected" not in module.explain()
    module(X).sum().backward()
    layers = [line for line in module.explain().splitlines() if line.startswith(("0: 3 of 8", "3: "))]
    assert [line for line in layers if "expected" in line] == [line for line in lines if "; expected " in line]
    assert len(layers) > 1 and "x as fast as masked, without its gathers" in module.explain()
    assert "measured" not in module.explain() and module.explain(X).count("; measured ") == 2 * 2
    assert "measured" not in module.explain([torch.randn(2, 3, 9, 9)])


@pytest.mark.parametrize("estimator, activation", [("identity", nn.ReLU()), ("window", nn.GELU())])
def test_what_is_skipped_is_expected_to_gain(estimator, activation):
    lines = told(net(estimator, activation), X)
    assert lines[0] == "compact: all channels can be traced"
    (step,) = (line for line in lines if line.startswith("a step is expected to be "))
    assert step.endswith("x as fast as masked")
    (layer,) = (line for line in lines if line.startswith("0: 3 of 8 rows are computed, 3 are active; expected "))
    assert float(layer.rpartition("measured ")[2].rstrip("x")) > 0


@pytest.mark.parametrize(
    "norm, reason",
    [
        (nn.BatchNorm2d(8).requires_grad_(False), "BatchNorm2d runs at full width: its weight is frozen"),
        (nn.InstanceNorm2d(8), "InstanceNorm2d is not followed"),
    ],
)
def test_where_channels_stop_is_said_of_the_layer(norm, reason):
    (layer,) = (line for line in told(net("window", nn.ReLU(), norm)) if line.startswith("0: 3 of 8 rows"))
    assert f"; put together at full width for _1: {reason}; expected " in layer


def test_nothing_is_claimed_before_the_first_batch():
    assert make_trainer(net("identity", nn.GELU())).explain() == "compact: all channels can be traced"
    assert make_trainer(net("identity", nn.GELU()), "masked").explain(X) == "masked: asked for"

"""The audit counts what the trainer executes, and says where time goes."""

import pytest
import torch
from helpers import prune
from test_module import MODELS

from spafl.models import LeNet5
from spafl_kernels.compact.audit import LayerAudit, audit


def test_counts_and_table():
    torch.manual_seed(0)
    model = prune(LeNet5(), 0.5)
    found = audit(model, torch.randn(4, 1, 28, 28), repeats=2)
    layers = {a.name: a for a in found.layers}
    assert layers["conv2"].masked_macs == 4 * 3 * 50 * 500 * 64
    assert layers["conv2"].compact_macs == 4 * 3 * 25 * 250 * 64
    assert layers["conv1"].masked_macs == 4 * 2 * 20 * 25 * 576
    assert all(a.masked_seconds > 0 and a.compact_seconds > 0 for a in found.layers)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "density", "MMACs", "left", "ms", "left", "realised"]
    assert len(lines) == 6 and lines[-1].startswith("all layers") and "25.0%" in lines[2]


def test_realised_share():
    half = LayerAudit("a", 0.5, 100, 25, 4.0, 2.5)
    assert half.ideal == 0.25 and half.measured == 0.625 and half.realised == 0.5
    assert LayerAudit("b", 1.0, 100, 100, 4.0, 2.5).realised is None


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    assert len(audit(prune(build(), 0.3), torch.randn(2, *shape), repeats=1).layers) > 3


def test_bad_input():
    with pytest.raises(ValueError, match="repeats must be >= 1; got 0"):
        audit(LeNet5(), torch.randn(1, 1, 28, 28), repeats=0)

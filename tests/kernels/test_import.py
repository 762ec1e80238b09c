"""Importing is cheap and needs neither Triton nor the compiled extension."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import spafl_kernels

BLOCKED = """
import sys
from importlib.machinery import PathFinder

real = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.split(".")[0] == "triton" or name == "spafl_kernels._C" else real(name, path, target)
)
"""
USE = """
import torch
import spafl_kernels
layer = spafl_kernels.ThresholdConv2d(2, 3, 3)
layer(torch.randn(1, 2, 5, 5)).sum().backward()
assert layer.threshold.grad is not None
slow = {"torch._dynamo", "torch._inductor", "triton", "sklearn", "matplotlib"} & set(sys.modules)
assert not slow, slow
"""

STEP = """
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.optimisers import AdamOptions
from spafl_kernels.training import MaskedTrainer, SGDOptions

model = torch.nn.Sequential(
    layer, torch.nn.BatchNorm2d(3), torch.nn.ReLU(), torch.nn.Flatten(), spafl_kernels.ThresholdLinear(27, 2)
)
for trainer in (MaskedTrainer(model), CompactTrainer(model, strict=True)):
    for options in (SGDOptions(lr=0.1, momentum=0.9), AdamOptions(lr=0.1), AdamOptions(lr=0.1, decoupled=True)):
        if trainer.engine == "masked" or isinstance(options, SGDOptions):
            trainer.begin(options)
            trainer.step(torch.randn(4, 2, 5, 5), torch.tensor([0, 1, 1, 0]))
            trainer.finish()
assert "torch._dynamo" not in sys.modules
"""


RUN = """
import sys
import spafl.cli, spafl.simulation, spafl_kernels.compact
assert "torch._dynamo" not in sys.modules
from spafl_kernels.compact import *
assert CompactModule.__module__ == "spafl_kernels.compact.module" and "torch._dynamo" in sys.modules
"""


@pytest.mark.slow
def test_a_run_is_set_up_without_the_compiler():
    """A third of what starting takes, and workers are waiting to be started."""
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_triton_and_without_the_extension():
    environment = {**os.environ, "SPAFL_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", BLOCKED + USE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_with_everything():
    """Steps of training and the comparison of engines before the first one import no compiler either."""
    done = subprocess.run([sys.executable, "-c", "import sys\n" + USE + STEP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_wings_do_not_import_each_other():
    for wing, other in (("cpu", "gpu"), ("gpu", "cpu")):
        files = sorted((pathlib.Path(spafl_kernels.__file__).parent / wing).rglob("*.py"))
        assert len(files) > 5
        assert not [f for f in files if re.search(rf"^ *(from|import) \S*\b{other}\b", f.read_text(), re.M)]

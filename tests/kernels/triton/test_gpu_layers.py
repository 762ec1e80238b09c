"""What of benchmarks/gpu_layers.py needs no GPU: its list of layers, its arithmetic, and its refusal."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest
import torch

from spafl_kernels.triton.geometry import Geometry

PATH = pathlib.Path(__file__).resolve().parents[3] / "benchmarks" / "gpu_layers.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_layers", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_layers", module)
    spec.loader.exec_module(module)
    return module


# Ceilings of output skipping at densities .5, .25, .1 and batch 128, worked out by hand from 790 TFLOP/s and 4.3 TB/s.
@pytest.mark.parametrize(
    ("out", "geometry", "ceilings"),
    [
        (64, Geometry(64, 28, 28, (5, 5)), (2.0, 3.7, 3.7)),
        (64, Geometry(64, 32, 32, (3, 3), (1, 1), (1, 1)), (1.57, 1.57, 1.57)),
        (512, Geometry(512, 4, 4, (3, 3), (1, 1), (1, 1)), (2.0, 4.0, 10.0)),
    ],
)
def test_ceilings(bench, out, geometry, ceilings):
    layer = bench.Layer("model", "layer", out, geometry, 1, False)
    dense = bench.floor_us(layer, 128, "bf16", "forward", 1.0)
    for density, ceiling in zip((0.5, 0.25, 0.1), ceilings, strict=True):
        assert dense / bench.floor_us(layer, 128, "bf16", "forward", density) == pytest.approx(ceiling, rel=0.02)


def test_every_layer_of_the_models_is_listed(bench):
    layers = {name: bench.model_layers(name) for name in bench.MODEL_NAMES}
    assert {name: len(found) for name, found in layers.items()} == {
        "conv4": 7, "resnet18-full": 11, "lenet5": 4, "vit": 4,
    }  # fmt: skip
    assert layers["lenet5"][1].shape == "5x5 20->50 @12x12 s1"
    assert layers["vit"][0].rows == 65 and layers["vit"][0].shape == "128->1536"


def test_tile_density_is_what_the_tiles_multiply(bench):
    assert [bench.tile_density(c, 64) for c in (0, 1, 16, 17, 33, 64)] == [0, 0.25, 0.25, 0.5, 1, 1]
    assert bench.tile_density(70, 128) == (64 + 16) / 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu():
    done = subprocess.run([sys.executable, str(PATH)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "measures a CUDA GPU" in done.stderr

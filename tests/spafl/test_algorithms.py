"""The algorithm interface: a stranger's method, and the published importance update."""

import json

import numpy as np
import pytest
import torch
from toy_algorithm import ToyHeteroFL

from spafl.algorithms import ALGORITHMS, find_algorithm, register_algorithm
from spafl.algorithms.spafl import VARIANTS, SpaFL, SpaFLOptions, penalty_at
from spafl.config import resolve_config
from spafl.simulation import run
from spafl_kernels import importance_update_


@pytest.fixture
def toy():
    register_algorithm("toy-heterofl", ToyHeteroFL)
    yield
    del ALGORITHMS["toy-heterofl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_strangers_algorithm_runs_without_touching_the_loop(small, tmp_path, toy, workers):
    """Sub-models of several widths: other shapes for every client, own training, own merge."""
    small["algorithm"] = {"name": "toy-heterofl", "rates": [1.0, 0.5]}
    small["rounds"] = 4
    small["simulation"]["workers"] = workers
    small["training"].update(lr=0.1, epochs=5)
    summary = run(resolve_config(small), tmp_path / "run")
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert summary["final"]["evaluation"]["accuracy"]["mean"] > 0.3
    sampled = lines[0]["sampled"]
    full, half = 64 * 784 + 10 * 64, 32 * 784 + 10 * 32
    assert lines[0]["cost"]["payload"]["up_bytes"] == 4 * sum(full if k % 2 == 0 else half for k in sampled)


def test_an_algorithm_is_found_by_import_path():
    assert find_algorithm("spafl.algorithms.spafl:SpaFL") is SpaFL
    with pytest.raises(ValueError, match="cannot be imported"):
        find_algorithm("spafl.nowhere:Thing")
    with pytest.raises(ValueError, match="not a subclass"):
        find_algorithm("spafl.algorithms:LocalTraining")
    with pytest.raises(ValueError, match="exists already"):
        register_algorithm("spafl", SpaFL)


def test_unknown_toy_option_is_refused(small, toy):
    small["algorithm"] = {"name": "toy-heterofl", "rate": [1.0]}
    with pytest.raises(ValueError, match=r"unknown key algorithm\.rate; did you mean algorithm\.rates\?"):
        resolve_config(small)


@pytest.mark.parametrize(("normaliser", "divisor"), [("kernel", 6), ("row", 18)])
def test_importance_update_of_a_convolution(normaliser, divisor):
    weight = torch.randn(4, 3, 2, 3, dtype=torch.float64)
    weight[2] = 0.0
    delta = torch.tensor([0.3, -0.6, 1.0, 0.0], dtype=torch.float64)
    expected = weight.numpy().copy()
    for i in range(4):
        expected[i] -= delta[i].item() / divisor * np.sign(expected[i].sum())
    importance_update_(weight, delta, normaliser)
    np.testing.assert_allclose(weight.numpy(), expected, rtol=0, atol=1e-15)
    assert (weight[2] == 0).all()  # sign(0) = 0


def test_importance_update_of_a_linear_layer():
    weight = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    importance_update_(weight, torch.tensor([0.5, 0.5]), "kernel")
    assert weight.tolist() == [[0.75, 1.75], [-0.75, -1.75]]
    with pytest.raises(ValueError, match="normaliser must be kernel or row"):
        importance_update_(weight, torch.zeros(2), "fan_in")


def test_penalty_warm_up():
    options = SpaFLOptions(**VARIANTS["fmnist"]["algorithm"], variant="fmnist")
    assert penalty_at(options, 0) == pytest.approx(0.002 * 0.0066929, rel=1e-4)
    assert penalty_at(options, 1) == pytest.approx(0.002 * 0.9933071, rel=1e-4)
    assert penalty_at(SpaFLOptions(**VARIANTS["cifar10"]["algorithm"]), 0) == 0.00015

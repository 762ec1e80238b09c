"""The algorithm interface: a stranger's method, and the published importance update."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_algorithm import ToyHeteroFL

from spafl.algorithms import ALGORITHMS, find_algorithm, register_algorithm
from spafl.algorithms.spafl import VARIANTS, SpaFL, SpaFLOptions, penalty_at
from spafl.config import resolve_config
from spafl.models import MODELS, build_model, register_model
from spafl.simulation import run
from spafl_kernels import ThresholdLinear, importance_update_
from spafl_kernels.functional import threshold_layers


@pytest.fixture
def toy():
    register_algorithm("toy-heterofl", ToyHeteroFL)
    yield
    del ALGORITHMS["toy-heterofl"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
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


# -- the classifier


class WithPlainHead(torch.nn.Module):
    """Two linear layers, the classifier plain, as in the published ResNet-18."""

    def __init__(self, classes, in_channels):
        super().__init__()
        self.hidden = ThresholdLinear(in_channels * 784, 16, bias=False)
        self.head = torch.nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.hidden(x.flatten(1)).relu())


def prepared(model, **options):
    return SpaFL(SpaFLOptions(**VARIANTS["paper"]["algorithm"], **options)).prepare_model(model, torch.zeros(1))


@pytest.mark.parametrize(
    ("name", "head", "as_built"),
    [("lenet5", "fc4", True), ("conv4", "dense3", True), ("resnet18", "linear", False), ("vit", "mlp_head.1", False)],
)
def test_a_classifier_is_pruned_as_published_or_as_asked(name, head, as_built):
    def masked(**options):
        return {n for n, _ in threshold_layers(prepared(build_model(name, 10, 1, seed=0), **options))}

    published = masked()
    assert (head in published) == as_built
    assert masked(prune_head="as-built") == published
    assert masked(prune_head=True) == published | {head}
    assert masked(prune_head=False) == published - {head}


@pytest.mark.parametrize("pruned", [True, False])
def test_the_classifier_keeps_its_weights_and_place(pruned):
    model = WithPlainHead(10, 1)
    if not pruned:
        model.head = ThresholdLinear(16, 10)
    weight, x = model.head.weight.detach().clone(), torch.randn(3, 1, 28, 28)
    before = model(x)
    model = prepared(model, prune_head=pruned)
    assert isinstance(model.head, ThresholdLinear) == pruned and torch.equal(model.head.weight, weight)
    torch.testing.assert_close(model(x), before)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_models_without_such_a_classifier_are_refused():
    for model in (torch.nn.Conv2d(1, 2, 3), torch.nn.Linear(3, 2)):
        with pytest.raises(ValueError, match="prune_head needs a model that contains a linear layer"):
            prepared(model, prune_head=True)
    with pytest.raises(ValueError, match="computed weight"):
        prepared(torch.nn.Sequential(torch.nn.utils.weight_norm(torch.nn.Linear(3, 2))), prune_head=True)


@pytest.mark.parametrize("prune_head", [True, False, "as-built"])
def test_a_run_prunes_the_classifier_as_asked(small, tmp_path, prune_head):
    register_model("plain-head", WithPlainHead, 28)
    try:
        small["model"]["name"] = "plain-head"
        small["algorithm"]["prune_head"] = prune_head
        small["rounds"] = 1
        final = run(resolve_config(small), tmp_path / "run")["final"]
    finally:
        del MODELS["plain-head"]
    assert list(final["density"]["layers"]) == ["hidden", "head"][: 1 + (prune_head is True)]


@pytest.mark.parametrize("counted", [True, False])
def test_the_published_counter_has_both_terms_of_thresholds_or_neither(counted):
    """Three images in batches of two, two epochs: 3 E D sum(density * MACs), thresholds per batch, weights once."""
    model = WithPlainHead(10, 1)
    algorithm = SpaFL(SpaFLOptions(**{**VARIANTS["cifar100"]["algorithm"], "count_threshold_macs": counted}))
    client = SimpleNamespace(
        local=SimpleNamespace(epochs=2),
        train=[0] * 3,
        macs={"hidden": 784 * 16},
        layers=dict(threshold_layers(model)),
        batches_per_epoch=lambda: 2,
    )
    macs = 3 * 2 * 3 * 0.25 * 784 * 16
    assert algorithm._paper_macs(client, {"hidden": 0.25}) == macs + counted * (16 * 2 + 784 * 16)


def test_the_cifar100_counter_adds_nothing_for_thresholds():
    counted = {name: preset["algorithm"]["count_threshold_macs"] for name, preset in VARIANTS.items()}
    assert counted == {"fmnist": True, "cifar10": True, "cifar100": False, "paper": True, "tuned": True}

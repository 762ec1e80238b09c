"""Numbers as targets: the loss and what counts as right are those that the configuration states."""

import json

import numpy as np
import pytest
import torch

import spafl
from spafl.cli import main
from spafl.config import resolve_config
from spafl.data import load_dataset
from spafl.errors import UserError
from spafl.simulation.problem import build_problem, cut_data, load_data

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, features):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, x):
        return self.body(x)
"""


@pytest.fixture
def prices(tmp_path, monkeypatch):
    """A table of three features and two numbers that follow from them; the raw tables of a run on it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(160, 3)) * [1, 10, 100] + 5
    price = 0.5 * x[:, 0] - 0.03 * x[:, 1] + 0.002 * x[:, 2]
    rows = [f"{a},{b},{c},{p},{-p}" for (a, b, c), p in zip(x, price)]
    (tmp_path / "prices.csv").write_text("\n".join(["a,b,c,price,debt", *rows]) + "\n")
    (tmp_path / "pricenet.py").write_text(NET)
    return {
        "name": "prices", "rounds": 6, "seed": 2,
        "data": {"name": "csv", "file": "prices.csv", "options": {"target": ["price", "debt"]}},
        "partition": {"clients": 4, "alpha": 2.0, "min_train": 8, "min_test": 3},
        "model": {"name": "pricenet:Net"},
        "algorithm": {"name": "spafl", "variant": "paper"},
        "training": {"lr": 0.05, "batch_size": 8, "epochs": 3, "loss": "huber"},
        "sampling": {"clients_per_round": 4},
        "evaluation": {"tolerance": 0.25, "train_data": "never"},
        "simulation": {"workers": 1, "engine": "masked"},
    }  # fmt: skip


def refusal(raw):
    with pytest.raises(UserError) as caught:
        build_problem(resolve_config(raw))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_losses_are_those_of_the_names(loss):
    from spafl.algorithms import Objective

    out, y = torch.tensor([[0.0, 0.0], [0.5, 3.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    d = (out - y).abs().flatten().tolist()
    by_hand = {"mse": [v * v for v in d], "mae": d, "huber": [v * v / 2 if v <= 1 else v - 0.5 for v in d]}[loss]
    objective = Objective(loss, tolerance=1.0)
    assert objective.function(out, y).item() == pytest.approx(sum(by_hand) / 4)
    assert objective.hits(out, y).item() == 1  # the second row is off by 2 in one number


def test_numbers_are_learned_tested_and_exported(prices, tmp_path, capsys):
    run = spafl.run(prices, "run")
    records = run.records()
    assert records[-1]["loss"] < 0.3 * records[0]["loss"]
    assert records[-1]["accuracy"] > records[0]["accuracy"]
    config = run.config
    data = load_data(config)
    parts = cut_data(config, data)
    assert data.classes == 0 and data.outputs == 2 and data.train_y.dtype == np.float32
    last = [row for row in run.client_records() if row["round"] == 6]
    for client, part in enumerate(parts.test):
        y = torch.from_numpy(data.test_y[part])
        with torch.no_grad():
            out = run.model(client)(torch.from_numpy(data.test_x[part]))
        # One batch holds all of a client's test data.
        assert last[client]["loss"] == pytest.approx(torch.nn.functional.huber_loss(out, y).item(), rel=1e-5)
        assert last[client]["accuracy"] == pytest.approx(((out - y).abs() <= 0.25).all(1).float().mean().item())
    recorded = json.loads((run.folder / "partition.json").read_text())
    assert recorded["targets"] == {"outputs": 2, "edges": data.edges} and len(data.edges) == 9
    assert np.sum(recorded["train"]) == len(data.train_y)
    # As stored in the table, through the normalisation in the graph.
    done = run.export(client=1, normalise=True)
    table = np.loadtxt("prices.csv", delimiter=",", skiprows=1)[:, :3].astype(np.float32)
    np.save("rows.npy", table)
    assert main(["predict", str(done.files[0]), "rows.npy", "--allow-code", "--csv", "out.csv"]) == 0
    said = np.loadtxt("out.csv", delimiter=",", skiprows=1, usecols=(1, 2))
    mean, std = (np.array(v, np.float32) for v in data.standardised)
    with torch.no_grad():
        expected = run.model(1)(torch.from_numpy((table - mean) / std)).numpy()
    np.testing.assert_allclose(said, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_engines_agree_and_a_report_is_written(prices):
    runs = {}
    for engine in ("masked", "compact"):
        raw = {**prices, "rounds": 2, "simulation": {"workers": 1, "engine": engine}}
        runs[engine] = spafl.run(raw, f"run-{engine}").records()[-1]
    for name in ("loss", "train_loss", "accuracy", "density"):
        assert runs["compact"][name] == pytest.approx(runs["masked"][name], rel=1e-3)
    assert main(["report", "run-masked", "--csv", "--pdf"]) == 0


def test_shares_are_by_tenths_of_the_first_number(prices):
    data = load_data(resolve_config(prices))
    counts = np.bincount(data.strata("train"), minlength=10)
    assert counts.min() >= 12 and counts.max() <= 14 and data.strata("test").max() <= 9
    order = np.argsort(data.train_y[:, 0])
    assert (np.diff(data.strata("train")[order]) >= 0).all()


def test_what_does_not_fit_is_refused_before_anything_starts(prices):
    def changed(section, **values):
        return {**prices, section: {**prices[section], **values}}

    assert "training.loss: data csv has numbers to predict" in refusal(changed("training", loss="cross-entropy"))
    assert "evaluation.tolerance: with numbers to predict it must say" in refusal({**prices, "evaluation": {}})
    assert "evaluation.confusion: needs classes" in refusal(changed("evaluation", confusion=True))
    assert "algorithm.masked_loss leaves out classes" in refusal({**prices, "algorithm": {"name": "heterofl"}})
    digits = {**prices, "data": {"name": "digits"}, "model": {"name": "lenet5"}}
    assert "training.loss: huber needs numbers to predict (floats); data digits has classes" in refusal(digits)
    digits["training"] = {}
    assert "evaluation.tolerance: is for numbers to predict" in refusal(digits)
    with pytest.raises(UserError, match="one of cross-entropy, mse, mae, huber; got 'l2'"):
        resolve_config(changed("training", loss="l2"))
    for target, words in (("cost", "has no column 'cost' (option target)"), ([], "name of a column"), (3, "name of a")):
        assert words in refusal(changed("data", options={"target": target}))


def test_what_loaders_may_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    np.savez("a.npz", x=x, y=x.sum(1) / 7)
    data = load_dataset("npz", file="a.npz")
    assert data.train_y.shape == (16, 1) and data.test_y.shape == (4, 1)
    rows = np.concatenate([data.train_x, data.test_x])
    np.testing.assert_allclose(np.concatenate([data.train_y, data.test_y])[:, 0], rows.sum(1) / 7)
    for y, words in (
        (np.full(20, np.nan), "not finite"), (np.zeros((20, 2, 2)), "numbers to predict"),
        (np.zeros((20, 2), np.int64), "x and y must have one entry"), (np.zeros((20, 0)), "numbers to predict"),
    ):  # fmt: skip
        np.savez("a.npz", x=x, y=y)
        with pytest.raises(ValueError, match=words):
            load_dataset("npz", file="a.npz")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "local", "ditto", "fedprox", "scaffold", "fedpm", "fjord", "feddst"])
def test_other_methods_learn_numbers_too(prices, algorithm):
    run = spafl.run({**prices, "algorithm": {"name": algorithm}}, "run")
    assert run.records()[-1]["loss"] < run.records()[0]["loss"]

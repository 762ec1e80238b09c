"""Runs in which uploads are encoded, bad, or too few."""

import math
from dataclasses import replace

import pytest
import torch
from test_simulation import assert_same_run, final_tensors, metrics

from spafl.algorithms import ALGORITHMS, register_algorithm
from spafl.algorithms.fedavg import FedAvg
from spafl.algorithms.spafl import SpaFL
from spafl.cli import main
from spafl.config import deep_merge, resolve_config
from spafl.errors import UserError
from spafl.merge import TooFewUploads
from spafl.simulation import run


class Broken(SpaFL):
    """Client 0 sends NaN."""

    def train(self, client, message, round):
        training = super().train(client, message, round)
        if client.id == 0:
            training = replace(training, message={n: t * math.nan for n, t in training.message.items()}, loss=1e30)
        return training


class Hostile(SpaFL):
    """Client 1 sends extreme thresholds."""

    def train(self, client, message, round):
        training = super().train(client, message, round)
        if client.id == 1:
            training = replace(training, message={n: torch.full_like(t, 5e3) for n, t in training.message.items()})
        return training


class Restless(FedAvg):
    """Sends another part of the model in every round."""

    def expected_upload(self, server, round, client):
        names = sorted(server)
        return {names[round % len(names)]: server[names[round % len(names)]]}


@pytest.fixture(autouse=True)
def registered():
    own = {"broken": Broken, "hostile": Hostile, "restless": Restless}
    for name, algorithm in own.items():
        register_algorithm(name, algorithm)
    yield
    for name in own:
        del ALGORITHMS[name]


@pytest.fixture
def configured(small):
    """``configured(algorithm, section={...})``: all five clients in every round."""
    tables = {**small, "sampling": {"clients_per_round": 5}}

    def make(name, **changes):
        tables["algorithm"] = {"name": name, "variant": "fmnist", "penalty": 0.05}
        return resolve_config(deep_merge(tables, changes))

    return make


def test_a_bad_upload_is_in_the_metrics_and_in_nothing_else(configured, tmp_path, capsys):
    summary = run(configured("broken", rounds=2), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    for line in lines:
        assert [r["client"] for r in line["rejected"]] == [0]
        assert "'conv1.threshold' has entries that are not finite" in line["rejected"][0]["reason"]
        assert line["train_loss"] < 10  # client 0's word is not taken for its loss either
        assert line["cost"]["payload"]["up_bytes"] == 5 * 4 * 580 * (line["round"] + 1)  # it was sent all the same
    assert summary["rejected_uploads"] == 2
    server, _ = final_tensors(tmp_path / "run")
    assert all(torch.isfinite(t).all() for t in server.values())
    told = capsys.readouterr().err
    assert told.count("upload of client 0 left out") == 2 and told.count("spafl: ") == 2


@pytest.mark.parametrize("aggregation", ["median", "trimmed-mean"])
def test_robust_aggregation_keeps_extreme_thresholds_out_of_a_run(configured, tmp_path, aggregation):
    options = {"aggregation": aggregation, "trim": 0.25}
    run(configured("hostile", rounds=1, algorithm=options), tmp_path / "robust", quiet=True)
    run(configured("hostile", rounds=1), tmp_path / "mean", quiet=True)
    robust, mean = final_tensors(tmp_path / "robust")[0], final_tensors(tmp_path / "mean")[0]
    assert all(t.abs().max() < 10 for t in robust.values())
    assert all(t.abs().min() > 100 for name, t in mean.items() if name.endswith("threshold"))


def test_too_few_uploads_stop_the_run_in_one_line(configured, tmp_path, capsys):
    with pytest.raises(TooFewUploads, match="round 1: 4 of 5 uploads are good"):
        run(configured("broken", sampling={"min_uploads": 5}), tmp_path / "run")
    config = tmp_path / "c.toml"
    config.write_text(configured("broken", sampling={"min_uploads": 5}).to_toml())
    assert main(["run", str(config), "--out", str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("spafl: error: round 1: 4 of 5") and said.count("\n") == 1
    with pytest.raises(UserError, match="min_uploads: 6 uploads cannot come from"):
        configured("broken", sampling={"min_uploads": 6})


@pytest.mark.parametrize("name", ["spafl", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fedavg", "local"))])
def test_encoded_runs_resume_to_the_bit_with_other_workers(small, tmp_path, name):
    if name != "spafl":
        small["algorithm"] = {"name": name}
    small = deep_merge(small, {"communication": {"encoding": "int8"}, "evaluation": {"train_data": "never"}})
    run(resolve_config(small), tmp_path / "whole", quiet=True)
    run(resolve_config(deep_merge(small, {"rounds": 2})), tmp_path / "parts", quiet=True)
    run(
        resolve_config(deep_merge(small, {"simulation": {"workers": 1 + (name == "spafl")}})),
        tmp_path / "parts",
        resume=True,
        quiet=True,
    )
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rows = final_tensors(tmp_path / "whole")[1].values()
    lost = any(tensor.any() for row in rows for name, tensor in row.items() if name.startswith("feedback."))
    assert lost == (name != "local")
    with pytest.raises(UserError, match=r"communication\.encoding is 'int8' there and 'fp16' here"):
        run(resolve_config(deep_merge(small, {"communication": {"encoding": "fp16"}})), tmp_path / "whole", resume=True)


@pytest.mark.parametrize(("encoding", "per_entry"), [("fp32", 4), ("fp16", 2), ("int8", 1)])
def test_an_encoding_is_paid_as_it_travels_and_stays_near(small_config, tmp_path, encoding, per_entry):
    config = small_config(communication={"encoding": encoding}, rounds=2)
    run(config, tmp_path / "run", quiet=True)
    cost = metrics(tmp_path / "run")[-1]["cost"]
    scales = 0 if encoding == "fp32" else 4 * 4  # one per layer
    assert cost["payload"]["up_bytes"] == 6 * (580 * per_entry + scales)
    assert cost["payload"]["down_bytes"] == (3 + 6) * 4 * 580
    if encoding != "fp32":
        run(small_config(rounds=2), tmp_path / "exact", quiet=True)
        exact, got = final_tensors(tmp_path / "exact")[0], final_tensors(tmp_path / "run")[0]
        for name in (n for n in exact if n.endswith(".threshold")):
            apart = (exact[name] - got[name]).abs().max()
            assert 0 < apart < 0.05 * exact[name].abs().max()


def test_uploads_that_change_their_form_are_refused_an_encoding_before_work(small, tmp_path):
    small["algorithm"] = {"name": "restless"}
    with pytest.raises(UserError, match=r"communication\.encoding: int8 .* change their form from round to round"):
        run(resolve_config(deep_merge(small, {"communication": {"encoding": "int8"}})), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_encoding_is_refused(small_config):
    with pytest.raises(UserError, match=r"communication\.encoding: one of fp32, fp16, int8; got 'int4'"):
        small_config(communication={"encoding": "int4"})

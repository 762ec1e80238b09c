"""Whole small runs: reproducible, resumable, the same for any number of workers, honest about cost."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from spafl.algorithms import SpaFL
from spafl.cli import main
from spafl.client_results import results_path
from spafl.config import deep_merge, resolve_config
from spafl.errors import UserError
from spafl.report.run_data import load_run
from spafl.simulation import run, sample_clients
from spafl.simulation.checkpoint import load_latest


def metrics(folder):
    """The metrics without what may differ between equal runs: the seconds."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["cost"]["seconds"]
    return lines


def final_tensors(folder):
    checkpoint = load_latest(folder / "checkpoints")
    files = sorted((checkpoint.path / "clients").iterdir())
    return checkpoint.server, {file.name: load_file(file) for file in files}


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    (server_a, clients_a), (server_b, clients_b) = final_tensors(a), final_tensors(b)
    assert server_a.keys() == server_b.keys() and clients_a.keys() == clients_b.keys()
    for name in server_a:
        assert torch.equal(server_a[name], server_b[name]), name
    for client in clients_a:
        for name in clients_a[client]:
            assert torch.equal(clients_a[client][name], clients_b[client][name]), (client, name)


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param({"name": "spafl", "variant": "fmnist", "penalty": 0.05}, id="fmnist"),
        pytest.param({"name": "spafl", "variant": "cifar10", "penalty": 0.05}, id="cifar10", marks=pytest.mark.slow),
        pytest.param({"name": "fedavg"}, id="fedavg", marks=pytest.mark.slow),
        pytest.param({"name": "local"}, id="local", marks=pytest.mark.slow),
    ],
)
def test_two_workers_give_the_bits_of_one(small, tmp_path, algorithm):
    from spafl.config import deep_merge, resolve_config

    del small["algorithm"]
    tables = deep_merge(small, {"algorithm": algorithm})
    for workers in (1, 2):
        run(resolve_config(deep_merge(tables, {"simulation": {"workers": workers}})), tmp_path / str(workers))
    assert_same_run(tmp_path / "1", tmp_path / "2")


def test_the_metrics_hold_what_they_promise(small_config, tmp_path):
    summary = run(small_config(), tmp_path / "run")
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    first, last = lines[0]["cost"], lines[2]["cost"]
    thresholds = 580
    assert first["paper"]["communication_bits"] == 2 * 3 * 32 * thresholds
    assert first["payload"] == {"up_bytes": 3 * 4 * thresholds, "down_bytes": 3 * 4 * thresholds}
    # From round 1 on a sampled client needs the thresholds and their change.
    assert last["payload"] == {"up_bytes": 9 * 4 * thresholds, "down_bytes": (3 + 6 + 6) * 4 * thresholds}
    assert last["framed"]["up_bytes"] > last["payload"]["up_bytes"]
    evaluation = lines[2]["evaluation"]
    results = [json.loads(text) for text in results_path(tmp_path / "run", 2).read_text().splitlines()]
    assert [result["client"] for result in results] == list(range(5)) and evaluation["clients"] == 5
    assert evaluation["accuracy"]["worst_10pct"] == min(result["accuracy"] for result in results)
    assert evaluation["train_accuracy"] == pytest.approx(sum(result["train_accuracy"] for result in results) / 5)
    widths = {"conv1": 20, "conv2": 50, "fc3": 500, "fc4": 10}
    assert lines[2]["density"]["layers"].keys() == widths.keys()
    assert all({n: len(mask) for n, mask in r["masks"].items()} == widths for r in results)
    assert load_run(tmp_path / "run").masks.everywhere.shape == (5, 580)
    assert summary["final"] == lines[2] and summary["completed"]
    assert not (tmp_path / "run" / ".scratch").exists() and not (tmp_path / "run" / ".lock").exists()


def test_announcements_reach_every_client_and_are_paid_for(small_config, tmp_path):
    config = small_config(algorithm={"variant": "cifar10"}, training={"drop_last": False})
    run(config, tmp_path / "run")
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["cost"]["payload"]["down_bytes"] == (3 + 5) * 4 * 580


def test_checkpoints_hold_only_clients_that_have_trained(small_config, tmp_path):
    config = small_config(rounds=20, algorithm={"variant": "cifar10"}, sampling={"clients_per_round": 1})
    run(config.model_copy(update={"rounds": 2}), tmp_path / "run")
    trained = {f"{k:05d}.safetensors" for r in range(2) for k in sample_clients(config, r)}
    assert {file.name for file in load_latest(tmp_path / "run" / "checkpoints").path.glob("clients/*")} == trained


@pytest.mark.parametrize(
    "algorithm",
    [
        {"variant": "fmnist", "collapse_floor": 0.9, "penalty": 3},  # the guard acts all the time
        {"variant": "cifar10", "collapse_floor": 0.9, "penalty": 3},
        {"variant": "cifar10", "collapse_floor": "off"},
    ],
    ids=lambda options: f"{options['variant']}-{options['collapse_floor']}",
)
def test_rare_evaluation_changes_no_training(small_config, tmp_path, algorithm):
    """Neither the guard nor announcements that wait for their client make a run depend on when it is tested."""
    changes = {"rounds": 4, "training": {"lr": 0.05}, "algorithm": algorithm}
    run(small_config(**changes), tmp_path / "often")
    run(small_config(**changes, evaluation={"every": 4}), tmp_path / "rarely")
    assert metrics(tmp_path / "often")[-1] == metrics(tmp_path / "rarely")[-1]
    (server_a, clients_a), (server_b, clients_b) = final_tensors(tmp_path / "often"), final_tensors(tmp_path / "rarely")
    assert all(torch.equal(server_a[name], server_b[name]) for name in server_a)
    for client in clients_a:
        assert all(torch.equal(clients_a[client][name], clients_b[client][name]) for name in clients_a[client])


def test_a_killed_run_resumes_bit_for_bit(small_config, tmp_path):
    config = small_config(rounds=6, simulation={"checkpoint_every": 2, "workers": 2}, algorithm={"variant": "cifar10"})
    run(small_config(rounds=6, algorithm={"variant": "cifar10"}), tmp_path / "whole")
    (tmp_path / "c.toml").write_text(config.to_toml())
    command = [sys.executable, "-m", "spafl.cli", "run", str(tmp_path / "c.toml"), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, start_new_session=True)
    path = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= 3:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists(), "the run ended before it could be killed"
    # A line the kill cut in half must not hurt.
    with path.open("a") as file:
        file.write('{"round": 5, "samp')
    done = subprocess.run([*command, "--resume", "--no-report"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_run_can_be_extended(small_config, tmp_path):
    run(small_config(rounds=2), tmp_path / "run")
    run(small_config(rounds=3), tmp_path / "run", resume=True)
    run(small_config(rounds=3), tmp_path / "straight")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def test_folders_in_use_or_of_another_run_are_refused(small_config, tmp_path):
    from spafl.simulation import RunFolder

    run(small_config(rounds=1), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="already holds a run"):
        run(small_config(rounds=1), tmp_path / "run")
    with pytest.raises(UserError, match=r"another configuration: training\.lr is 0\.02 there and 0\.5 here"):
        run(small_config(rounds=2, training={"lr": 0.5}), tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="holds no run to resume"):
        run(small_config(), tmp_path / "other", resume=True)
    assert not (tmp_path / "other").exists()
    held = RunFolder(tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="in use by another process"):
        run(small_config(rounds=2), tmp_path / "run", resume=True)
    held.close()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_corrupt_checkpoint_is_named(small_config, tmp_path):
    run(small_config(rounds=1), tmp_path / "run")
    server = next((tmp_path / "run" / "checkpoints").glob("round-*/server.safetensors"))
    server.write_bytes(server.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"server\.safetensors is corrupt"):
        run(small_config(rounds=2), tmp_path / "run", resume=True)


def test_a_diverging_client_is_named_and_the_state_kept(small_config, tmp_path):
    run(small_config(rounds=1), tmp_path / "run")
    kept = load_latest(tmp_path / "run" / "checkpoints").path
    config = small_config(training={"lr": 1e30})
    with pytest.raises(FloatingPointError, match=r"loss of client \d became \S+ in round \d"):
        run(config, tmp_path / "diverged")
    assert kept.exists()


def burst(client):
    with torch.no_grad():
        next(client.model.parameters()).mul_(math.inf)


class Bursting(SpaFL):
    def train(self, client, message, round):
        if round == 2:
            burst(client)
        return super().train(client, message, round)


class BurstingUnseen(SpaFL):
    """At the end of a turn, when its losses were seen."""

    def train(self, client, message, round):
        training = super().train(client, message, round)
        if round == 2:
            burst(client)
        return training


@pytest.mark.parametrize(
    ("algorithm", "where", "done"),
    [
        ("Bursting", "loss of client . became nan in round 3, step 1", 2),
        pytest.param(
            "BurstingUnseen", r"(test )?loss of client . became nan in round 4(, step 1)?", 3, marks=pytest.mark.slow
        ),
    ],
)
def test_a_divergence_between_evaluations_ends_in_one_line(small, tmp_path, capsys, algorithm, where, done):
    small = deep_merge(small, {"partition": {"clients": 2, "min_train": 4}, "data": {"train": 20, "test": 10}})
    small = deep_merge(small, {"rounds": 6, "sampling": {"clients_per_round": 1}, "evaluation": {"every": 2}})
    small["algorithm"]["name"] = f"test_simulation:{algorithm}"
    small["simulation"]["checkpoint_every"] = 50
    (tmp_path / "burst.toml").write_text(resolve_config(small).to_toml())
    command = ["run", str(tmp_path / "burst.toml"), "--out", str(tmp_path / "run"), "--no-report", "--quiet"]
    assert main(command) == 2
    err = capsys.readouterr().err
    help = "; a smaller training.lr or a training.max_grad_norm may help; "
    assert re.fullmatch(f"spafl: error: the {where}{help}{done} of 6 rounds are finished and saved\n", err), err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"round-{done - 1:06d}"]


def test_a_lone_sample_under_batch_norm_is_refused_before_work(small_config, tmp_path):
    config = small_config(
        data={"image": 32, "channels": 3},
        model={"name": "conv4"},
        partition={"scheme": "iid", "alpha": "off", "min_train": 1},
        training={"batch_size": 31},
    )
    with pytest.raises(UserError, match="a batch of one sample is left"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_published_sampling_ignores_the_seed(small_config):
    streams = [
        [sample_clients(small_config(seed=seed, sampling={"stream": stream}), r) for r in range(4)]
        for stream in ("published-cifar100", "seeded")
        for seed in (1, 2)
    ]
    assert streams[0] == streams[1] and streams[2] != streams[3]
    assert all(len(set(chosen)) == 3 for chosen in streams[2])


def test_a_sample_of_the_clients_is_tested_in_every_evaluation(small_config, tmp_path):
    from folders import client_values

    from spafl.report.run_data import load_run
    from spafl.simulation.sampling import evaluated_clients

    config = small_config(evaluation={"clients": 2})
    run(config, tmp_path / "some", quiet=True)
    run(small_config(), tmp_path / "all", quiet=True)
    some, every = client_values(tmp_path / "some"), client_values(tmp_path / "all")
    assert [(r, k) for r, k, _ in some] == [(r, k) for r in range(3) for k in evaluated_clients(config, r)]
    assert len({tuple(evaluated_clients(config, r)) for r in range(20)}) > 5  # drawn anew
    assert all(result in every for result in some) and len(every) == 15  # the same results, for fewer clients
    loaded = load_run(tmp_path / "some")
    assert loaded.accuracies.tolist() == [values["accuracy"] for r, _, values in some if r == 2]
    assert loaded.history is None and loaded.masks is None and len(loaded.gaps.gap) == 2
    assert load_run(tmp_path / "all").history[1].shape == (3, 5)


@pytest.mark.parametrize("clients", [0, 6, 2.0, True, "some", -1])
def test_how_many_are_tested_is_all_or_a_number(small_config, clients):
    with pytest.raises(UserError, match=r"evaluation\.clients: (all, or a whole number|6 clients cannot be drawn)"):
        small_config(evaluation={"clients": clients})

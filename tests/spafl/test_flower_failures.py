"""Distributed runs in which something breaks: what is lost, who is told, and that the rest has the simulator's bits."""

import fcntl
import json
import logging
import sys
import threading
import time

import numpy as np
import pytest
import torch
from test_flower_core import (
    Memory,
    assert_same_thresholds,
    client_tensors,
    error_of,
    online,
    problem,
    serve,
    server_tensors,
)
from test_outputs import documents, undescribed, validators
from test_outputs import schema as written_schema
from test_simulation import metrics
from torch import nn

from spafl.data import Dataset, Transform
from spafl.errors import UserError
from spafl.flower.client import ClientSide, Site
from spafl.flower.disk import ClientDisk
from spafl.flower.parcel import unpack
from spafl.flower.refusals import told
from spafl.flower.server import Coordinator
from spafl.simulation import RunFolder, loop, run
from spafl.simulation.checkpoint import load_latest
from spafl.wire import WireError

__all__ = ["problem"]  # a fixture


def replayed(config, out, simulator, monkeypatch):
    """The simulator with the participation that a run's metrics name: who trained when, and who was merged."""
    lines = metrics(out)
    merged = [set(line["merged"]) for line in lines]
    unmerged = [set() for _ in lines]
    for line in lines:
        for each in line["unmerged"]:
            unmerged[each["round"]].add(each["client"])
    original = loop.merge_replies

    def merge(algorithm, server, round, messages, replies, *more):
        return original(algorithm, server, round, messages, [r for r in replies if r.client in merged[round]], *more)

    monkeypatch.setattr(loop, "sample_clients", lambda config, round: sorted(merged[round] | unmerged[round]))
    monkeypatch.setattr(loop, "merge_replies", merge)
    run(config, simulator, quiet=True)


def assert_same_clients(out, state, simulator, clients):
    kept = load_latest(simulator / "checkpoints")
    for k in clients:
        row = kept.client(k) or {}
        mine = client_tensors(out, state, k).load(row).tensors
        assert row and all(torch.equal(row[name], mine[name]) for name in row), k


# -- lost on the way


def test_a_client_lost_after_it_trained_is_asked_again_and_only_answers(problem, tmp_path):
    config, lost = problem(rounds=2, algorithm={"variant": "cifar10"}, evaluation={"every": 9}), []

    def script(*now):
        if now == ("after", "train", 101, 1) and not lost:
            lost.append(now)
            raise ConnectionError("Node Unavailable")

    link, _ = serve(config, tmp_path / "run", tmp_path / "state", script)
    assert [line["merged"] for line in metrics(tmp_path / "run")] == [[0, 1, 2]] * 2
    assert not any(line["lost"] or line["unmerged"] for line in metrics(tmp_path / "run"))
    replies = [reply for kind, node, _, reply in link.traffic if (kind, node) == ("train", 101)]
    assert len(replies) == 3 and replies[1] == replies[2]
    assert any("client 1: Node Unavailable; it is asked again" in text for text in link.said)
    run(config, tmp_path / "simulator", quiet=True)
    assert_same_thresholds(tmp_path / "run", tmp_path / "simulator")


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 9])
@pytest.mark.parametrize("encoding", ["fp32", "int8"])
def test_turns_that_were_not_merged_are_in_the_metrics(problem, tmp_path, monkeypatch, every, encoding):
    """Client 1 trains in rounds 1 and 2, and nobody hears of it; the metrics say all that the simulator has to know."""
    config = problem(
        rounds=4, algorithm={"variant": "cifar10"}, evaluation={"every": every}, communication={"encoding": encoding}
    )

    def script(when, kind, node, round):
        if (when, kind, node) == ("after", "train", 101) and round in (1, 2):
            raise ConnectionError("Node Unavailable")

    serve(config, tmp_path / "run", tmp_path / "state", script)
    lines = metrics(tmp_path / "run")
    assert [line["merged"] for line in lines] == [[0, 1, 2], [0, 2], [0, 2], [0, 1, 2]]
    noted = {line["round"]: [each["round"] for each in line["unmerged"]] for line in lines}
    assert noted == ({0: [], 1: [1], 2: [2], 3: []} if every == 1 else {0: [], 1: [], 2: [], 3: [1, 2]})
    replayed(config, tmp_path / "run", tmp_path / "simulator", monkeypatch)
    assert_same_thresholds(tmp_path / "run", tmp_path / "simulator")
    assert_same_clients(tmp_path / "run", tmp_path / "state", tmp_path / "simulator", range(3))


@pytest.mark.slow
def test_a_restarted_server_still_knows_what_was_not_merged(problem, tmp_path, monkeypatch):
    config = problem(rounds=3, algorithm={"variant": "cifar10"}, evaluation={"every": 9})

    def lossy(when, kind, node, round):
        if (when, kind, node, round) == ("after", "train", 101, 1):
            raise ConnectionError("Node Unavailable")
        if (when, kind, node, round) == ("after", "train", 100, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(config, tmp_path / "run", tmp_path / "state", lossy)
    serve(config, tmp_path / "run", tmp_path / "state", resume=True)
    assert [line["unmerged"] for line in metrics(tmp_path / "run")] == [[], [], [{"client": 1, "round": 1}]]
    replayed(config, tmp_path / "run", tmp_path / "simulator", monkeypatch)
    assert_same_thresholds(tmp_path / "run", tmp_path / "simulator")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "when"),
    [
        (RunFolder, "append_metrics"),
        (Coordinator, "_save"),
        (Coordinator, "_replace_last"),
        (RunFolder, "write_results"),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_a_server_killed_while_it_merges_repeats_the_round_and_no_training(
    problem, tmp_path, monkeypatch, part, when, after
):
    config = problem(rounds=3, algorithm={"variant": "cifar10"})
    original, calls = getattr(part, when), []

    def kill(self, *given):
        calls.append(given)
        if len(calls) == 2 and not after:
            raise KeyboardInterrupt
        result = original(self, *given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(part, when, kill)
        with pytest.raises(KeyboardInterrupt):
            serve(config, tmp_path / "run", tmp_path / "state")
    link, _ = serve(config, tmp_path / "run", tmp_path / "state", resume=True)
    run(config, tmp_path / "simulator", quiet=True)
    assert_same_thresholds(tmp_path / "run", tmp_path / "simulator")
    assert_same_clients(tmp_path / "run", tmp_path / "state", tmp_path / "simulator", range(3))
    ours, theirs = metrics(tmp_path / "run"), metrics(tmp_path / "simulator")
    assert [a["evaluation"] for a in ours] == [b["evaluation"] for b in theirs]
    assert [line["merged"] for line in ours] == [[0, 1, 2]] * 3 and not any(line["unmerged"] for line in ours)
    assert not any(isinstance(reply, str) for _, _, _, reply in link.traffic)


# -- two nodes


def test_a_turn_waits_for_a_process_that_is_still_at_work(tmp_path):
    disk = ClientDisk(tmp_path, "3" * 32, 4)
    lock = disk.path.with_suffix(".lock")
    lock.parent.mkdir()
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(0.2, lambda: fcntl.flock(other, fcntl.LOCK_UN)).start()
        begin = time.monotonic()
        with disk.turn(60):
            assert time.monotonic() - begin >= 0.1


@pytest.mark.slow
def test_two_nodes_with_one_state_folder_are_told_apart_from_a_restart(problem, tmp_path):
    config = problem(rounds=3, evaluation={"every": 9})
    nodes = online(config, tmp_path / "state")
    nodes[200] = nodes[101]
    link, _ = serve(config, tmp_path / "run", tmp_path / "state", nodes=nodes)
    assert any("client 1 is here already, from the same folder" in text for text in link.said)
    refused = [error_of(reply) for _, _, raw, reply in link.traffic if "refused" in unpack(raw)[0]]
    assert len(refused) == 1 and "the server refused this client: client 1 is here already" in refused[0]
    assert [line["merged"] for line in metrics(tmp_path / "run")] == [[0, 1, 2]] * 3
    run(config, tmp_path / "simulator", quiet=True)
    assert_same_thresholds(tmp_path / "run", tmp_path / "simulator")


# -- disks


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".tested"])
def test_a_client_whose_disk_is_full_changes_nothing(problem, tmp_path, monkeypatch, suffix):
    """Its upload is not merged, the file stays as it was, and there is no half one; with space again it goes on."""
    config = problem(rounds=3, algorithm={"variant": "cifar10"}, evaluation={"every": 2})
    run_folder, state = tmp_path / "run", tmp_path / "state"
    seen = []

    def script(when, kind, node, round):
        if node != 101 or round != 1 or kind != ("train" if suffix == ".safetensors" else "evaluate"):
            return
        path = client_tensors(run_folder, state, 1).path
        if when == "before":
            path.with_suffix(f"{suffix}.part").symlink_to("/dev/full")
            seen.append(path.read_bytes())
        else:
            assert path.read_bytes() == seen[-1] and not path.with_suffix(f"{suffix}.part").is_symlink()

    serve(config, run_folder, state, script)
    lines = metrics(run_folder)
    gone = [*lines[1]["rejected"], *lines[1]["lost"]]
    assert [each["client"] for each in gone] == [1] and "cannot be written: No space left on device" in gone[0][
        "reason"
    ]
    assert str(tmp_path) not in gone[0]["reason"]
    if suffix == ".safetensors":
        assert [line["merged"] for line in lines] == [[0, 1, 2], [0, 2], [0, 1, 2]]
        assert not any(line["unmerged"] for line in lines)
    replayed(config, run_folder, tmp_path / "simulator", monkeypatch)
    assert_same_thresholds(run_folder, tmp_path / "simulator")
    assert_same_clients(run_folder, state, tmp_path / "simulator", range(3))


@pytest.mark.slow
def test_a_client_whose_state_is_damaged_is_left_out_and_nothing_is_overwritten(problem, tmp_path, monkeypatch):
    config = problem(rounds=2, algorithm={"variant": "cifar10"}, evaluation={"every": 9})
    broken = {}

    def script(when, kind, node, round):
        if (when, kind, node, round) == ("before", "train", 101, 1):
            path = client_tensors(tmp_path / "run", tmp_path / "state", 1).path
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)
            broken[path] = bytes(raw)

    serve(config, tmp_path / "run", tmp_path / "state", script)
    line = metrics(tmp_path / "run")[1]
    assert line["merged"] == [0, 2] and line["rejected"][0]["client"] == 1
    assert "client state client-00001.safetensors is damaged" in line["rejected"][0]["reason"]
    assert all(path.read_bytes() == raw for path, raw in broken.items()) and broken
    replayed(config, tmp_path / "run", tmp_path / "simulator", monkeypatch)
    assert_same_thresholds(tmp_path / "run", tmp_path / "simulator")


# -- what refusals tell


def rows():
    """A table that its owner's code cannot read."""
    raise ValueError("row 7: 'Jane Doe, 1970' is not a number")


def test_refusals_tell_nothing_of_a_clients_data_or_folders(problem, tmp_path, caplog):
    with pytest.raises(UserError, match="Jane Doe") as caught:
        ClientSide(Site(problem(), "test_flower_failures:rows", tmp_path), 0)
    assert told(caught.value) == "data: test_flower_failures:rows failed: ValueError; the client's log says more"
    assert told(RuntimeError("Jane")) == "RuntimeError; the client's log says more"
    assert told(UserError("client state /srv/a b/x/c.safetensors is in use")).endswith("c.safetensors is in use")
    assert told(WireError("of round 1/2; see https://x.org/a, ~/x")) == "of round 1/2; see https://x.org/a, ~x"
    assert told(UserError("")) == "UserError"
    side = ClientSide(Site(problem(), None, tmp_path / "state"), 0)
    with caplog.at_level(logging.ERROR, "flwr"):
        assert "not a SpaFL parcel" in error_of(side.answer("train", b"junk"))
    assert "not a SpaFL parcel" in caplog.text


@pytest.mark.slow
def test_an_error_of_the_owners_code_is_told_by_its_kind_alone(problem, tmp_path, caplog):
    config = problem(rounds=1, flower={"start_clients": 2})
    nodes = online(config, tmp_path / "state")
    nodes[101] = (*nodes[101], "test_flower_failures:rows")
    with caplog.at_level(logging.ERROR, "flwr"):
        link, _ = serve(config, tmp_path / "run", tmp_path / "state", nodes=nodes)
    assert any("rows failed: ValueError" in text for text in link.said) and "Jane" in caplog.text
    assert not any("Jane" in text for text in link.said)
    assert not any(b"Jane" in reply for _, _, _, reply in link.traffic)


def lone():
    """Nine samples: with a batch size of 8 the last batch is of one."""
    images, labels = np.zeros((9, 1, 28, 28), dtype=np.float32), np.arange(9)
    return Dataset("lone", images, labels, images, labels, 10, Transform())


class Normed(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


@pytest.mark.slow
def test_samples_that_cannot_be_normalised_are_refused_before_any_round(problem, tmp_path):
    config = problem(model={"name": "test_flower_failures:Normed"}, training={"batch_size": 8, "drop_last": False})
    with pytest.raises(
        UserError, match=r"client 2 has 9 samples, so with batch_size = 8 a batch of one sample is left"
    ):
        ClientSide(Site(config, "test_flower_failures:lone", tmp_path), 2)


# -- machines that differ


class Elsewhere(Memory):
    """Client 1 computes with other instructions, as it says."""

    def answer(self, kind, node, raw):
        self.monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NEON" if node == 101 else "AVX2")
        return super().answer(kind, node, raw)


@pytest.mark.slow
def test_clients_that_compute_differently_are_named(problem, tmp_path, monkeypatch):
    link = type("Patched", (Elsewhere,), {"monkeypatch": monkeypatch})
    link, summary = serve(problem(rounds=1), tmp_path / "run", tmp_path / "state", link=link)
    version = torch.__version__
    alike = {f"AVX2, PyTorch {version}": [0, 2], f"NEON, PyTorch {version}": [1]}
    assert summary["environment"]["clients"] == alike
    assert any("clients compute differently" in text and "NEON" in text for text in link.said)


# -- what a run may consist of


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "spafl"])
def test_numbers_as_targets(problem, tmp_path, monkeypatch, algorithm):
    from spafl.cli import main

    rng = np.random.default_rng(5)
    x = rng.normal(size=(120, 3))
    lines = [f"{a},{b},{c},{a - b}" for a, b, c in x]
    (tmp_path / "prices.csv").write_text("\n".join(["a,b,c,price", *lines]) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    from test_regression import NET

    (tmp_path / "pricenet.py").write_text(NET)
    sys.modules.pop("pricenet", None)
    from spafl.config import resolve_config

    config = resolve_config({
        "name": "prices", "rounds": 2, "seed": 2,
        "data": {"name": "csv", "file": str(tmp_path / "prices.csv"), "options": {"target": "price"}},
        "partition": {"clients": 3, "alpha": 2.0, "min_train": 8, "min_test": 3},
        "model": {"name": "pricenet:Net"}, "algorithm": {"name": algorithm},
        "training": {"lr": 0.05, "batch_size": 8, "epochs": 1, "loss": "huber"},
        "sampling": {"clients_per_round": 3}, "evaluation": {"tolerance": 0.25},
        "simulation": {"workers": 1, "engine": "masked"}, "flower": {"patience": 0},
    })  # fmt: skip
    serve(config, tmp_path / "run", tmp_path / "state")
    run(config, tmp_path / "simulator", quiet=True)
    assert_same_thresholds(tmp_path / "run", tmp_path / "simulator")
    if algorithm == "fedavg":
        assert main(["export", str(tmp_path / "run"), "--client", "1", "--allow-code"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_an_algorithm_of_ones_own(small, problem, tmp_path):
    small["algorithm"].clear()
    config = problem(rounds=2, algorithm={"name": "toy_algorithm:ToyHeteroFL"})
    serve(config, tmp_path / "run", tmp_path / "state")
    run(config, tmp_path / "simulator", quiet=True)
    assert_same_thresholds(tmp_path / "run", tmp_path / "simulator")
    assert [a["evaluation"] for a in metrics(tmp_path / "run")] == [
        b["evaluation"] for b in metrics(tmp_path / "simulator")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["local", "fedavg", "spafl"])
def test_float64_has_the_bits_of_the_simulator(small, problem, tmp_path, algorithm):
    """The dtype in which the last bits of a product depend on where its factors begin."""
    small["algorithm"].clear()
    config = problem(rounds=2, algorithm={"name": algorithm}, training={"dtype": "float64"})
    serve(config, tmp_path / "run", tmp_path / "state")
    run(config, tmp_path / "simulator", quiet=True)
    assert server_tensors(tmp_path / "run").keys() == server_tensors(tmp_path / "simulator").keys()
    assert_same_thresholds(tmp_path / "run", tmp_path / "simulator")
    if algorithm != "fedavg":
        assert_same_clients(tmp_path / "run", tmp_path / "state", tmp_path / "simulator", range(3))


def test_private_tensors_are_read_into_memory_of_their_own(tmp_path):
    initial = {"a": torch.rand(3), "b": torch.rand(5, 7), "c": torch.rand(1)}
    disk = ClientDisk(tmp_path, "4" * 32, 0)
    with disk.turn():
        disk.save(disk.load(initial))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in disk.load(initial).tensors.values())


@pytest.mark.slow
def test_the_files_of_a_distributed_run_are_what_the_schema_says(problem, tmp_path):
    def script(when, kind, node, round):
        if (when, kind, node, round) == ("after", "train", 101, 1):
            raise ConnectionError("Node Unavailable")

    serve(problem(rounds=2), tmp_path / "run", tmp_path / "state", script)
    checks, whole = validators(), written_schema()
    kinds = {"line": whole, **{name: whole["$defs"][name] for name in ("client", "partition", "summary")}}
    seen = set()
    for kind, document in documents(tmp_path / "run"):
        checks[kind].validate(document)
        assert list(undescribed(document, kinds[kind], whole, kind)) == []
        seen.add(kind)
    assert seen == set(kinds)
    assert json.loads((tmp_path / "run" / "partition.json").read_text())["normalisation"] is None

"""Distributed runs over a link in memory: what is refused is refused on both sides; models stay with their clients."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_flower_core import (
    ALGORITHMS,
    REGISTERED,
    Memory,
    assert_same_thresholds,
    error_of,
    online,
    problem,
    serve,
    server_tensors,
)
from test_simulation import metrics

from spafl.cli import main
from spafl.data import Dataset, Transform
from spafl.errors import UserError
from spafl.export import client_model
from spafl.flower import client as client_module
from spafl.flower import roster as roster_module
from spafl.flower.client import ClientSide, Site
from spafl.flower.parcel import unpack
from spafl.merge import TooFewUploads
from spafl.simulation import run
from spafl.simulation.checkpoint import load_latest

__all__ = ["problem"]  # a fixture


def state_files(state):
    return {path.name: path.read_bytes() for path in sorted(state.rglob("client-*.safetensors"))}


def errors(link):
    """What clients said when they refused, and were told, by node."""
    told = {}
    for _, node, _, reply in link.traffic:
        if "error" in unpack(reply)[0]:
            told.setdefault(node, []).append(error_of(reply))
    return told


class Recorded(Memory):
    """Keeps itself where a test finds it although the server raised."""

    def __init__(self, *given):
        super().__init__(*given)
        Recorded.last = self


# -- refused on both sides, nothing changed


def test_too_few_clients_are_told_why_nothing_starts(problem, tmp_path):
    config = problem(rounds=1)
    nodes = online(config, tmp_path / "state")
    del nodes[101]
    with pytest.raises(UserError, match=r"flower\.start_clients: 3 clients are needed to start; 2 came within"):
        serve(config, tmp_path / "run", tmp_path / "state", nodes=nodes, link=Recorded)
    for node in nodes:
        assert "the server stopped the run: flower.start_clients: 3 clients" in errors(Recorded.last)[node][-1]
    assert not (tmp_path / "run" / "config.toml").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert all(b'"trained":"-1"' in raw for raw in state_files(tmp_path / "state").values())


@pytest.mark.parametrize("side", [client_module, roster_module])
def test_another_release_is_refused(problem, tmp_path, monkeypatch, side):
    """Its own or the server's: neither side goes on."""
    monkeypatch.setattr(side, "__version__", "9.9")
    config = problem(rounds=1)
    with pytest.raises(UserError, match=r"refused: the client refuses: the server runs version .* of spafl"):
        serve(config, tmp_path / "run", tmp_path / "state", link=Recorded)
    assert len(errors(Recorded.last)) == 3 and not state_files(tmp_path / "state")
    assert not (tmp_path / "run" / "config.toml").exists()


def other():
    """Data of a client that has other classes than the others."""
    images = np.zeros((40, 1, 28, 28), dtype=np.float32)
    return Dataset("other", images, np.arange(40) % 4, images, np.arange(40) % 4, 4, Transform())


def nothing():
    """Data of a client that has none to train on."""
    images, labels = np.zeros((10, 1, 28, 28), dtype=np.float32), np.arange(10)
    return Dataset("nothing", images[:0], labels[:0], images, labels, 10, Transform())  # refuses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "server_says", "client_says"),
    [
        (nothing, "the client refuses: data: test_flower_sites:nothing failed", "nothing: the train part is empty"),
        (other, "client 1 differs from the run in outputs", "the server refused this client: client 1 differs"),
    ],
)
def test_a_client_whose_data_do_not_fit_is_left_out(problem, tmp_path, data, server_says, client_says):
    config = problem(rounds=1, flower={"start_clients": 2})
    nodes = online(config, tmp_path / "state")
    nodes[101] = (*nodes[101], f"test_flower_sites:{data.__name__}")
    link, _ = serve(config, tmp_path / "run", tmp_path / "state", nodes=nodes)
    assert any(server_says in text for text in link.said)
    assert any(client_says in text for text in errors(link)[101])
    line = metrics(tmp_path / "run")[0]
    assert line["merged"] == [0, 2] and line["absent"] == [1]
    assert not any(b'"trained":"0"' in raw for name, raw in state_files(tmp_path / "state").items() if "00001" in name)


def test_another_model_than_the_servers_is_refused(problem, tmp_path, monkeypatch):
    """Of one configuration, but of other code."""
    config = problem(rounds=1)
    original = client_module.build_method

    def other(*given):
        method = original(*given)
        method.uplink = dataclasses.replace(method.uplink, model=method.uplink.model ^ 1)
        return method

    monkeypatch.setattr(client_module, "build_method", other)
    with pytest.raises(UserError, match="clients have another model than the server: fingerprint"):
        serve(config, tmp_path / "run", tmp_path / "state", link=Recorded)
    for node in (100, 101, 102):
        assert "the server stopped the run: clients have another model" in errors(Recorded.last)[node][-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert all(b'"trained":"-1"' in raw for raw in state_files(tmp_path / "state").values())


class Replays(Memory):
    """From round 1 on, node 101 sends the upload of round 0 once more; ``all`` of them do."""

    everybody = False

    def answer(self, kind, node, raw):
        reply = super().answer(kind, node, raw)
        kept = self.__dict__.setdefault("kept", {})
        if kind != "train":
            return reply
        return kept.setdefault(node, reply) if node == 101 or self.everybody else reply


class AllReplay(Replays):
    everybody = True


def test_a_replayed_upload_is_not_merged(problem, tmp_path, monkeypatch):
    import spafl.simulation.loop as loop

    config = problem(rounds=2, evaluation={"every": 9})
    serve(config, tmp_path / "run", tmp_path / "state", link=Replays)
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[0]["cost"]["seconds"]["train"] < lines[1]["cost"]["seconds"]["train"]
    line = lines[1]
    assert line["merged"] == [0, 2] and [entry["client"] for entry in line["rejected"]] == [1]
    assert "of round 1; round 2 was expected" in line["rejected"][0]["reason"]
    monkeypatch.setattr(loop, "sample_clients", lambda config, round: [[0, 1, 2], [0, 2]][round])
    run(config, tmp_path / "simulator", quiet=True)
    assert_same_thresholds(tmp_path / "run", tmp_path / "simulator")


@pytest.mark.slow
def test_a_round_of_replays_stops_the_run_and_clients_know_why(problem, tmp_path):
    config = problem(rounds=2, evaluation={"every": 9})
    with pytest.raises(TooFewUploads, match="round 2: 0 of 3 uploads are good"):
        serve(config, tmp_path / "run", tmp_path / "state", link=type("Kept", (AllReplay, Recorded), {}))
    assert load_latest(tmp_path / "run" / "checkpoints").state.round == 0
    assert all("the server stopped the run: round 2" in told[-1] for told in errors(Recorded.last).values())
    assert len(errors(Recorded.last)) == 3


# -- engines and devices of one's own


@pytest.mark.slow
def test_each_client_may_have_its_own_engine(problem, tmp_path):
    config = problem(rounds=2)
    nodes = online(config, tmp_path / "state")
    for node, engine in zip(nodes, ("masked", "compact", "auto"), strict=True):
        own = config.model_copy(update={"simulation": config.simulation.model_copy(update={"engine": engine})})
        nodes[node] = (own, *nodes[node][1:])
    link, _ = serve(config, tmp_path / "run", tmp_path / "state", nodes=nodes)
    assert metrics(tmp_path / "run")[-1]["merged"] == [0, 1, 2] and not errors(link)
    run(config, tmp_path / "simulator", quiet=True)
    ours, theirs = server_tensors(tmp_path / "run"), server_tensors(tmp_path / "simulator")
    for name, expected in theirs.items():  # engines differ by rounding alone
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(problem, tmp_path):
    with pytest.raises(UserError, match="cuda was asked for, but this PyTorch sees no CUDA device"):
        ClientSide(Site(problem(simulation={"device": "cuda"}), None, tmp_path), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_client_on_a_gpu_among_others(problem, tmp_path):
    config = problem(rounds=2)
    nodes = online(config, tmp_path / "state")
    own = config.model_copy(update={"simulation": config.simulation.model_copy(update={"device": "cuda"})})
    nodes[101] = (own, *nodes[101][1:])
    serve(config, tmp_path / "run", tmp_path / "state", nodes=nodes)
    run(config, tmp_path / "simulator", quiet=True)
    ours, theirs = server_tensors(tmp_path / "run"), server_tensors(tmp_path / "simulator")
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-4)


_SMALL_CLIENT = """
import json, sys
from spafl.flower.lean import without_triton
without_triton()
from pathlib import Path
from spafl.config import resolve_config
from spafl.flower.client import ClientSide, Site
from spafl.flower.parcel import unpack
from spafl.flower.roster import Roster
from spafl.wire import encode
config = resolve_config(json.loads(sys.argv[1]))
side, roster = ClientSide(Site(config, None, Path(sys.argv[2])), 0), Roster(config, "0" * 32)
server = side.method.algorithm.server_state(side.method.model)
frame = encode(side.method.algorithm.broadcast(server, 0, 0), 0, side.method.uplink.model)
head = {"client": 0, "round": 0, "first": 0, "rounds": []}
for kind in ("query", "train", "evaluate"):
    assert "error" not in unpack(side.answer(kind, roster.parcel(head, [frame])))[0]
print(*(name for name in ("sklearn", "matplotlib", "triton", "scipy") if sys.modules.get(name)))
"""


@pytest.mark.slow  # a process that imports PyTorch
def test_a_client_process_imports_nothing_it_does_not_need(problem, tmp_path):
    config = problem(simulation={"engine": "compact"})
    done = subprocess.run(
        [sys.executable, "-c", _SMALL_CLIENT, json.dumps(config.model_dump(mode="json", exclude_none=True)), tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# -- models are exported where they are


def exported(problem, tmp_path, algorithm):
    """Whether each client's model is what the simulator exports; and where it was found."""
    config = problem(algorithm=algorithm, rounds=2)
    serve(config, tmp_path / "run", tmp_path / "state")
    run(config, tmp_path / "simulator", quiet=True)
    folder = tmp_path / "state" / json.loads((tmp_path / "run" / "flower.json").read_text())["run"]
    places = set()
    for client in range(3):
        expected = client_model(tmp_path / "simulator", client)[0].state_dict()
        for place, path in (("client", folder), ("server", tmp_path / "run")):
            try:
                ours = client_model(path, client)[0].state_dict()
            except UserError as error:
                assert "export it" in str(error)
            else:
                places.add(place)
                wrong = [n for n in expected if not torch.equal(ours[n], expected[n])]
                assert ours.keys() == expected.keys() and not wrong, (place, wrong)
    return places


def test_a_clients_model_is_exported_at_the_client(small, problem, tmp_path, capsys):
    small["algorithm"].clear()
    assert exported(problem, tmp_path, ALGORITHMS["cifar10"]) == {"client"}
    (folder,) = (path for path in (tmp_path / "state").iterdir())
    assert main(["export", str(folder), "--client", "7"]) == 2
    assert "--client must be one whose state is in" in capsys.readouterr().err
    whole = (folder / "client-00001.tested").read_bytes()
    (folder / "client-00001.tested").write_bytes(whole[:-1])
    assert main(["export", str(folder), "--client", "1"]) == 2
    assert "the last test of client 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_every_algorithms_models_are_exported_somewhere(small, problem, tmp_path, name):
    small["algorithm"].clear()
    assert exported(problem, tmp_path, {"name": name})


@pytest.mark.slow
def test_the_command_writes_the_file_at_the_client(problem, tmp_path, capsys):
    serve(problem(rounds=1), tmp_path / "run", tmp_path / "state")
    (folder,) = (path for path in (tmp_path / "state").iterdir())
    assert main(["export", str(folder), "--client", "2"]) == 0
    assert "parameters" in capsys.readouterr().out and (folder / "export" / "client-2.pt2").exists()


# -- tables


@pytest.mark.slow
def test_a_table_takes_a_distributed_run_for_a_run(tmp_path, capsys):
    from test_table import EXPERIMENT

    from spafl.experiment import jobs_of, load_experiment

    path = tmp_path / "small.toml"
    path.write_text(EXPERIMENT.replace("rounds = 2", "rounds = 1"))
    job = next(job for job in jobs_of(load_experiment(path), [1], tmp_path / "runs") if job.row.label == "spafl")
    config = job.config.model_copy(update={"flower": job.config.flower.model_copy(update={"patience": 0.0})})
    serve(config, job.folder, tmp_path / "state")
    assert main(["table", str(path), "--no-run", "--methods", "spafl", "--runs", str(tmp_path / "runs")]) == 0
    assert "not made yet" not in capsys.readouterr().out
    assert job.state == "done"

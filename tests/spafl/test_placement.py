"""Where a run computes. Tables are made up but for one test of those that ship; no GPU is needed."""

import json

import pytest
import torch

from spafl.errors import UserError
from spafl.models import MODELS
from spafl.simulation import run
from spafl.simulation.placement import pick_device, pick_workers
from spafl_kernels.gpu.tables import FOLDER, engines, file_name

GPU = "made-up GPU"


def made_up(gpu=100.0, cpu=30.0, model="lenet5", batch=16):
    """At density 1 the GPU is ten times as fast as a CPU worker; at .5 as given."""
    speeds = {1.0: engines.Speeds(300.0, 30.0), 0.5: engines.Speeds(gpu, cpu)}
    return engines.Table(GPU, {"commit": "abc"}, {model: {batch: speeds}})


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    monkeypatch.delenv("SPAFL_TABLES", raising=False)
    engines.SHELF.forget()
    yield
    engines.SHELF.forget()


@pytest.fixture
def config(small_config):
    """A run of LeNet-5 with batches of 20 and three workers."""

    def make(device="auto", batch=20, engine="auto", workers=3):
        simulation = {"device": device, "engine": engine, "workers": workers}
        return small_config(simulation=simulation, training={"batch_size": batch})

    return make


@pytest.mark.parametrize(("asked", "got"), [(256, 6), (3, 3)])
def test_no_more_workers_are_started_than_there_are_clients(small_config, asked, got):
    many = small_config(simulation={"workers": asked}, partition={"clients": 6})
    assert pick_workers(many, torch.device("cpu")) == got


def test_the_tables_that_are_shipped(monkeypatch):
    monkeypatch.delenv("SPAFL_TABLES", raising=False)
    for path in (paths := sorted(FOLDER.glob("*.engines.json"))):
        table = engines.SHELF.load(path)
        assert path.name == file_name(table.device, "engines") and table.made["cpu"]
        for model, batches in table.entries.items():
            assert model in MODELS
            for densities in batches.values():
                assert {0.5, 1.0} <= densities.keys() and all(s.gpu > s.cpu > 0 for s in densities.values())
    assert paths


def test_without_a_table_the_cpu_runs_and_that_is_said(a_gpu, config):
    device, why = pick_device(config())
    assert device.type == "cpu"
    assert why == (
        "device cpu: no simulation was measured to be faster on this GPU (made-up GPU); "
        "simulation.device = cuda runs on the GPU"
    )


@pytest.mark.parametrize(
    ("table", "settings", "device", "words"),
    [
        (made_up(gpu=91), {}, "cuda", "device cuda: lenet5 at batch 16 and density 0.5 was measured to be faster on "
         "the GPU: 91 steps/s, and 90 of 3 CPU workers (made-up GPU, commit abc)"),
        # Faster when dense, not at every density; as fast is not faster.
        (made_up(gpu=90), {}, "cpu", "0.5 was measured to be not faster on the GPU: 90 steps/s, and 90 of 3 CPU"),
        (made_up(gpu=91), {"workers": 4}, "cpu", "91 steps/s, and 120 of 4 CPU workers"),
        (made_up(gpu=31), {"workers": 1}, "cuda", "31 steps/s, and 30 of 1 CPU worker (made"),
        (made_up(), {"batch": 15}, "cpu", "no speed of lenet5 was measured at batch 15 or below (made-up GPU"),
        (made_up(), {"batch": 4096}, "cuda", "at batch 16 "),
        (made_up(model="conv4"), {}, "cpu", "no speed of lenet5 was measured"),
        (made_up(), {"engine": "compact"}, "cpu", "are those of engine = auto, and this run has engine = compact"),
    ],
)  # fmt: skip
def test_auto_takes_the_gpu_only_where_it_was_measured_to_be_faster(a_gpu, config, table, settings, device, words):
    with engines.SHELF.using(table):
        got, why = pick_device(config(**settings))
    assert got.type == device and words in why and why.startswith(f"device {device}: ")


@pytest.mark.parametrize("wanted", ["cpu", "cuda"])
def test_a_device_that_is_asked_for_is_taken_whatever_was_measured(a_gpu, config, wanted):
    for table in (made_up(gpu=1000), made_up(gpu=1)):
        with engines.SHELF.using(table):
            assert pick_device(config(wanted)) == (torch.device(wanted), None)


def test_without_a_gpu_nothing_is_said_and_cuda_is_an_error(monkeypatch, config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with engines.SHELF.using(made_up(gpu=1000)):
        assert pick_device(config()) == (torch.device("cpu"), None)
    with pytest.raises(UserError, match=r"simulation\.device: cuda was asked for, but this PyTorch sees no CUDA"):
        pick_device(config("cuda"))


def test_a_table_is_read_from_the_folder_of_tables(a_gpu, monkeypatch, config, tmp_path):
    path = engines.SHELF.write(made_up(gpu=91), tmp_path)
    assert path.name == "made-up-gpu.engines.json"
    assert engines.SHELF.load(path) == made_up(gpu=91)
    monkeypatch.setenv("SPAFL_TABLES", str(tmp_path))
    assert pick_device(config())[0].type == "cuda"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"lenet5": {"many": {"1": {"gpu": 1, "cpu": 1}}}}, "a batch size must be an integer >= 1; got 'many'"),
        ({"lenet5": {"0": {"1": {"gpu": 1, "cpu": 1}}}}, "a batch size must be an integer >= 1; got '0'"),
        ({"lenet5": {"8": {}}}, "lenet5, batch 8: no density was measured"),
        ({"lenet5": {"8": {"2": {"gpu": 1, "cpu": 1}}}}, r"a density must be in \(0, 1\]; got 2"),
        ({"lenet5": {"8": {"x": {"gpu": 1, "cpu": 1}}}}, r"a density must be in \(0, 1\]; got 'x'"),
        ({"lenet5": {"8": {"1": {"gpu": 1}}}}, "speeds need gpu and cpu"),
        ({"lenet5": {"8": {"1": {"gpu": 1, "cpu": 0}}}}, "cpu must be steps per second, a number > 0; got 0"),
        ({"lenet5": {"8": {"1": {"gpu": True, "cpu": 1}}}}, "gpu must be steps per second, a number > 0; got True"),
    ],
)
def test_a_table_that_cannot_be_is_refused_in_words(a_gpu, monkeypatch, config, tmp_path, entries, message):
    file = {"format": 1, "device": GPU, "made": {}, "entries": entries}
    (tmp_path / "made-up-gpu.engines.json").write_text(json.dumps(file))
    monkeypatch.setenv("SPAFL_TABLES", str(tmp_path))
    with pytest.raises(UserError, match=f"simulation.device: .*is not a table of measured speeds: {message}"):
        pick_device(config())


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_says_where_it_computes(a_gpu, small_config, tmp_path, capsys, quiet):
    summary = run(small_config(rounds=1, simulation={"device": "auto"}), tmp_path / "run", quiet=quiet)
    assert summary["environment"]["device"] == "cpu"
    said = [line for line in capsys.readouterr().err.splitlines() if "device" in line]
    assert len(said) == (0 if quiet else 1)
    assert quiet or said[0].startswith("spafl: device cpu: no simulation was measured to be faster on this GPU")

"""Runs from Python: what a notebook or a script asks of them."""

import builtins
import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

import spafl
from spafl.cost import RECORDED
from spafl.report import ReportError

CONFIG = {
    "name": "small",
    "rounds": 2,
    "data": {"name": "digits"},
    "partition": {"scheme": "iid", "clients": 3},
    "model": {"name": "lenet5"},
    "algorithm": {"name": "spafl"},
    "training": {"epochs": 1, "batch_size": 128},
    "sampling": {"clients_per_round": 2},
    "evaluation": {"every": 2},
    "simulation": {"workers": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return spafl.run(CONFIG, tmp_path_factory.mktemp("api") / "run", seed=7, training={"lr": 0.02})


def test_settings_are_laid_over_the_configuration_one_by_one(finished):
    assert (finished.config.seed, finished.config.training.lr, finished.config.training.epochs) == (7, 0.02, 1)


def test_files_tables_and_configurations_say_the_same(finished, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(finished.config.to_toml())
    from spafl.api import _resolve

    assert _resolve(str(path), {}) == _resolve(path, {}) == _resolve(finished.config, {}) == finished.config
    for given in (path, CONFIG, finished.config):
        assert _resolve(given, {"training.lr": 0.5}).training.lr == 0.5


def test_the_frame_holds_the_rounds_as_recorded(finished):
    pytest.importorskip("pandas")
    frame = finished.frame()
    lines = [json.loads(text) for text in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert frame["round"].tolist() == [1, 2]
    assert frame["accuracy"].isna().tolist() == [True, False]
    assert frame["accuracy"].iloc[1] == lines[1]["evaluation"]["accuracy"]["mean"]
    assert frame["up_bytes"].tolist() == [line["cost"]["payload"]["up_bytes"] for line in lines]
    assert set(RECORDED) <= set(frame.columns)
    assert frame["density.conv1"].iloc[1] == lines[1]["density"]["layers"]["conv1"]


def test_clients_have_a_row_per_evaluated_round(finished):
    pytest.importorskip("pandas")
    frame = finished.clients()
    assert frame["round"].tolist() == [2, 2, 2] and frame["client"].tolist() == [0, 1, 2]
    assert frame["accuracy"].mean() == pytest.approx(finished.summary["final"]["evaluation"]["accuracy"]["mean"])
    assert frame["train_samples"].sum() + frame["test_samples"].sum() == 1797


def test_without_pandas_the_records_are_there_and_the_error_says_what_to_install(finished, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert [row["round"] for row in finished.records()] == [1, 2]
    with pytest.raises(spafl.UserError, match=r"need pandas \(pip install"):
        finished.frame()


def test_pictures_by_name(finished):
    for name in ("accuracy", "density", "partition"):
        assert finished.plot(name).axes
    assert finished.plot("accuracy")._repr_png_().startswith(b"\x89PNG")  # as notebooks show it
    assert len(finished.plot("accuracy", finished).axes[0].lines) == 2
    with pytest.raises(spafl.UserError, match="no picture 'loss'; there are accuracy_rounds"):
        finished.plot("loss")


def test_models_and_exports(finished, tmp_path):
    model = finished.model(client=1)
    exported = finished.export(client=1, out=tmp_path)
    x = torch.randn(3, 1, 28, 28)
    small = torch.export.load(str(exported.files[0])).module()
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_folder_is_read_back_and_a_damaged_one_refused_at_once(finished, tmp_path):
    again = spafl.load_run(finished.folder)
    assert again.records() == finished.records() and again.summary == finished.summary
    assert "small" in repr(again) and "<table" in again._repr_html_()
    with pytest.raises(ReportError, match="no such run folder"):
        spafl.load_run(tmp_path / "nothing")


def test_continuing(finished):
    longer = spafl.run(finished.config, finished.folder, resume=True, rounds=3)
    assert [row["round"] for row in longer.records()] == [1, 2, 3]


def test_the_front_door_is_light_and_knows_its_version():
    code = "import sys, spafl; print(spafl.__version__, 'torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [importlib.metadata.version("spafl-kernels"), "False", "False"]
    done = subprocess.run([sys.executable, "-m", "spafl", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == spafl.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        spafl.nothing  # noqa: B018


def test_the_command_names_what_the_simulator_lacks(monkeypatch, capsys):
    from spafl import __main__ as command

    wanted = [
        "torch>=2",
        'torch-of-nowhere>=1; extra == "sim"',
        'pytest>=8; extra == "sim"',
        'nothing-either; extra == "onnx"',
    ]
    monkeypatch.setattr(command.metadata, "requires", lambda name: wanted)
    assert command.missing() == ["torch-of-nowhere"]
    assert command.main() == 1
    assert "torch-of-nowhere not installed" in capsys.readouterr().err

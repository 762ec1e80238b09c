"""The command as a new user meets it: exit codes, one-line errors, nothing overwritten."""

import json
import os
import re
import subprocess
import sys
from importlib import resources

import pytest

from spafl.cli import main
from spafl.config import resolve_config


@pytest.fixture
def config_file(small, tmp_path):
    path = tmp_path / "small.toml"
    small["rounds"] = 1
    path.write_text(resolve_config(small).to_toml())
    return path


def fails(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("spafl: error: ") and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def test_run_then_report(config_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", str(config_file), "--out", str(out), "--set", "training.epochs=2"]) == 0
    printed = capsys.readouterr()
    assert "spafl" in printed.out and str(out / "report" / "report.html") in printed.out
    # Where there is no terminal, a line per round.
    (line,) = printed.err.splitlines()
    assert re.fullmatch(
        r"small: round 1 of 1, accuracy .*%, density .*, sent .* kB; \d\d:\d\d so far, 00:00 left", line
    )
    assert "epochs = 2" in (out / "config.toml").read_text()
    for name in ("metrics.jsonl", "summary.json", "partition.json", "report/report.html"):
        assert (out / name).stat().st_size > 0
    assert json.loads((out / "summary.json").read_text())["rounds"] == 1
    second = tmp_path / "second"
    quietly = ["--set", "seed=9", "--no-report", "--quiet"]
    assert main(["run", str(config_file), "--out", str(second), *quietly]) == 0
    assert capsys.readouterr().err == ""
    assert main(["report", str(out), str(second), "--out", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "report.html").exists()


def test_an_ascii_terminal_a_path_beyond_it_and_a_notebooks_backend(config_file, tmp_path):
    """A command of a notebook's ``!`` has its MPLBACKEND, whether or not that package is installed here."""
    out = tmp_path / "größe-é"
    places = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    places["MPLBACKEND"] = "module://of_another_environment"
    command = [sys.executable, "-m", "spafl", "run", str(config_file), "--out", str(out)]
    done = subprocess.run(command, env=places, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and done.stderr.isascii() and (out / "report" / "report.html").exists()


def test_mistakes(config_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert "does not exist" in fails(capsys, "run", tmp_path / "no.toml", "--out", out)
    assert "did you mean training.lr?" in fails(capsys, "run", config_file, "--out", out, "--set", "training.l=1")
    assert "--set takes section.key=value" in fails(capsys, "run", config_file, "--out", out, "--set", "lr")
    assert "28x28 images" in fails(capsys, "run", config_file, "--out", out, "--set", "data.image=32")
    assert "cuda" in fails(capsys, "run", config_file, "--out", out, "--device", "cuda")
    impossible = fails(capsys, "run", config_file, "--out", out, "--set", "partition.min_train=100")
    assert "partition: " in impossible and "500" in impossible
    published = resources.files("spafl").joinpath("configs/fmnist.toml")
    monkeypatch.setattr("spafl.data.files.SYSTEM", ())
    monkeypatch.delenv("SPAFL_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    missing = fails(capsys, "run", published, "--out", out, "--data-root", tmp_path)
    assert "train-images-idx3-ubyte" in missing and "get it with: " in missing
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(capsys, "run", config_file, "--out", tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    assert "not empty" in fails(capsys, "run", config_file, "--out", tmp_path / "full")
    assert (tmp_path / "full" / "precious").read_text() == "mine"


def test_a_diverging_run_is_an_error_and_keeps_its_state(config_file, tmp_path, capsys):
    out = tmp_path / "run"
    said = fails(capsys, "run", config_file, "--out", out, "--set", "training.lr=1e30", "--set", "rounds=3")
    assert "the loss of client" in said and "in round" in said
    assert (out / "config.toml").exists() and not (out / "summary.json").exists()


def test_a_report_of_nothing(tmp_path, capsys):
    assert "config.toml" in fails(capsys, "report", tmp_path)
    assert "no such run folder" in fails(capsys, "report", tmp_path / "none")


@pytest.mark.parametrize("algorithm", ["spafl", "fedavg"])
def test_export_of_a_client(small, tmp_path, capsys, algorithm):
    import torch

    from spafl.export import client_model

    if algorithm == "fedavg":
        small["algorithm"] = {"name": "fedavg"}
    else:
        small["algorithm"]["penalty"] = 2.0  # enough to prune within a few rounds
    path, out = tmp_path / "c.toml", tmp_path / "run"
    path.write_text(resolve_config(small).to_toml())
    assert main(["run", str(path), "--out", str(out), "--no-report"]) == 0
    capsys.readouterr()
    assert main(["export", str(out), "--client", "1", "--onnx"]) == 0
    printed = capsys.readouterr().out
    before, after = (int(n.replace(",", "")) for n in printed.split("parameters ")[1].split(";")[0].split(" -> "))
    assert after < before if algorithm == "spafl" else after == before
    model, image = client_model(out, 1)
    x = torch.randn(3, *image)
    loaded = torch.export.load(out / "export" / "client-1.pt2").module()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    assert (out / "export" / "client-1.onnx").stat().st_size > 1000


def test_export_mistakes(tmp_path, capsys):
    assert "not a run folder" in fails(capsys, "export", tmp_path, "--client", 0)

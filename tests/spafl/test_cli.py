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


@pytest.mark.slow
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
    said = fails(capsys, "report", tmp_path, "--accuracy", "a,b")
    assert "--accuracy must be numbers between commas, as .85,.9; got 'a,b'" in said


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
    assert main(["export", str(out), "--client", "1"]) == 0
    printed = capsys.readouterr().out
    before, after = (int(n.replace(",", "")) for n in printed.split("parameters ")[1].split(";")[0].split(" -> "))
    assert after < before if algorithm == "spafl" else after == before
    model, image = client_model(out, 1)
    x = torch.randn(3, *image)
    loaded = torch.export.load(out / "export" / "client-1.pt2").module()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    if algorithm == "spafl":
        check_predictions(out, model, tmp_path, capsys)


def check_predictions(run, model, tmp_path, capsys):
    """Stored bytes, pictures and a table give what the client's model gives; what does not fit is one sentence."""
    import numpy as np
    import onnx
    import torch
    from PIL import Image

    from spafl.config import load_run_config
    from spafl.simulation.problem import load_data

    again = ["export", run, "--client", 1, "--out", tmp_path / "bytes", "--onnx", "--normalise", "--opset", 18]
    assert main([str(a) for a in again]) == 0
    capsys.readouterr()
    data = load_data(load_run_config(run, None))
    x = data.test_x[:20]
    with torch.no_grad():
        odds = model(data.transform(torch.from_numpy(x))).softmax(1)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "pictures").mkdir()
    for at, image in enumerate(x[:3]):
        Image.fromarray(image[0]).save(tmp_path / "pictures" / f"{at}.png")
    files = {name: tmp_path / "bytes" / f"client-1.{name}" for name in ("onnx", "pt2")}
    files["plain"] = run / "export" / "client-1.pt2"
    for file in files.values():
        table = tmp_path / "table.csv"
        allow = ["--allow-code"] if file.suffix == ".pt2" else []
        command = ["predict", file, tmp_path / "x.npy", tmp_path / "pictures", "--top", 10, "--csv", table, *allow]
        assert main([str(a) for a in command]) == 0
        rows = [line.split(",") for line in table.read_text().splitlines()]
        assert rows[0][:3] == ["sample", "class_1", "probability_1"] and len(rows) == 24
        for row, expected in zip(rows[1:], [*odds, *odds[:3]]):
            said = dict(zip(map(int, row[1::2]), map(float, row[2::2])))
            assert said == pytest.approx(dict(enumerate(expected.tolist())), abs=1e-4)
            assert next(iter(said)) == expected.argmax()
    loaded = onnx.load(str(files["onnx"]))
    assert {o.version for o in loaded.opset_import if o.domain == ""} == {18}
    said = json.loads(next(p.value for p in loaded.metadata_props if p.key == "spafl"))
    assert said["opset"] == 18 and said["client"] == 1 and said["output"]["class_names"] == [str(k) for k in range(10)]
    norm = {"scale": 255.0, "mean": list(data.transform.mean), "std": list(data.transform.std)}
    assert said["input"] == {"name": "image", "shape": [1, 28, 28], "dtype": "uint8", "stored": "uint8",
                             "normalisation": norm, "normalised_in_graph": True}  # fmt: skip

    file, small = files["onnx"], tmp_path / "small.png"
    Image.fromarray(x[0, 0, :20, :24]).save(small)
    (tmp_path / "no.png").write_text("no picture")
    np.save(tmp_path / "wrong.npy", x[:, :, :7])
    for words, *arguments in (
        ("has 24x20 pixels, the model takes 28x28; --resize", file, small),
        ("not a readable image", file, tmp_path / "no.png"),
        ("no such file", file, tmp_path / "nothing.png"),
        ("takes an array (n, 1, 28, 28)", file, tmp_path / "wrong.npy"),
        ("--top must be 1 to 10", file, small, "--top", 11),
        ("--allow-code permits it", files["pt2"], small),
        ("a .onnx or .pt2 file", small, small),
        ("no such file", tmp_path / "none.onnx", small),
    ):
        assert words in fails(capsys, "predict", *arguments)
    assert main(["predict", str(file), str(small), "--resize"]) == 0
    assert capsys.readouterr().out.startswith(f"{small}\t")
    assert "--opset must be 18 to 23" in fails(capsys, "export", run, "--client", 1, "--onnx", "--opset", 9)
    assert "--opset needs --onnx" in fails(capsys, "export", run, "--client", 1, "--opset", 18)
    described = json.loads((run / "partition.json").read_text())
    del described["normalisation"]
    (run / "partition.json").write_text(json.dumps(described))
    assert "does not record" in fails(capsys, "export", run, "--client", 1, "--normalise")


def test_export_mistakes(tmp_path, capsys):
    assert "not a run folder" in fails(capsys, "export", tmp_path, "--client", 0)

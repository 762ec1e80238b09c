"""Callbacks: they are told what is on disk, they change nothing, and what fails in them ends nothing."""

import csv
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import spafl
from spafl.callbacks import Callback
from spafl.cli import main
from spafl.config import resolve_config
from spafl.errors import UserError
from spafl.plugins import Code

OWN = """
import json
from spafl.callbacks import Callback

class Noted(Callback):
    def __init__(self, file: str, fails: int = 0):
        self.file, self.fails = file, fails

    def note(self, *what):
        with open(self.file, "a") as file:
            file.write(json.dumps(what) + "\\n")

    def on_start(self, run):
        self.note("start", run.name, run.rounds, [r.number for r in run.done])

    def on_round(self, round):
        self.note("round", round.number, round.row()["accuracy"])
        if round.number == self.fails:
            raise RuntimeError("no space in the cloud")

    def on_end(self, summary):
        self.note("end", summary and summary["rounds"])

class NoCallback:
    pass

def sick():
    return 1
"""


class Meddler(Callback):
    """Does what a callback should not."""

    def on_start(self, run):
        run.config["rounds"] = 1

    def on_round(self, round):
        torch.manual_seed(0)
        np.random.seed(0)
        round.metrics["cost"]["payload"]["up_bytes"] = -1
        round.metrics["round"] = 99
        sys.exit(4)


class Stopper(Callback):
    def on_round(self, round):
        raise KeyboardInterrupt


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "own_callbacks.py").write_text(OWN)
    yield tmp_path / "notes.jsonl"
    sys.modules.pop("own_callbacks", None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The small run that nobody watches."""
    from small_problem import SMALL

    out = tmp_path_factory.mktemp("plain") / "run"
    spafl.run(SMALL, out)
    return out


def notes(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(folder):
    """The metrics without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["cost"]["seconds"]
    return lines


def test_a_failing_or_meddling_callback_changes_nothing_and_is_told_in_one_line(small, plain, own, capsys):
    own_options = {"file": str(own), "fails": 2}
    path = own.parent / "c.toml"
    config = resolve_config({**small, "callbacks": [{"name": "own_callbacks:Noted", "options": own_options}]})
    path.write_text(config.to_toml())
    assert resolve_config(spafl.config.read_toml(path)) == config
    run = spafl.run(
        path, own.parent / "run", callbacks=[Meddler(), {"name": "own_callbacks:Noted", "options": own_options}]
    )
    assert untimed(run.folder) == untimed(plain)
    for name in ("server.safetensors", "clients/00001.safetensors"):
        assert (run.folder / f"checkpoints/round-000002/{name}").read_bytes() == (
            plain / f"checkpoints/round-000002/{name}"
        ).read_bytes()
    accuracy = [line["evaluation"]["accuracy"]["mean"] for line in untimed(plain)]
    assert notes(own) == [["start", "small", 3, []], ["round", 1, accuracy[0]], ["round", 2, accuracy[1]]]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "callback Meddler (" in lines[0] and "failed in round 1 and is not called again: SystemExit: 4" in lines[0]
    assert "callback Noted (" in lines[1] and "failed in round 2" in lines[1]
    assert "RuntimeError: no space in the cloud (" in lines[1] and "own_callbacks.py:19)" in lines[1]


@pytest.mark.slow
def test_a_callback_may_stop_a_run_which_continues_and_tells_what_was_done(small, own):
    noted = {"name": "own_callbacks:Noted", "options": {"file": str(own)}}
    with pytest.raises(KeyboardInterrupt) as stop:
        spafl.run(small, "run", callbacks=[Stopper(), noted])
    assert "1 of 3 rounds are finished and saved" in stop.value.__notes__[0]
    assert [note[0] for note in notes(own)] == ["start", "round", "end"] and notes(own)[-1] == ["end", None]
    stored = spafl.load_run("run").config
    assert [callback.name for callback in stored.callbacks] == ["own_callbacks:Noted"]  # objects are not stored
    own.unlink()
    assert main(["run", "run", "--resume", "--quiet", "--no-report"]) == 2  # the folder names code
    assert main(["run", "run", "--resume", "--quiet", "--no-report", "--allow-module", "own_callbacks"]) == 0
    assert [note[:2] for note in notes(own)] == [["start", "small"], ["round", 2], ["round", 3], ["end", 3]]
    assert notes(own)[0][3] == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "entry, words",
    [
        ("tensorbord", "callbacks.0.name: unknown name 'tensorbord'; did you mean 'tensorboard'? known: csv, tensor"),
        ({"name": "csv", "options": {"files": "x"}}, "has no option 'files'"),
        (
            {"name": "csv", "options": {"clients": "yes"}},
            "callbacks.0.options.clients: input should be a valid boolean",
        ),
        ({"name": "csv", "option": {}}, "unknown key callbacks.0.option"),
        ("nowhere:X", "there is no module 'nowhere'"),
        ("own_callbacks:NoCallback", "must be a subclass of spafl.callbacks.Callback"),
        ("own_callbacks:sick", "must give a spafl.callbacks.Callback; it gave a int"),
        ("own_callbacks:Noted", "needs 'file'"),
        ({"name": "wandb", "options": {"mode": "x"}}, "mode must be online, offline or disabled; got 'x'"),
        (3, "callbacks.0.name: input should be a valid string; got 3"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_starts(small, own, entry, words):
    with pytest.raises(UserError) as caught:
        spafl.run(small, "run", callbacks=[entry])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("run").exists()


def test_missing_packages_are_named(small, own, monkeypatch):
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"callback {name} needs {package} "):
            spafl.run(small, "run", callbacks=[name])
    assert not Path("run").exists()


@pytest.mark.slow
def test_csv_files_hold_what_the_tables_hold_after_a_resume_too(small, plain, tmp_path, capsys):
    path, out = tmp_path / "c.toml", tmp_path / "run"
    small["rounds"] = 2
    path.write_text(resolve_config(small).to_toml())
    assert main(["run", str(path), "--out", str(out), "--quiet", "--no-report", "--callback", "csv"]) == 0
    once = (out / "rounds.csv").read_text()
    assert main(["run", str(out), "--resume", "--quiet", "--no-report", "--callback", "csv", "--set", "rounds=3"]) == 0
    assert [c.name for c in spafl.load_run(out).config.callbacks] == ["csv"]
    assert (out / "rounds.csv").read_text().startswith(once.rsplit("\n", 2)[0])
    run = spafl.load_run(out)
    for name, records in (("rounds", run.records()), ("clients", run.client_records())):
        with (out / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        columns = [key for key in records[0] if not key.endswith("_samples")]
        assert [list(row) for row in rows[:1]] == [columns]
        assert rows == [{k: "" if v is None else str(v) for k, v in r.items() if k in columns} for r in records]
    assert len(run.client_records()) == 15


@pytest.mark.slow
def test_tensorboard_files_hold_the_rounds(small, plain, tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c  # noqa: F401  the format of its records

    run = spafl.run(small, tmp_path / "run", callbacks=["tensorboard"])
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    content, at, found = file.read_bytes(), 0, {}
    while at < len(content):  # length, its checksum, an event, its checksum
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            elif value.HasField("histo"):
                found.setdefault(value.tag, {})[event.step] = value.histo.num
    records = run.records()
    for tag, column in (
        ("accuracy/accuracy", "accuracy"), ("density/conv1", "density.conv1"), ("cost/up_bytes", "up_bytes"),
        ("loss/train_loss", "train_loss"),
    ):  # fmt: skip
        assert found[tag] == {row["round"]: pytest.approx(row[column], rel=1e-6) for row in records}
    assert found["clients/accuracy"] == {1: 5, 2: 5, 3: 5}


@pytest.mark.slow
def test_wandb_is_told_the_same(small, tmp_path, monkeypatch):
    """Against a stand-in: the service itself needs an account."""
    told = []

    class Module:
        def init(self, **settings):
            told.append(settings)
            return self

        def log(self, values, step):
            told.append((step, values))

        def finish(self, exit_code):
            told.append(exit_code)

    monkeypatch.setitem(sys.modules, "wandb", Module())
    run = spafl.run(small, tmp_path / "run", callbacks=[{"name": "wandb", "options": {"mode": "offline"}}])
    assert told[0]["project"] == "spafl" and told[0]["name"] == "small" and told[0]["config"]["seed"] == 3
    assert [step for step, _ in told[1:4]] == [1, 2, 3] and told[4] == 0
    assert told[3][1]["accuracy/accuracy"] == run.records()[2]["accuracy"]


@pytest.mark.slow
def test_wandb_itself_takes_it_offline_and_obeys_its_environment_variable(small, tmp_path, monkeypatch):
    """Where the package is installed; 0.31.0 was seen to."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    spafl.run(small, tmp_path / "run", callbacks=["wandb"])
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"accuracy/accuracy_worst" in content and b"cost/executed_macs" in content and b"small" in content


def test_the_names_of_callbacks_are_code_that_a_folder_may_not_run(small):
    config = resolve_config({**small, "callbacks": ["csv", "elsewhere:Own"]})
    assert config.code == {"callbacks.1.name": "elsewhere:Own"}
    assert not Code.only(()).allows("elsewhere:Own")

"""The report of a short visit to a GPU, without one: stages that fail or hang, files with limits, and a rehearsal."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from benchmarks.gpu import results
from benchmarks.gpu.report import __main__ as command
from benchmarks.gpu.report import runner, speeds, stages, summary, timing
from benchmarks.gpu.report.folder import FILES, Folder, Rows
from benchmarks.gpu.report.stages import Stage
from spafl_kernels.gpu.tables import engines


def stage(name, seconds=20.0, **rest):
    return Stage(name, seconds, f"about {name}", "none", **rest)


def run(tmp_path, programs, seconds=60.0, patience=1.0, **changes):
    """Run stages whose processes are these programs; what ended how, and the folder."""
    folder = Folder(tmp_path / "report")
    chosen = [stage(name, **changes.get(name, {})) for name in programs]
    said = []

    def process(name, arguments):
        return [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(programs[name])]

    ended = runner.run(folder, chosen, seconds, [], said.append, process, patience=patience)
    return {e.stage: e.state for e in ended}, folder, said


# ------------------------------------------------------------------------------------------------ processes
def test_a_stage_that_fails_crashes_or_is_red_does_not_stop_the_next(tmp_path):
    states, folder, said = run(
        tmp_path,
        {
            "raises": "raise ValueError('this one')",
            "crashes": "import os; os.abort()",
            "red": f"raise SystemExit({runner.RED})",
            "good": "print('done')",
        },
    )
    assert states == {"raises": "failed", "crashes": "failed", "red": "red", "good": "ok"}
    log = (folder.path / "log.txt").read_text()
    assert "ValueError: this one" in log and "Fatal Python error: Aborted" in log and "done" in log
    assert [(r["stage"], r["state"]) for r in folder.rows() if r["kind"] == "stage"] == list(states.items())
    assert len(said) == 4 and "about good" in said[3]


def test_a_stage_that_hangs_is_ended_with_its_children_and_says_where_it_was(tmp_path):
    child = tmp_path / "child"
    program = f"""
        import subprocess, sys, time
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(child)!r}, "w").write(str(process.pid))
        def here_it_hangs():
            time.sleep(600)
        here_it_hangs()
    """
    began = time.monotonic()
    states, folder, _ = run(tmp_path, {"hangs": program, "next": "pass"}, hangs={"seconds": 6.0})
    assert states == {"hangs": "late", "next": "ok"} and time.monotonic() - began < 40
    assert "here_it_hangs" in (folder.path / "log.txt").read_text()
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # an orphan is gone when its new parent has collected it
            os.kill(int(child.read_text()), 0)
            if pathlib.Path(f"/proc/{child.read_text()}/stat").read_text().split()[2] == "Z":
                raise ProcessLookupError
            time.sleep(0.1)


def test_a_rehearsal_is_patient_with_a_slow_machine(tmp_path):
    assert run(tmp_path, {"slow": "pass"}, patience=1e6, slow={"seconds": 1e-4})[0] == {"slow": "ok"}


def test_what_has_no_time_is_said_and_not_begun(tmp_path):
    states, *_ = run(tmp_path, {"first": "pass", "second": "print('no')"}, seconds=runner.LEAST - 1)
    assert states == {"first": "no time", "second": "no time"}


@pytest.mark.parametrize(("code", "then"), [(0, {"values": "ok"}), (runner.RED, {"values": "red", "again": "ok"})])
def test_a_second_look_only_where_the_first_was_red(tmp_path, code, then):
    programs = {"values": f"raise SystemExit({code})", "again": "pass"}
    assert run(tmp_path, programs, again={"only_if_red": "values"})[0] == then


def test_a_stage_has_its_variables(tmp_path):
    program = "import os; assert os.environ['SPAFL_TOOLKIT_PTXAS'] == '1' and os.environ['PYTHONUNBUFFERED'] == '1'"
    assert run(tmp_path, {"one": program}, one={"environment": {"SPAFL_TOOLKIT_PTXAS": "1"}})[0] == {"one": "ok"}


def test_neither_checkout_nor_host_is_in_the_log():
    text = f"{runner.ROOT}/spafl_kernels/env.py on {os.uname().nodename} in {pathlib.Path.home()}/x"
    cleaned = runner.clean(text)
    assert str(runner.ROOT) not in cleaned and cleaned.startswith("./spafl_kernels/env.py")
    assert len(os.uname().nodename) <= 3 or os.uname().nodename not in cleaned


# ------------------------------------------------------------------------------------------------ files
def test_rows_are_on_disk_at_once_and_numbers_that_json_lacks_become_words(tmp_path):
    folder = Folder(tmp_path)
    folder.add("values", "value", error=float("inf"), shape=(2, 3), dtype=torch.float32)
    assert json.loads((tmp_path / "report.jsonl").read_text()) == {
        "stage": "values", "kind": "value", "error": "inf", "shape": [2, 3], "dtype": "torch.float32",
    }  # fmt: skip
    with open(tmp_path / "report.jsonl", "a") as file:
        file.write('{"stage": "cut o')
    assert len(Folder(tmp_path).rows()) == 1


def test_fewer_files_leave_out_the_last_ones(tmp_path):
    folder = Folder(tmp_path, files=1)
    folder.add("a", "b")
    folder.log("text")
    folder.summarise("text")
    folder.compiled("{}\n")
    Rows(folder, "steps", {"gpu": "some GPU"}).add([{"kind": "step", "model": "lenet5", "us": 1.0}])
    assert [p.name for p in tmp_path.iterdir()] == ["report.jsonl"]
    assert folder.rows()[-1] == {"stage": "steps", "kind": "row", "what": "step", "model": "lenet5", "us": 1.0}


def test_all_files_and_the_rows_of_the_benchmark(tmp_path):
    folder = Folder(tmp_path)
    Rows(folder, "steps", {"gpu": "some GPU"}).add([{"kind": "step", "model": "lenet5", "us": 1.0}])
    folder.add("a", "b")
    folder.log("text")
    folder.summarise("text")
    folder.compiled("{}\n")
    assert {p.name for p in tmp_path.iterdir()} == set(FILES)
    (row,) = results.read([tmp_path / "gpu.csv"])
    assert (row["kind"], row["model"], row["gpu"]) == ("step", "lenet5", "some GPU")


def test_a_file_that_is_full_stays_below_its_size_and_says_so(tmp_path):
    folder = Folder(tmp_path, megabytes=0.01)
    for _ in range(300):
        folder.log("a line of the log\n" * 10)
        folder.add("values", "value", text="x" * 100)
    for name in ("log.txt", "report.jsonl"):
        assert (tmp_path / name).stat().st_size <= folder.most
    assert "the file is full" in (tmp_path / "log.txt").read_text()
    assert folder.rows()[-1] == {"kind": "full"}


@pytest.mark.parametrize("wrong", [{"files": 0}, {"files": len(FILES) + 1}, {"megabytes": 0}])
def test_wrong_limits_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Folder(tmp_path, **wrong)


# ------------------------------------------------------------------------------------------------ stages
def test_every_stage_can_be_loaded_and_fits_into_the_time_of_a_visit():
    assert len(set(stages.NAMES)) == len(stages.STAGES)
    for one in stages.STAGES:
        assert callable(one.load()) and one.seconds <= 120
    # Useful after three minutes: environment, values, and steps of the first model.
    assert stages.NAMES.index("values") < stages.NAMES.index("steps-lenet5") < stages.NAMES.index("layers")


def test_what_is_timed():
    (job,) = timing.jobs("step", "conv4", 128)
    assert (job.model, job.batch, job.part.densities) == ("conv4", 128, (1.0, 0.5, 0.25))
    assert timing.jobs("cohort", "lenet5", 0)[0].batch == 64
    layers = timing.jobs("layers")
    assert {(j.model, j.layer.name) for j in layers} == set(timing.LAYERS) and len(layers) == 2 * len(timing.LAYERS)
    assert {j.model for j in timing.jobs("tune")} == {"conv4", "resnet18-full"}


def test_the_summary_holds_what_the_rows_say():
    cell = {"model": "conv4", "layer": "conv2", "batch": 16, "clients": 10, "dtype": "bf16", "mode": "whole"}

    def row(what, provider, us, **rest):
        about = {"stage": "s", "kind": "row", "what": what, "provider": provider, "us": us, "gate": "pass", "graph": 1}
        return {**cell, "density": 0.5, **about, **rest}

    rows = [
        {"stage": "values", "kind": "stage", "state": "red", "seconds": 12.0, "code": 3},
        {"stage": "values", "kind": "worst", "arithmetic": "tf32", "y": 7.9e-4},
        {"stage": "values", "kind": "red", "what": "linear is off by 1"},
        row("layer", "dense", 80.0),
        row("layer", "ours", 20.0, speedup_vs_dense=4.0, ceiling=5.0),
        row("cohort", "loop", 900.0),
        row("cohort", "cohort", 30.0, speedup_vs_dense=30.0),
        row("cohort", "late", None, gate="-", error="RuntimeError: no"),
        {"kind": "full"},
    ]
    text = summary.text(rows)
    for part in ("values", "red", "0.00079", "RED values: linear is off by 1"):
        assert part in text
    (layer,) = (line for line in text.splitlines() if line.startswith("conv4.conv2"))
    assert layer.split()[-4:] == ["80", "20", "4", "5"]
    (cohort,) = (line for line in text.splitlines() if "cohort " in line and "x10" in line)
    assert cohort.split()[-2:] == ["30", "30"]
    assert any("late" in line and "error" in line for line in text.splitlines())


def test_the_command(tmp_path, capsys):
    assert command.main(["--list"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == list(stages.NAMES)
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), "--files", "9"])
    if not torch.cuda.is_available():
        assert command.main(["--out", str(tmp_path / "none")]) == 2
        assert "has none" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ rehearsal
def rehearse(out, *names, seconds=420):
    """The command as on a GPU machine, from another folder; its exit code and the rows."""
    call = [sys.executable, "-m", "benchmarks.gpu.report", "--out", str(out), "--rehearse", "--seconds", str(seconds)]
    call += ["--stages", *names] if names else []
    done = subprocess.run(call, cwd=runner.ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    return done.returncode, Folder(out).rows()


@pytest.mark.slow
def test_a_rehearsal_of_some_stages(tmp_path):
    code, rows = rehearse(tmp_path / "report", "environment", "steps-lenet5")
    assert code == 0
    assert {r["stage"]: r["state"] for r in rows if r["kind"] == "stage"} == {
        "environment": "ok", "steps-lenet5": "ok",
    }  # fmt: skip
    timed = {(r["provider"], r["graph"]) for r in rows if r["kind"] == "row"}
    assert {("dense", 0), ("masked", 0), ("masked", 1), ("ours", 0), ("compact", 0)} <= timed
    assert {r["what"] for r in rows if r["kind"] == "ceiling"} == {
        "copy",
        "product bf16",
        "product tf32",
        "product fp32",
    }
    text = (tmp_path / "report" / "summary.txt").read_text()
    assert "environment" in text and "lenet5 b2" in text


@pytest.mark.slow
def test_a_rehearsal_of_everything(tmp_path):
    code, rows = rehearse(tmp_path / "report", seconds=1500)
    states = {r["stage"]: r["state"] for r in rows if r["kind"] == "stage"}
    assert code == 0 and set(states.values()) == {"ok"}, states
    # What is only for a red stage does not run.
    assert set(states) >= set(stages.NAMES) - {"values-ptxas", "compile"}


def test_a_table_of_engines_is_made_from_speeds_of_both(tmp_path):
    made = {"gpu": "NVIDIA made-up", "torch": "2", "commit": "abc", "roofline": "", "cpu": "two cores"}
    lines = [
        {"kind": "speed", "model": "lenet5", "batch": 64, "density": d, "where": w, "steps_per_second": s, "made": made}
        for d, w, s in ((1.0, "cpu", 80.0), (1.0, "cuda", 1500.0), (0.5, "cpu", 200.0), (0.5, "cuda", 1600.0))
    ]
    table = speeds.table([{"kind": "stage"}, *lines, {**lines[0], "model": "conv4"}])
    assert table is not None and table.device == "NVIDIA made-up" and table.made["cpu"] == "two cores"
    assert set(table.entries) == {"lenet5"}  # Conv4 has no speed on the GPU
    assert table.gpu_is_faster("lenet5", 64, 2)[0]
    assert not table.gpu_is_faster("lenet5", 64, 10)[0]  # ten workers at density .5
    path = engines.SHELF.write(table, tmp_path)
    assert engines.SHELF.load(path) == table
    assert speeds.table([{"kind": "stage"}, lines[0]]) is None

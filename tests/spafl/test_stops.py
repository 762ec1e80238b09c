"""Runs that are stopped or lose processes, from outside: nobody is left behind and no bit is lost."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_simulation import assert_same_run
from test_table import EXPERIMENT

from spafl import demo
from spafl.algorithms import SpaFL
from spafl.config import deep_merge, resolve_config
from spafl.simulation import run
from spafl.simulation.pool import WorkerDied

PATIENCE = 900.0  # of a busy machine


def wait_for(condition, what, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s for {what}")


def stat(pid):
    """State and parent of a process; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else (fields[0], int(fields[1]))


def children(pid):
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [child for child in found if (stat(child) or ("", 0))[1] == pid]


def workers(pid):
    """Workers of a run that have passed their first lines (they are Python's, and know what they are)."""
    ready = []
    for child in children(pid):
        with contextlib.suppress(OSError):
            if b"boot.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                ready.append(child)
    return ready


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def start(small, tmp_path):
    """``start(folder, *options, section={...})``: a run as a process of its own, killed at the end of the test."""
    started = []

    def make(folder, *options, module="spafl.cli", **changes):
        config = resolve_config(deep_merge(deep_merge(small, {"simulation": {"workers": 2}}), changes))
        file = tmp_path / f"{folder.name}.toml"
        file.write_text(config.to_toml())
        command = [sys.executable, "-m", module, "run", str(file), "--out", str(folder), "--no-report", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield make
    for process in started:
        process.kill()
        process.communicate()


LONG = {"rounds": 400, "simulation": {"checkpoint_every": 1000}}


def begun(process, folder, rounds=2):
    wait_for(lambda: process.poll() is not None or len(lines(folder)) >= rounds, f"{rounds} rounds")
    assert process.poll() is None, process.communicate()
    return workers(process.pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_workers_end_with_their_parent_however_it_ends(start, tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder, **LONG)
    pids = begun(process, folder)
    assert len(pids) == 2 and sorted(children(process.pid)) == sorted(pids)  # nobody else, no resource tracker
    os.kill(pids[0], signal.SIGSTOP)  # it must not live on, nor hang the parent's end
    process.send_signal(number)
    process.wait(60)
    wait_for(lambda: not any(stat(pid) for pid in pids), "the workers' end", 20)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.3])
def test_workers_that_are_only_starting_end_too(start, tmp_path, delay):
    process = start(tmp_path / "run", **LONG)
    pids = wait_for(lambda: children(process.pid), "a worker")
    time.sleep(delay)
    pids = children(process.pid) or pids
    process.kill()
    process.wait()
    wait_for(lambda: not any(stat(pid) for pid in pids), "the workers' end", 30)


STOPPED = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM", signal.SIGHUP: "stopped by SIGHUP"}


@pytest.mark.parametrize(
    ("number", "count"),
    [
        pytest.param(number, count, marks=() if (number, count) == (signal.SIGTERM, 2) else pytest.mark.slow)
        for number in STOPPED
        for count in (1, 2)
    ],
)
def test_a_stop_saves_what_is_finished_in_one_line(start, small_config, tmp_path, number, count):
    folder = tmp_path / "run"
    process = start(folder, "--quiet", **deep_merge(LONG, {"simulation": {"workers": count}}))
    begun(process, folder, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    done = len(lines(folder))
    assert process.returncode == 128 + number
    assert err == f"spafl: {STOPPED[number]}; {done} of 400 rounds are finished and saved; continue with --resume\n"
    assert not out
    assert not (folder / ".scratch").exists() and not (folder / ".lock").exists()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"round-{done - 1:06d}"]
    config = small_config(rounds=done + 1, simulation={"checkpoint_every": 1000})
    (folder / "config.toml").write_text(config.to_toml())  # it may end sooner than was planned
    run(config, folder, resume=True, quiet=True)
    run(config, tmp_path / "whole", quiet=True)
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_in_a_long_task_is_prompt_and_a_second_one_does_not_wait(start, tmp_path, count):
    # Longer than the test, for the client with the fewest samples too.
    long = {"rounds": 9, "training": {"epochs": 100_000}, "simulation": {"workers": count}}
    for signals in (1, 2):
        folder = tmp_path / str(signals)
        process = start(folder, "--quiet", **long)  # a minute without a round would be told
        wait_for((folder / "metrics.jsonl").exists, "the run")
        wait_for(lambda: busy(process.pid, count), "training")  # noqa: B023
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.001)
        _, err = process.communicate(timeout=60)  # the task would take minutes
        assert process.returncode == 130
        if signals == 1:
            assert err == "spafl: interrupted; no round was finished; continue with --resume\n"
        assert "Traceback" not in err and err.count("\n") <= 1


def busy(pid, count):
    """Whether the processes that train have used processor time for longer than starting takes."""
    pids = workers(pid) if count > 1 else [pid]
    return len(pids) == count and all(seconds(p) > 8 for p in pids)


def seconds(pid):
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


@contextlib.contextmanager
def signal_when(condition, number):
    """Send this process a signal once something has happened."""
    over = threading.Event()

    def watch():
        while not over.wait(0.02):
            if condition():
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_ctrl_c_in_python_is_a_keyboard_interrupt_and_saves(small_config, tmp_path):
    folder = tmp_path / "run"
    config = small_config(**LONG)
    with signal_when(lambda: len(lines(folder)) >= 3, signal.SIGINT), pytest.raises(KeyboardInterrupt) as caught:
        run(config, folder, quiet=True)
    done = len(lines(folder))
    assert f"{done} of 400 rounds are finished and saved; continue with --resume" in caught.value.__notes__
    assert not (folder / ".scratch").exists() and not (folder / ".lock").exists()
    config = small_config(rounds=done + 1, simulation={"checkpoint_every": 1000})
    (folder / "config.toml").write_text(config.to_toml())  # it may end sooner than was planned
    run(config, folder, resume=True, quiet=True)
    run(config, tmp_path / "whole", quiet=True)
    assert_same_run(tmp_path / "whole", folder)


def test_ctrl_c_in_a_long_task_of_one_process_is_prompt(small_config, tmp_path):
    folder = tmp_path / "run"
    sent = []

    def training():
        if (folder / "metrics.jsonl").exists() and not sent:
            time.sleep(1)
            sent.append(time.monotonic())
        return sent

    with signal_when(training, signal.SIGINT), pytest.raises(KeyboardInterrupt) as caught:
        run(small_config(training={"epochs": 100_000}), folder, quiet=True)
    assert time.monotonic() - sent[0] < 10
    assert caught.value.__notes__ == ["no round was finished; continue with --resume"]


@pytest.mark.slow
def test_the_demo_is_interrupted_in_one_line(tmp_path, capsys):
    with signal_when(lambda: lines(tmp_path / "spafl-seed1"), signal.SIGINT):
        assert demo.main(["--rounds", "500", "--out", str(tmp_path)]) == 130
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("spafl: round ")]
    assert len(said) == 1 and re.fullmatch(
        r"spafl: interrupted; \d+ of 500 rounds are finished and saved; continue with --resume", said[0]
    )


def kill_some(count, dice, folder, parent):
    """Kill workers of a run at random moments, one after another."""
    killed = []

    def one():
        if len(lines(folder)) >= 2 + 6 * len(killed):
            time.sleep(dice.random() * 0.3)
            found = workers(parent)
            if found and len(killed) < count:
                killed.append(dice.choice(found))
                os.kill(killed[-1], signal.SIGKILL)

    over = threading.Event()

    def watch():
        while not over.wait(0.02):
            one()

    thread = threading.Thread(target=watch)
    thread.start()

    def end():
        over.set()
        thread.join()
        return killed

    return end


@pytest.mark.parametrize(
    ("seed", "kills", "store", "variant"),
    [
        (0, 2, "memory", "cifar10"),
        *(
            pytest.param(seed, 6, store, variant, marks=pytest.mark.slow)
            for seed in range(6)
            for store, variant in (("memory", "cifar10"), ("file", "fmnist"))
        ),
    ],
)
def test_killed_workers_are_replaced_and_change_no_bit(small_config, tmp_path, capsys, seed, kills, store, variant):
    changes = {"rounds": 12 * kills, "algorithm": {"variant": variant}}
    folder = tmp_path / "run"
    end = kill_some(kills, random.Random(seed), folder, os.getpid())
    try:
        run(small_config(**changes, simulation={"store": store, "workers": 2, "checkpoint_every": 1000}), folder)
    finally:
        killed = end()
    said = [line for line in capsys.readouterr().err.splitlines() if "worker process" in line]
    assert killed and 1 <= len(said) <= len(killed)
    pattern = (
        r"spafl: worker process \d+ was killed by SIGKILL \(out of memory\?\)"
        r"(, another one takes its place(; the (training|evaluation) of .* in round \d+ is carried out again)?"
        r"| before it was ready; the run goes on with 1)"
    )
    assert all(re.fullmatch(pattern, line) for line in said), said
    assert not workers(os.getpid())
    run(small_config(**changes, simulation={"checkpoint_every": 1000}), tmp_path / "whole", quiet=True)
    assert_same_run(tmp_path / "whole", folder)


SCRIPT = """
import os, signal, sys
from pathlib import Path

import torch

from spafl.algorithms import {base}
from spafl.config import load_config
from spafl.simulation import run
from spafl.simulation.pool import WorkerDied

class Mine({base}):
    def train(self, client, message, round):
        {body}
        return super().train(client, message, round)

config = load_config(Path({file!r}))
print(run(config, Path({out!r}), quiet=True)["rounds"])
"""


@pytest.fixture
def script(small, tmp_path):
    """A script without a main guard, with an algorithm of its own; also two workers."""

    def make(body, name="script"):
        config = resolve_config(deep_merge(small, {"rounds": 2, "simulation": {"workers": 2}}))
        text = config.to_toml().replace('name = "spafl"', 'name = "__main__:Mine"')
        (tmp_path / f"{name}.toml").write_text(text)
        return SCRIPT.format(base="SpaFL", body=body, file=str(tmp_path / f"{name}.toml"), out=str(tmp_path / name))

    return make


@pytest.mark.parametrize("how", [pytest.param("file", marks=pytest.mark.slow), "standard input"])
def test_a_script_without_a_main_guard(script, small_config, tmp_path, how):
    text = script("marker = torch.ones(1)", "run")
    (tmp_path / "mine.py").write_text(text)
    command = [sys.executable, str(tmp_path / "mine.py") if how == "file" else "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    run(small_config(rounds=2), tmp_path / "whole", quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


class Deadly(SpaFL):
    def train(self, client, message, round):
        if round == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train(client, message, round)


@pytest.mark.slow
def test_three_deaths_over_one_task_end_the_run_with_the_reason(small, tmp_path, capsys):
    small["algorithm"]["name"] = "test_stops:Deadly"
    changes = {"simulation": {"workers": 2, "checkpoint_every": 1000}, "sampling": {"clients_per_round": 1}}
    with pytest.raises(WorkerDied) as caught:
        run(resolve_config(deep_merge(small, changes)), tmp_path / "run")
    assert re.fullmatch(
        r"the training of client \d in round 2: 3 worker processes died over it, the last one was killed by SIGKILL "
        r"\(out of memory\?\); if memory is short, fewer simulation.workers need less",
        str(caught.value),
    )
    assert caught.value.__notes__ == ["1 of 3 rounds are finished and saved; continue with --resume"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-000000"]
    assert capsys.readouterr().err.count("is carried out again") == 2
    assert not workers(os.getpid())


def test_a_run_ends_with_the_command_that_began_it(tmp_path):
    """However that ends; its state is saved, for the next command to go on with."""
    path = tmp_path / "small.toml"
    text = EXPERIMENT.replace("rounds = 2", "rounds = 3000").replace("checkpoint_every = 1", "checkpoint_every = 5000")
    path.write_text(text)
    command = [sys.executable, "-m", "spafl", "table", str(path), "--seeds", "1", "--methods", "spafl", "--jobs", "1"]
    table = subprocess.Popen([*command, "--runs", str(tmp_path / "runs")], stderr=subprocess.DEVNULL)
    folder = tmp_path / "runs" / "small" / "spafl" / "seed-1"
    try:
        wait_for(lambda: len(lines(folder)) > 1, "two rounds")
        (run,) = children(table.pid)
    finally:
        table.kill()
        table.wait()
    wait_for(lambda: stat(run) is None, "the end of the run")
    assert 1 < len(lines(folder)) < 3000
    assert (folder / "checkpoints" / f"round-{len(lines(folder)) - 1:06d}").is_dir()

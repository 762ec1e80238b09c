"""Signals as exceptions: when they are raised, when they wait, and that nothing of it stays."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from spafl.signals import STOPS, Stopped, blocked, catching, exit_status, held, in_one_line, released

RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Stopped, signal.SIGHUP: Stopped}


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs between two instructions of this thread


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_is_raised_at_once_and_the_handlers_are_restored(number, capsys):
    before = [signal.getsignal(n) for n in STOPS]
    with pytest.raises(RAISED[number]) as caught, catching():
        send(number)
        raise AssertionError
    assert [signal.getsignal(n) for n in STOPS] == before
    assert exit_status(caught.value) == 128 + number
    if number == signal.SIGINT:
        assert type(caught.value) is KeyboardInterrupt and capsys.readouterr().err == ""
    else:
        assert caught.value.code == 128 + number  # what Python ends with if nobody catches it
        assert capsys.readouterr().err == f"spafl: stopped by {number.name}\n"


def test_a_held_stretch_is_whole_and_a_released_one_inside_is_not():
    steps = []
    with pytest.raises(KeyboardInterrupt), catching():
        with held():
            send(signal.SIGINT)
            steps.append("held")
        steps.append("never")
    with pytest.raises(Stopped), catching(), held():
        send(signal.SIGTERM)
        steps.append("held")
        with released():
            steps.append("never")
    with pytest.raises(Stopped), catching(), held():
        with released():
            with held():
                send(signal.SIGHUP)
                steps.append("inner")
            steps.append("never")
        steps.append("never")
    assert steps == ["held", "held", "inner"]


def test_a_second_signal_does_not_wait():
    done = []
    with pytest.raises(Stopped) as caught, catching():
        try:
            send(signal.SIGINT)
        except KeyboardInterrupt:
            with held():
                done.append("saving")
                send(signal.SIGTERM)
                done.append("never")
    assert done == ["saving"] and caught.value.number == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt), catching(), held():
        send(signal.SIGINT)
        send(signal.SIGINT)
        raise AssertionError


def test_of_a_command_a_second_signal_is_the_end():
    code = """
import os, signal, time
from spafl.signals import catching, held
with catching(second_exits=True), held():
    os.kill(os.getpid(), signal.SIGINT)
    print("held", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (143, "held\n", "")


def test_handlers_of_others_are_left_alone():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    seen = []
    try:
        signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with catching():
            send(signal.SIGTERM)
            send(signal.SIGHUP)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def test_other_threads_set_no_handlers_and_hold_nothing():
    before = [signal.getsignal(number) for number in STOPS]
    seen = []

    def work():
        with catching(), held(), released():
            seen.append([signal.getsignal(number) for number in STOPS])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_outer_one_counts():
    with pytest.raises(Stopped), catching(second_exits=True):
        inside = signal.getsignal(signal.SIGTERM)
        with catching():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == inside
        send(signal.SIGTERM)


def test_processes_start_with_the_signals_blocked():
    def mask():
        status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
        return int(status.split("SigBlk:")[1].split()[0], 16)

    with blocked():
        inside = mask()
    assert all(inside >> (number - 1) & 1 for number in STOPS)
    assert not any(mask() >> (number - 1) & 1 for number in STOPS)


def test_one_line_has_the_notes_of_one_line():
    error = ValueError("wrong")
    error.add_note("3 rounds are saved")
    error.add_note("in worker process 5:\nTraceback")
    assert in_one_line(error) == "wrong; 3 rounds are saved"
    assert in_one_line(ValueError("a\nb\x1b[2J")) == "a\\nb\\x1b[2J"
    assert in_one_line(Stopped(signal.SIGHUP)) == "stopped by SIGHUP"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second_exits", [False, True])
def test_a_stop_that_python_drops_is_raised_again(number, second_exits, monkeypatch):
    """In a ``__del__``, say, at which a signal may come as well as anywhere."""
    monkeypatch.setattr("spafl.signals._LOST", 0.05)
    dropped = []
    monkeypatch.setattr("sys.unraisablehook", lambda what: dropped.append(what.exc_type))

    class Rubbish:
        def __del__(self):
            send(number)

    def work():
        rubbish = Rubbish()
        del rubbish
        for _ in range(500):
            time.sleep(0.01)
        raise AssertionError("the stop was lost")

    with pytest.raises(RAISED[number]), catching(second_exits), held(), released():
        work()
    assert dropped == [RAISED[number]]
    time.sleep(0.1)  # nothing comes afterwards


def test_a_stop_that_is_being_looked_after_is_not_raised_again(monkeypatch):
    monkeypatch.setattr("spafl.signals._LOST", 0.05)
    with pytest.raises(KeyboardInterrupt), catching(), held():
        try:
            with released():
                send(signal.SIGINT)
        finally:
            time.sleep(0.2)
            done = True
    assert done


LATE = """
import atexit, os, signal, sys, time
from spafl import cli

def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)

atexit.register(lambda: print("after", flush=True))
atexit.register(lambda: [send(number) for number in {late}])
cli.COMMANDS["report"] = lambda args: {command}
sys.exit(cli.main(["report", "x"], own_process=True))
"""


@pytest.mark.parametrize(
    ("command", "late", "status", "out", "err"),
    [
        ("send(2) or 5", "[2]", 130, "", "spafl: interrupted\n"),
        ("send(15) or 5", "[2]", 130, "", "spafl: stopped by SIGTERM\n"),
        ("0", "[2]", 0, "after\n", ""),
        ("3", "[15]", 3, "after\n", ""),
        ("0", "[2, 15]", 143, "", ""),
    ],
)
def test_signals_while_python_takes_itself_down_make_no_traceback(command, late, status, out, err):
    script = LATE.format(command=command, late=late)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)

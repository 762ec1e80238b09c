"""What a run says while it runs: a line per round off a terminal, and never a minute of silence."""

import contextlib
import io
import os
import pty
import re
import sys
import termios
import time

import pytest

from spafl.simulation import progress
from spafl.simulation.progress import ProgressLine, say


def line(accuracy=0.5):
    evaluation = None if accuracy is None else {"accuracy": {"mean": accuracy}}
    density = None if accuracy is None else {"layer_mean": 0.25}
    return {"evaluation": evaluation, "density": density, "cost": {"payload": {"up_bytes": 1000, "down_bytes": 536}}}


def test_a_line_per_round_with_the_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = ProgressLine("mine", 10, 4)  # a resumed run
    now[0] += 70  # the first round is long: workers start
    shown.update(line())
    now[0] += 20
    shown.update(line(None))
    now[0] += 40
    shown.update(line())
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "mine: round 5 of 10, accuracy 50.0%, density 0.25, sent 1.5 kB; 01:10 so far, 05:50 left",
        "mine: round 6 of 10, sent 1.5 kB; 01:30 so far, 01:20 left",
        "mine: round 7 of 10, accuracy 50.0%, density 0.25, sent 1.5 kB; 02:10 so far, 01:30 left",
    ]


def test_no_minute_of_silence(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 0.05)
    shown = ProgressLine("mine", 2, 0)
    time.sleep(0.3)
    shown.update(line())
    time.sleep(0.3)
    shown.update(line())
    time.sleep(0.3)  # nothing is going on any more
    shown.close()
    said = capsys.readouterr().err.splitlines()
    first = said.index(next(text for text in said if "round 1 of 2, " in text))
    assert first >= 2
    assert all(re.fullmatch(r"mine: in round 1 of 2; 00:00 so far, time left unknown", text) for text in said[:first])
    waits = said[first + 1 : -1]
    assert len(waits) >= 2 and all(re.fullmatch(r"mine: in round 2 of 2; .* so far, .* left", text) for text in waits)
    assert "round 2 of 2, " in said[-1]


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_silent(capfd, monkeypatch, terminal):
    monkeypatch.setattr(progress, "SILENCE", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    shown = ProgressLine("mine", 2, 0, quiet=True)
    time.sleep(0.1)
    shown.update(line())
    shown.say("something")
    shown.close()
    assert capfd.readouterr() == ("", "")


def test_on_a_terminal_one_line_changes(monkeypatch):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    with os.fdopen(follower, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        shown = ProgressLine("mine", 2, 0)
        shown.update(line())
        say("a line of its own")
        shown.close()
    written = ""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while piece := os.read(leader, 10_000):
            written += piece.decode()
    os.close(leader)
    assert "mine: " in written and "accuracy=50.0%" in written and "spafl: a line of its own\r\n" in written


def test_an_output_that_is_gone_ends_no_run(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    shown = ProgressLine("mine", 1, 0)
    shown.update(line())
    shown.say("something")
    shown.close()

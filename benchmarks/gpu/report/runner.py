"""Runs stages, each in a process of its own with a time limit; whatever one does, the next one runs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence

from . import stages
from .folder import Folder
from .stages import Stage

ROOT = pathlib.Path(__file__).resolve().parents[3]
# After a polite end, for Python to say where it hangs; then the process is killed.
GRACE = 3.0
# The limits of stages are those of a GPU. A rehearsal gives a CPU, which may have other work, as many times as long.
PATIENCE = 10.0
# A stage that has less than this left is not begun.
LEAST = 5.0
# What a stage's process answers if something it looked at is wrong: it did its work, others may go on.
RED = 3


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a stage ended: ``ok``, ``red`` (it found something wrong), ``failed`` or ``late``; and after how long."""

    stage: str
    state: str
    seconds: float
    code: int | None


def environment(stage: Stage, rehearsal: bool) -> dict[str, str]:
    """Variables of a stage's process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    # Triton reads it when a kernel is defined.
    interpreted = {"TRITON_INTERPRET": "1"} if rehearsal and stage.interpreted else {}
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment, **interpreted}


def run_one(stage: Stage, folder: Folder, command: Sequence[str], seconds: float) -> Ended:
    """Run a stage's command for at most ``seconds``; what it printed goes to the log, also when it is killed."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command, env=environment(stage, "--rehearse" in command), stdout=printed, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            _end(process)
        except BaseException:
            _end(process)
            raise
        finally:
            printed.seek(0)
            text = clean(printed.read().decode(errors="replace"))
            folder.log(f"---- {stage.name}\n{text}\n")
    code = process.returncode
    state = "late" if late else {0: "ok", RED: "red"}.get(code, "failed")
    return Ended(stage.name, state, time.monotonic() - began, code)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: SIGABRT makes Python print where every thread is."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError):  # children that outlive it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def clean(text: str) -> str:
    """Without the path of the checkout, of the home folder and the name of the host."""
    names = {str(ROOT): ".", str(pathlib.Path.home()): "~", os.uname().nodename: "host"}
    for name, other in names.items():
        if len(name) > 3:
            text = text.replace(name, other)
    return text


def run(
    folder: Folder,
    chosen: Sequence[Stage],
    seconds: float,
    arguments: Sequence[str],
    say: Callable[[str], None],
    command: Callable[[str, list[str]], list[str]] = stages.command,
    before: Callable[[str], None] = lambda stage: None,
    after: Callable[[str], None] = lambda stage: None,
    patience: float = 1.0,
) -> list[Ended]:
    """Run these stages for at most ``seconds`` in all.

    Args:
        arguments: for every stage's process.
        say: takes a line after every stage.
        before, after: called with the name of a stage before and after it.
        patience: how many times its limit a stage gets.
    """
    deadline, ended = time.monotonic() + seconds, list[Ended]()
    for stage in chosen:
        if stage.only_if_red is not None and not any(e.stage == stage.only_if_red and e.state == "red" for e in ended):
            continue
        left = deadline - time.monotonic()
        if left < LEAST:
            done = Ended(stage.name, "no time", 0.0, None)
        else:
            limit = min(patience * stage.seconds, left)
            line = command(stage.name, [*arguments, "--seconds", f"{limit:.0f}"])
            before(stage.name)
            done = run_one(stage, folder, line, limit)
        ended.append(done)
        folder.add(stage.name, "stage", state=done.state, seconds=round(done.seconds, 1), code=done.code)
        say(f"{done.seconds:5.0f} s  {done.state:<7}  {stage.name}: {stage.about}")
        after(stage.name)
    return ended

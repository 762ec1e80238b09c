"""Stage: compute-sanitizer over a run of every kernel, after it has found a planted fault."""

from __future__ import annotations

import os
import subprocess
import sys

from ..toolkit import TESTS, program
from .device import Visit

SMOKE = TESTS / "support" / "smoke.py"
FOUND = 9  # exit code that the tool is told to give for what it finds


def run(visit: Visit, tool: str) -> None:
    """``tool``: ``memcheck``, whose findings are faults; or ``racecheck``, whose are information.

    racecheck is known to report threads that store the same value (triton issue 7264).
    """
    path = program("compute-sanitizer")
    if visit.rehearsal:
        arguments = [sys.executable, str(SMOKE), "--device", "cpu"]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        visit.add("sanitizer", tool="none", code=done.returncode)
        if done.returncode:
            visit.wrong(done.stderr[-300:])
        return
    if path is None:
        visit.add("sanitizer", tool=tool, state="compute-sanitizer is not installed")
        return
    # Every tensor an allocation of its own: a write behind it is then outside of everything.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for planted in (True, False):
        command = [path, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, str(SMOKE)]
        command += ["--plant"] * planted
        if planted and tool != "memcheck":
            continue
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=visit.left())
        except subprocess.TimeoutExpired:
            visit.add("sanitizer", tool=tool, planted=planted, state="no time")
            return
        text = done.stdout + done.stderr
        print(text[-4000:], flush=True)
        summary = [line.strip("= \n") for line in text.splitlines() if "SUMMARY" in line]
        visit.add("sanitizer", tool=tool, planted=planted, code=done.returncode, summary=summary)
        if "Device not supported" in text:
            return
        if planted != (done.returncode != 0) and tool == "memcheck":
            visit.wrong("the planted write was not found" if planted else f"memcheck found something: {summary}")
            visit.add("found", text=text[:3000])

"""Stage: compiles, on all cores, what no cache holds; with the cache of ``benchmarks.gpu.ahead`` that is nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from ..clock import tf32
from .device import Visit

PART = "SPAFL_COMPILE_PART"  # set in the processes of this stage: i/n


def run(visit: Visit, *names: str) -> None:
    """Launch every kernel of these stages once, in as many processes as there are cores."""
    part = os.environ.get(PART)
    if part is not None:
        number, parts = map(int, part.split("/"))
        _launch(work(visit, names)[number::parts], visit)
        return
    count = 1 if visit.rehearsal else min(16, os.cpu_count() or 1)
    command = [sys.executable, "-m", f"{__package__}", "--stage", visit.stage, "--out", str(visit.folder.path)]
    command += ["--seconds", str(visit.seconds), *["--rehearse"] * visit.rehearsal]
    began = time.monotonic()
    running = [subprocess.Popen(command, env={**os.environ, PART: f"{i}/{count}"}) for i in range(count)]
    late = 0
    for process in running:
        try:
            if process.wait(max(0.0, visit.left())):
                visit.wrong(f"a process that compiles ended with {process.returncode}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
    visit.add("compiled", seconds=round(time.monotonic() - began, 1), processes=count, late=late)


def work(visit: Visit, names: tuple[str, ...]) -> list[tuple[str, Callable[[], object]]]:
    """A name and a call that launches its kernels, for everything that these stages will launch."""
    from . import timing, values
    from .stages import STAGES

    found: list[tuple[str, Callable[[], object]]] = []
    device = visit.device()
    for stage in STAGES:
        if stage.name not in names:
            continue
        if stage.module == "values":
            found += values.launches(device.where, visit.rehearsal)
        elif stage.module == "timing":
            for job in {job.kernels: job for job in timing.jobs(*stage.arguments)}.values():
                found.append((job.label, lambda job=job: job.warm(device)))  # type: ignore[misc]
    return found[:2] if visit.rehearsal else found


def _launch(calls: list[tuple[str, Callable[[], object]]], visit: Visit) -> None:
    for label, call in calls:
        if visit.left() < 1:
            return
        try:
            with tf32(True):
                call()
        except Exception as error:
            visit.wrong(f"{label}: {type(error).__name__}: {error}"[:300])

"""Stage: the same short federated run on the device and on the CPU: what a round costs, and that it learns the same."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from .device import Visit
from .runner import ROOT

DIGITS = "python/spafl/configs/digits.toml"
# Data, where, engine: the first of a data set is what a CPU user has.
RUNS = tuple(
    (data, *run) for data in ("digits", "synthetic") for run in (("cpu", "auto"), ("cuda", "auto"), ("cuda", "masked"))
)
# What the configuration of the digits needs for noise of the size of CIFAR-10, and a model for it.
SYNTHETIC = (
    "data.name=synthetic", "data.image=32", "data.channels=3", "data.classes=10", "data.train=2000", "data.test=400",
    "model.name=conv4",
)  # fmt: skip
# Accuracies of the same run on two devices differ by rounding that grows over the rounds.
ALLOWED = 0.1


def run(visit: Visit) -> None:
    found: dict[tuple[str, str, str], float] = {}
    for data, where, engine in [run for run in RUNS if run[1] == "cpu"] if visit.rehearsal else RUNS:
        if visit.left() < 8:
            visit.wrong(f"no time for {data} on {where}, {engine}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            facts = _one(visit, data, where, engine, pathlib.Path(folder, "run"))
        if facts is not None:
            visit.add("run", data=data, where=where, engine=engine, **facts)
            found[data, where, engine] = facts["accuracy"]
    for (data, where, engine), accuracy in found.items():
        cpu = found.get((data, "cpu", "auto"), accuracy)
        if abs(accuracy - cpu) > ALLOWED:
            visit.wrong(f"{data} on {where}, {engine}: accuracy {accuracy:.3f}, on the CPU {cpu:.3f}")


def _rounds(totals: list[float]) -> list[float]:
    """Seconds of each round from sums over the rounds; the first holds the start of the processes."""
    return [round(now - before, 3) for before, now in zip([0.0, *totals], totals)]


def _one(visit: Visit, data: str, where: str, engine: str, out: pathlib.Path) -> dict[str, Any] | None:
    rounds = 1 if visit.rehearsal else 4
    settings = [f"rounds={rounds}", f"simulation.engine={engine}", "evaluation.every=1"]
    settings += SYNTHETIC if data == "synthetic" else ()
    settings += ["sampling.clients_per_round=2", "training.epochs=1"] if visit.rehearsal else ()
    command = [sys.executable, "-m", "spafl.cli", "run", DIGITS, "--out", str(out), "--device", where, "--quiet",
               "--no-report", *(part for s in settings for part in ("--set", s))]  # fmt: skip
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, visit.left() - 2))
    except subprocess.TimeoutExpired:
        visit.wrong(f"{data} on {where}, {engine}: not done within the time of the stage")
        return None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        visit.wrong(f"{data} on {where}, {engine}: {lines[-1]}"[:300])
        return None
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    return {
        "rounds": rounds, "seconds": round(time.monotonic() - began, 2),
        "round_seconds": _rounds([row["cost"]["seconds"]["total"] for row in rows]),
        "accuracy": last["evaluation"]["accuracy"]["mean"], "density": last["density"]["layer_mean"],
        "executed": last["cost"]["executed"],
    }  # fmt: skip

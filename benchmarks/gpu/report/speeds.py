"""Stage: steps per second of a simulation on the device and on one core of its CPU, clients' turns included.

Every client has whole batches alone, masks do not change, and the rounds counted begin when everything has run once.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from spafl_kernels.gpu.tables.engines import Speeds, Table

from .. import results
from .device import Visit
from .runner import ROOT
from .simulator import DIGITS

ROUNDS, WARM = 4, 2  # rounds, of which so many are not counted
DENSITIES = (1.0, 0.5)


class Work(NamedTuple):
    """One round: so many clients, each with so many whole batches, as often as there are epochs."""

    clients: int
    batches: int
    epochs: int


class Model(NamedTuple):
    """What is trained, on pictures of which size; ``cpu`` is less work where a step takes seconds there."""

    name: str
    batch: int
    image: int
    channels: int
    cuda: Work = Work(4, 16, 2)
    cpu: Work = Work(4, 16, 2)


MODELS = (
    Model("lenet5", 64, 28, 1),
    Model("conv4", 16, 32, 3),
    Model("resnet18-full", 64, 32, 3, cpu=Work(1, 2, 1)),
    Model("vit", 16, 32, 3, cpu=Work(2, 4, 1)),
)


def table(lines: Iterable[Mapping[str, Any]]) -> Table | None:
    """The table of engines from the lines of a report; None where it has no pair of speeds."""
    found: dict[tuple[str, int, float], dict[str, float]] = {}
    made: Mapping[str, str] = {}
    for line in lines:
        if line["kind"] == "speed":
            cell = found.setdefault((line["model"], line["batch"], line["density"]), {})
            cell[line["where"]] = line["steps_per_second"]
            made = line["made"]
    entries: dict[str, dict[int, dict[float, Speeds]]] = {}
    for (model, batch, density), speeds in found.items():
        if speeds.keys() == {"cpu", "cuda"}:
            row = entries.setdefault(model, {}).setdefault(batch, {})
            row[density] = Speeds(gpu=speeds["cuda"], cpu=speeds["cpu"])
    if not entries:
        return None
    return Table(made["gpu"], {k: v for k, v in made.items() if k not in ("gpu", "roofline")}, entries)


def run(visit: Visit) -> None:
    made = results.environment("a CPU" if visit.rehearsal else torch.cuda.get_device_name(), "")
    made["cpu"] = _processor()
    with tempfile.TemporaryDirectory() as folder:
        cells = [(model, density, where) for where in ("cuda", "cpu") for model in MODELS for density in DENSITIES]
        if visit.rehearsal:
            cells = cells[-1:]
        started = {}
        for cell in cells:
            out = pathlib.Path(folder, str(len(started)))
            model, density, where = cell
            started[cell] = out, _start(model, density, where, out)
            if where == "cuda":  # one after the other, on an idle machine; those on the CPU have a core each
                _wait(visit, started[cell][1])
        for (model, density, where), (out, process) in started.items():
            if _wait(visit, process):
                visit.wrong(f"{model.name} at density {density} on {where}: {_said(out)}")
            else:
                speed = _speed(out)
                visit.add(
                    "speed", model=model.name, batch=model.batch, density=density, where=where, steps_per_second=speed,
                    made=made,
                )  # fmt: skip


def _start(model: Model, density: float, where: str, out: pathlib.Path) -> subprocess.Popen[str]:
    work = model.cpu if where == "cpu" else model.cuda
    settings = {
        "rounds": ROUNDS, "evaluation.every": ROUNDS, "simulation.workers": 1,
        "data.name": "synthetic", "data.image": model.image, "data.channels": model.channels, "data.classes": 10,
        "data.train": work.clients * work.batches * model.batch, "data.test": 40, "model.name": model.name,
        "partition.scheme": "iid", "partition.alpha": "off", "partition.clients": work.clients,
        "sampling.clients_per_round": work.clients, "training.batch_size": model.batch, "training.epochs": work.epochs,
        "algorithm.penalty": 0, "algorithm.initial_density": density, "algorithm.importance": "none",
        "training.lr": 0.0001,
    }  # fmt: skip
    command = [sys.executable, "-m", "spafl.cli", "run", DIGITS, "--out", str(out), "--device", where,
               "--quiet", "--no-report"]  # fmt: skip
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    log = open(f"{out}.log", "w")  # noqa: SIM115 (the process has it)
    return subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def _processor() -> str:
    """What the processor is called, and how many of its cores there are."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {len(os.sched_getaffinity(0))} cores, one for a worker"


def _lines(path: str) -> list[str]:
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:
        return []


def _wait(visit: Visit, process: subprocess.Popen[str]) -> int:
    try:
        return process.wait(timeout=max(1.0, visit.left()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _said(out: pathlib.Path) -> str:
    lines = pathlib.Path(f"{out}.log").read_text().strip().splitlines()
    return (lines[-1] if lines else "not done within the time of the stage")[:300]


def _speed(out: pathlib.Path) -> float:
    costs = [json.loads(line)["cost"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = costs[WARM - 1], costs[-1]
    seconds = last["seconds"]["train"] - first["seconds"]["train"]
    return float(f"{(last['executed']['steps'] - first['executed']['steps']) / seconds:.4g}")

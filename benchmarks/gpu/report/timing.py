"""Stages that time: steps of a model or of a cohort, layers, tile sizes. The rows are those of ``benchmarks.gpu``."""

from __future__ import annotations

import dataclasses

from .. import schedule
from ..clock import tf32
from ..schedule import BOTH, GRAPH, MAIN, OPERATIONS, Job, Pass
from ..shapes import layers_of
from .device import Closed, Visit

DENSITIES = (1.0, 0.5, 0.25)
# Model, layer: few and many channels, large and small images, one 1x1, one linear layer on many rows.
LAYERS = (
    ("conv4", "conv2"), ("resnet18-full", "layer1.0.conv1"), ("resnet18-full", "layer3.0.conv2"),
    ("resnet18-full", "layer4.0.conv2"), ("resnet50", "stage3.expand"), ("lenet5", "conv1"),
    ("resnet18-full", "layer2.0.conv2"), ("vit", "transformer.layers.0.0.fn.to_qkv"),
)  # fmt: skip
# Models and batches whose layers a table of choices is made for, by arithmetic: convolutions in tf32 and linear layers
# in float32, as PyTorch computes them unless it is told otherwise; linear layers in tf32, too. The smallest come first:
# where time is short, the rest goes by what is not in a table.
CHOSEN = {
    "fp32": (("lenet5", 64), ("conv4", 16), ("vit", 16), ("conv4", 128)),
    "tf32": (("lenet5", 64), ("conv4", 16), ("resnet18-full", 64), ("conv4", 128)),
}


def run(visit: Visit, kind: str, model: str = "", batch: int = 0) -> None:
    """``kind``: ``step``, ``cohort``, ``layers``, ``choices`` or ``tune``; of the first two, with model and batch.

    Batch 0 is the published one.
    """
    work = jobs(kind, model, batch)
    device = visit.device()
    if visit.rehearsal:
        work = [dataclasses.replace(j, batch=2, part=dataclasses.replace(j.part, densities=(0.5,))) for j in work[-1:]]
    rows, machine = visit.rows(device)
    with tf32(True, benchmark=True):
        outcome = schedule.run(work, device, machine, rows, visit.left(), kernels=Closed() if visit.rehearsal else None,
                               say=lambda line: print(line, flush=True))  # fmt: skip
    for label in outcome.red:
        visit.wrong(label)
    visit.add("timed", rows=outcome.rows, left_out=outcome.left_out)


def jobs(kind: str, model: str = "", batch: int = 0) -> list[Job]:
    """What a stage measures, in order."""
    if kind in ("step", "cohort"):
        densities = DENSITIES if kind == "step" else (0.5, 0.25)
        return schedule.jobs([Pass(kind, (model,), batch, "tf32", densities, graphs=BOTH)])  # type: ignore[arg-type]
    if kind == "choices":
        parts = [
            Pass("layer", (name,), size, dtype, MAIN, ("module",), BOTH)
            for dtype, chosen in CHOSEN.items()
            for name, size in chosen
        ]
        return [job for job in schedule.jobs(parts) if job.part.dtype == "tf32" or (job.layer and job.layer.linear)]
    if kind == "tune":
        parts = [Pass("tile", ("conv4", "resnet18-full"), 128, d, (0.5, 0.25), OPERATIONS) for d in ("bf16", "tf32")]
        return schedule.jobs(parts)
    return [
        Job(part, name, layer, part.batch)
        for part in (
            Pass("layer", (), 128, "bf16", DENSITIES, (*OPERATIONS, "whole"), GRAPH),
            Pass("layer", (), 128, "tf32", DENSITIES, ("whole",), GRAPH),
        )
        for name, wanted in LAYERS
        for layer in layers_of(name)
        if layer.name == wanted
    ]

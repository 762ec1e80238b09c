"""What a training step will take, masked and compact: an estimate by what is computed, never by a clock.

An operation's time is a sum of what it does (:data:`FEATURES`), each at a price. The prices are seconds of one core,
fitted once to measured steps (``python -m benchmarks.prices`` writes ``estimate.json``), so that the same model
under the same masks gets the same estimate in every process, on every machine.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import native as extension
from ...layers import ThresholdLayer
from ..graph.flow import Flow
from ..kinds.base import Const, Op
from ..kinds.layers import Layer
from ..run.fusion import always_fused
from .plan import Plan
from .rows import Rows

__all__ = ["ENGINES", "FEATURES", "PRICES", "Estimate", "Judge", "estimate", "expectation", "plan_of", "prices", "work"]

PRICES = Path(__file__).with_name("estimate.json")
ENGINES = ("masked", "compact", "plain")  # plain: compact without the extension
BLOCK = 8  # oneDNN computes that many channels together
FEATURES = {
    "step": "once a step",
    "calls": "operations",
    "layers": "threshold layers",
    "constants": "layers that read constants",
    "samples": "operations whose constants differ by sample",
    "elements": "numbers that operations write, and read again in the backward pass",
    "convolution": "multiply-accumulates of convolutions",
    "grouped": "multiply-accumulates of convolutions in groups, depthwise ones among them",
    "linear": "multiply-accumulates of linear layers and other products",
    "weights": "numbers that the optimiser moves",
}

Work = dict[str, float]


def work(flow: Flow, plan: Plan | None, batch: int) -> dict[str, Work]:
    """By operation, what a training step does there, by feature; what belongs to none is under ``""``.

    Args:
        flow: of the model.
        plan: the rows that are computed; None: the masked engine, which computes all.
        batch: samples in the step.
    """
    found = {name: _of_op(op, flow, plan, batch) for name, op in flow.ops.items() if not op.silent}
    loose = sum(p.numel() for p in flow.model.parameters()) - sum(op.weight.numel() for op in flow.layers.values())
    found[""] = {"step": 1.0, "weights": float(loose)}
    return found


def _of_op(op: Op, flow: Flow, plan: Plan | None, batch: int) -> Work:
    share = _share(op, plan)
    size = batch * prod((op.shape or (0,))[1:]) if op.shape else 0
    if not isinstance(op, Layer):
        done: Work = {"calls": 1.0, "elements": size * share, "linear": 3.0 * batch * op.macs * share}
    else:
        done = _of_layer(op, flow, plan, batch, size)
    if plan is not None and op.layout is not None and op.const == Const.SAMPLE and share < 1:
        done["samples"] = 1.0
    if plan is not None and op.layout is None:  # what it reads is put together at full width
        for source in map(flow.ops.__getitem__, op.sources):
            reads_kept = isinstance(op, Layer) and op.reads is not None
            if source.layout is not None and source.shape and not reads_kept and _share(source, plan) < 1:
                done["elements"] += batch * prod(source.shape[1:])
    return done


def _of_layer(op: Layer, flow: Flow, plan: Plan | None, batch: int, size: int) -> Work:
    m: Any = op.module
    kernel, grouped = m.weight[0, 0].numel(), getattr(m, "groups", 1) > 1
    filters, inputs = op.weight.shape[:2]
    if plan is None:
        rows, columns = filters, inputs
        if op.is_conv and not grouped:
            rows, columns = (-(-n // BLOCK) * BLOCK for n in (rows, columns))
    else:
        rows, columns, _ = op.product(plan, padded=True)
    macs = (3 if flow.source(op).grad else 2) * batch * op.positions * kernel * rows * columns
    reads = None if plan is None or op.reads is None else plan.channels(op.reads)
    constants = reads is not None and bool(flow.source(op).const) and len(reads.dropped) > 0
    product = "linear" if isinstance(m, nn.Linear) else "grouped" if grouped else "convolution"
    return {
        "calls": 1.0,
        "layers": float(isinstance(m, ThresholdLayer)),
        "constants": float(constants),
        "elements": size * min(rows / filters, 1.0),
        product: float(macs),
        "weights": float(rows * columns * kernel),
    }


def _share(op: Op, plan: Plan | None) -> float:
    """Of an operation's channels, how many are there."""
    if plan is None or op.layout is None:
        return 1.0
    channels = plan.channels(op.layout)
    return channels.stored / channels.width


Prices = Mapping[str, Mapping[str, float]]


@functools.cache
def prices() -> Prices:
    """Seconds by engine and feature, as they were fitted."""
    found = json.loads(PRICES.read_text())["seconds"]
    if set(found) != set(ENGINES) or any(set(found[engine]) != set(FEATURES) for engine in ENGINES):
        raise ValueError(f"{PRICES.name} must have a price for {', '.join(FEATURES)}, by {', '.join(ENGINES)}")
    return found


@dataclass(frozen=True)
class Estimate:
    """Seconds of a training step, by operation: of the masked and of the compact engine. ``""`` is the rest."""

    masked: dict[str, float]
    compact: dict[str, float]

    @property
    def gain(self) -> float:
        """How many times as fast the compact step is."""
        return sum(self.masked.values()) / sum(self.compact.values())


def estimate(flow: Flow, plan: Plan, batch: int, native: bool) -> Estimate:
    """What a training step of ``batch`` samples takes; ``native``: with the compiled operators."""

    def seconds(engine: str, done: dict[str, Work]) -> dict[str, float]:
        price = prices()[engine]
        return {name: sum(price[f] * amount for f, amount in one.items()) for name, one in done.items()}

    compact = seconds("compact" if native else "plain", work(flow, plan, batch))
    return Estimate(seconds("masked", work(flow, None, batch)), compact)


def plan_of(flow: Flow, keep: dict[str, Tensor], native: bool) -> Plan:
    """The plan that a trainer makes on a CPU to compute the rows ``keep``."""
    return Plan(flow, keep, multiple=BLOCK, exact=always_fused(flow) if native else ())


def expectation(flow: Flow, keep: dict[str, Tensor], batch: int, compiled: bool = True) -> Estimate:
    """The estimate of a step that computes the rows ``keep`` in this installation, on a CPU."""
    known = next(flow.model.parameters()).dtype in (torch.float32, torch.float64)
    native = compiled and known and extension.available()
    return estimate(flow, plan_of(flow, keep, native), batch, native)


class Judge:
    """Says of a model as it is whether its compact steps are worth it, by the estimate. The last answer is kept."""

    def __init__(self) -> None:
        self._flow: Flow | None = None

    def __call__(self, flow: Flow, batch: int) -> str | None:
        """Why steps with this batch had better run masked; None if compact ones are expected to be as fast."""
        if flow is not self._flow:
            self._flow, self._rows, self._answers = flow, Rows(flow), {}  # type: ignore[var-annotated]
        keep = self._rows.of_model(gradients=True).keep
        key = batch, b"".join(mask.numpy().tobytes() for mask in keep.values())
        if key not in self._answers:
            self._answers.clear()
            gain = self.gain(flow, keep, batch)
            self._answers[key] = (
                None
                if gain >= 1
                else f"a compact step is expected to take {1 / gain:.2f} times as long as a masked one "
                f"(batch {batch}, {_share_of(keep):.0%} of the filters to be computed)"
            )
        return self._answers[key]

    def gain(self, flow: Flow, keep: dict[str, Tensor], batch: int) -> float:
        """How many times as fast compact steps are expected to be."""
        return expectation(flow, keep, batch).gain


def _share_of(keep: dict[str, Tensor]) -> float:
    return sum(int(mask.sum()) for mask in keep.values()) / max(sum(len(mask) for mask in keep.values()), 1)

"""Where a training step's time goes, layer by layer: FLOPs beside measured time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..reference import Estimator, mask_weight_and_bias
from ..training import Given, arguments_of
from .graph.flow import Flow
from .graph.follow import follow_inputs
from .graph.inputs import Form, inputs_of
from .graph.trace import check_traceable, kept_random_state
from .kinds.layers import Layer
from .plan.plan import Plan
from .plan.rows import Rows

__all__ = ["Audit", "LayerAudit", "audit"]


@dataclass(frozen=True)
class LayerAudit:
    """One layer: multiply-accumulates of a training step on the whole batch, and seconds, masked and compact.

    ``ideal`` is the share of MACs that is left, ``measured`` the share of time; ``realised`` is how much of the saving
    promised by the MACs the clock shows, ``(1 - measured) / (1 - ideal)``; None where nothing is pruned.
    """

    name: str
    density: float
    masked_macs: int
    compact_macs: int
    masked_seconds: float
    compact_seconds: float

    @property
    def ideal(self) -> float:
        return self.compact_macs / self.masked_macs

    @property
    def measured(self) -> float:
        return self.compact_seconds / self.masked_seconds

    @property
    def realised(self) -> float | None:
        return None if self.ideal == 1 else (1 - self.measured) / (1 - self.ideal)


@dataclass(frozen=True)
class Audit:
    """All layers of a model; ``str()`` is a table."""

    layers: list[LayerAudit]

    def __str__(self) -> str:
        rows = [("layer", "density", "MMACs", "left", "ms", "left", "realised")]
        for a in (*self.layers, self.total()):
            rows.append(
                (
                    a.name,
                    f"{a.density:.2f}",
                    f"{a.masked_macs / 1e6:.2f}",
                    f"{a.ideal:.1%}",
                    f"{1e3 * a.masked_seconds:.3f}",
                    f"{a.measured:.1%}",
                    "-" if a.realised is None else f"{a.realised:.0%}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))) for r in rows
        ]
        return "\n".join(lines)

    def total(self) -> LayerAudit:
        """The sum over the layers; its density is that of the parameters' filters, unweighted."""
        a = self.layers
        return LayerAudit(
            "all layers",
            statistics.fmean(x.density for x in a),
            sum(x.masked_macs for x in a),
            sum(x.compact_macs for x in a),
            sum(x.masked_seconds for x in a),
            sum(x.compact_seconds for x in a),
        )


def audit(model: nn.Module, x: Given, repeats: int = 5) -> Audit:
    """Measure every layer's forward and backward, masked and compact, on inputs of the sizes it gets from ``x``.

    Layers are timed alone, on random numbers: what the rest of a step costs (norms, activations, the update) is not in
    it. Filters are those active now, without the rows that some estimators compute although they are pruned.

    Args:
        model: a model with threshold layers; not changed.
        x: a batch the model takes: a tensor, a tuple or list of its arguments, or a dictionary of them by name.
        repeats: measurements per layer and kind; medians are taken, masked and compact in turn.

    Raises:
        Unsupported: the channels cannot be followed.
        ValueError: ``repeats`` below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1; got {repeats}")
    form, tensors = Form.of(*arguments_of(x))
    inputs, batch = inputs_of(tensors)
    flow = follow_inputs(model, inputs, check_traceable(model, form=form), batch)
    return measured(flow, Rows(flow).of_model(gradients=False).keep, batch, repeats)


@torch.inference_mode(False)
@torch.enable_grad()
def measured(flow: Flow, keep: dict[str, Tensor], batch: int, repeats: int = 5) -> Audit:
    """:func:`audit` of a model that has been read, with the rows ``keep``, bool by threshold layer, and a number of
    samples."""
    with kept_random_state():
        return _measured(flow, keep, batch, repeats)


def _measured(flow: Flow, keep: dict[str, Tensor], batch: int, repeats: int) -> Audit:
    exact, padded = Plan(flow, keep, multiple=1), Plan(flow, keep)
    found = []
    for name, op in flow.layers.items():
        m, source = op.module, flow.source(op)
        shape_in = (batch, *(source.shape or ())[1:])
        rows, columns, _ = op.product(exact, padded=False)
        stored, width, groups = op.product(padded, padded=True)
        kernel, positions = m.weight[0, 0].numel(), batch * op.positions
        passes = 3 if source.grad else 2
        macs = [passes * positions * kernel * a * b for a, b in (op.weight.shape[:2], (rows, columns))]
        dense = _timer(op, shape_in, tuple(op.weight.shape), source.grad, getattr(m, "groups", 1), mask=True)
        dim = 1 if op.is_conv else -1
        narrow = list(shape_in)
        narrow[dim] = width * groups
        weight_shape = (stored, width, *m.weight.shape[2:])
        compact = _timer(op, tuple(narrow), weight_shape, source.grad, groups, mask=False)
        times: tuple[list[float], list[float]] = ([], [])
        for run in (dense, compact):
            run()
        for _ in range(repeats):
            for run, seconds in zip((dense, compact), times):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
        density = float(keep[name].double().mean()) if name in keep else 1.0
        found.append(LayerAudit(name, density, *macs, *(statistics.median(t) for t in times)))
    return Audit(found)


def _timer(
    op: Layer,
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    input_grad: bool,
    groups: int,
    mask: bool,
) -> Callable[[], None]:
    """Forward and backward of one layer on random numbers of these shapes."""
    like: Tensor = op.module.weight
    estimator: Estimator = getattr(op.module, "estimator", "identity")
    x = torch.randn(shape, dtype=like.dtype, device=like.device, requires_grad=input_grad)
    weight = torch.randn(weight_shape, dtype=like.dtype, device=like.device, requires_grad=True)
    tau = torch.zeros(weight_shape[0], dtype=like.dtype, device=like.device, requires_grad=True)
    wanted = [weight, *([x] if input_grad else []), *([tau] if mask else [])]

    def run() -> None:
        w = mask_weight_and_bias(weight, tau, None, estimator, False)[0] if mask else weight
        y = op.apply(x, w, None, groups)
        torch.autograd.grad(y.sum(), wanted, allow_unused=True)
        if y.is_cuda:
            torch.cuda.synchronize()

    return run

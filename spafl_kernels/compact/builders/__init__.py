"""How ops become calls, by their kind: ``builder(scope, op, index of the op)`` gives the call."""

from __future__ import annotations

from collections.abc import Callable

from ..flow import Op
from ..scope import Run, Scope
from . import attention, layers, moves, norms, other, sums

BUILDERS: dict[str, Callable[[Scope, Op, int], Run]] = {
    "layer": layers.layer,
    "depthwise": layers.depthwise,
    "norm": norms.norm,
    "relu": norms.relu,
    "pool": norms.pool,
    "add": sums.add,
    "same": moves.same,
    "flatten": moves.flatten,
    "dropout": moves.dropout,
    "cat": moves.cat,
    "split": moves.split,
    "item": moves.item,
    "attention": attention.attention,
    "shape": other.shape,
    "other": other.other,
    "unary": norms.relu,
}

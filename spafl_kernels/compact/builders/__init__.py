"""How ops become calls, by their kind: ``builder(program, op, index of the op)`` gives the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import attention, layers, moves, norms, other, sums

if TYPE_CHECKING:
    from ..flow import Op
    from ..program import Program, Run

BUILDERS: dict[str, Callable[[Program, Op, int], Run]] = {
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

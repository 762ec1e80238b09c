"""What the calls of a program are made from: the model's flow, its plan, and where every value will be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import native
from ..graph.flow import Flow
from ..plan.plan import Channels, Plan
from ..plan.slots import LayerSlot, NormSlot
from .fusion import deferred, tails
from .spread import Spread

if TYPE_CHECKING:
    from ..kinds.base import Op
    from ..kinds.layers import Layer
    from ..kinds.norms import BatchNorm

__all__ = ["Run", "Scope", "Values"]


class Values:
    """The values of one pass, each with a place in three lists.

    Attributes:
        kept: the kept channels; all, where a value has no layout.
        constants: the dropped channels (:mod:`.constants`).
        wide: the value at full width, once somebody has asked for it.
    """

    __slots__ = ("constants", "kept", "wide")

    def __init__(self, count: int) -> None:
        self.kept: list[Any] = [None] * count
        self.constants: list[Any] = [None] * count
        self.wide: list[Any] = [None] * count


# A call of a program. The flag is for functional calls; modules read their own.
Run = Callable[[Values, bool], None]


class Scope:
    """Flow, plan and slots; ``macs`` and ``macs_fixed`` are added up by the calls.

    Attributes:
        index: where the value of every operation is; those that are one call have one place.
        tails: by layer or norm, what is a part of its call.
        places: how many values there are.
        deferred: the ReLUs that wait for the max-pool behind them.
    """

    def __init__(
        self,
        flow: Flow,
        plan: Plan,
        layers: dict[str, LayerSlot],
        norms: dict[str, NormSlot],
        channels_last: bool = False,
        compiled: bool = True,
    ) -> None:
        self.flow, self.plan, self.layers, self.norms = flow, plan, layers, norms
        self.channels_last = channels_last
        weight = next(flow.model.parameters())
        self.device = weight.device
        floats = (torch.float32, torch.float64)
        self.native = compiled and weight.device.type == "cpu" and weight.dtype in floats and native.available()
        self.macs = self.macs_fixed = 0
        self.tails = {}
        if self.native:
            heads: list[Layer | BatchNorm] = [*flow.layers.values(), *flow.norms.values()]
            found = tails(flow)
            self.tails = {op.name: found[op.name] for op in heads if op.name in found and op.takes_tail(self)}
        self.deferred = deferred(flow, self.tails)
        self.index = {name: i for i, name in enumerate(flow.ops)}
        self.places = len(self.index)
        for head, tail in self.tails.items():
            self.index.update(dict.fromkeys(tail.names, self.index[head]))
        for name, relu in self.deferred.items():
            self.index[name] = self.index[relu.sources[0]]

    def runs(self, op: Op) -> bool:
        """Whether an operation has a call of its own."""
        return (
            not op.silent and op.name not in self.deferred and not any(op.name in t.names for t in self.tails.values())
        )

    def channels(self, op: Op) -> Channels | None:
        """Which channels of an op's result are kept; None at full width."""
        return None if op.layout is None else self.plan.channels(op.layout)

    def op(self, name: str) -> Op:
        return self.flow.ops[name]

    def extra_place(self) -> int:
        """A place for a value that no operation of the trace has; who takes it clears it."""
        self.places += 1
        return self.places - 1

    def full(self, name: str, place: int | None = None) -> Callable[[Values], Any]:
        """Reads a value at full width; ``place``: where it is, if not in its own."""
        op, j = self.op(name), self.index[name] if place is None else place
        channels = self.channels(op)
        if channels is None or channels.full:
            return lambda env: env.kept[j]
        assert op.layout is not None
        spread = Spread(channels.host.kept, channels.width, op.layout.dim, self.native, self.device)

        def full(env: Values) -> Tensor:
            if env.wide[j] is None:
                env.wide[j] = spread(env.kept[j], env.constants[j], None)
            return env.wide[j]

        return full

"""What the builders of a program know: the model's flow, its plan, and where every value will be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import native
from .flow import Flow, Op
from .fusion import fused_norms, fused_pools
from .plan import Channels, Plan
from .slots import LayerSlot, NormSlot
from .spread import Spread

# A call of a program: it reads and writes the values of one pass. The flag is for functional calls; modules read their
# own.
Run = Callable[[list[Any], bool], None]


class Scope:
    """Flow, plan and slots; ``macs`` and ``macs_fixed`` are added up by the builders.

    A value has four places in the list that calls read and write, ``count`` apart: at ``index`` its kept channels, then
    the constants of its dropped channels (None when they are all 0), its copy at full width once somebody asked for
    one, and whether a fused call has made it.
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
        self.fused_pools = fused_pools(flow) if self.native else {}
        self.fused_norms = fused_norms(flow) if self.native else {}
        self.macs = self.macs_fixed = 0
        self.index = {name: i for i, name in enumerate(flow.ops)}
        self.count = len(self.index)
        self.names = {id(op.module): name for ops in (flow.layers, flow.norms) for name, op in ops.items()}

    def channels(self, op: Op) -> Channels | None:
        """Which channels of an op's result are kept; None at full width."""
        return None if op.layout is None else self.plan.channels(op.layout)

    def op(self, name: str) -> Op:
        return self.flow.ops[name]

    def full(self, name: str) -> Callable[[list[Any]], Any]:
        """Reads a value at full width."""
        op, j, n = self.op(name), self.index[name], self.count
        channels = self.channels(op)
        if channels is None or channels.full:
            return lambda env: env[j]
        assert op.layout is not None
        spread = Spread(channels.host.kept, channels.width, op.layout.dim, self.native, self.device)

        def full(env: list[Any]) -> Tensor:
            if env[2 * n + j] is None:
                env[2 * n + j] = spread(env[j], env[n + j], None)
            return env[2 * n + j]

        return full

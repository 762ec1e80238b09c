"""A compact plan turned into a list of calls: the forward pass on compact activations.

Every value has two parts: the tensor of kept channels, and the constants of its dropped channels (None when they are
all 0). The tensors of layers and norms are read from slots at every run, so that whoever owns them may replace them.
The calls themselves are in :mod:`~spafl_kernels.compact.builders`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import native
from .builders import BUILDERS
from .flow import Flow, Op
from .fusion import fused_norms, fused_pools
from .plan import Channels, Plan
from .slots import LayerSlot, NormSlot
from .spread import Spread

# Reads and writes the values of one pass; the flag is for functional calls, as modules read their own.
Run = Callable[[list[Any], bool], None]


class Program:
    """Runs ``flow`` under ``plan``. ``macs`` are executed per sample by one training step, ``macs_fixed`` per step."""

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
        floats = (torch.float32, torch.float64)
        self.native = compiled and weight.device.type == "cpu" and weight.dtype in floats and native.available()
        self.fused_pools = fused_pools(flow) if self.native else {}
        self.fused_norms = fused_norms(flow) if self.native else {}
        self.macs = self.macs_fixed = 0
        self.index = {name: i for i, name in enumerate(flow.ops)}
        self.count = len(self.index)
        self.names = {id(op.module): name for ops in (flow.layers, flow.norms) for name, op in ops.items()}
        self.pooled_first: set[str] = set()
        self._calls: list[tuple[Run, tuple[int, ...]]] = []
        last = {name: op.name for op in flow.ops.values() for name in op.sources}
        last[flow.output] = ""
        for op in flow.ops.values():
            if op.kind == "input":
                self._input = self.index[op.name]
                continue
            if op.kind in ("output", "inner"):
                continue
            run = BUILDERS[op.kind](self, op, self.index[op.name])
            n = self.count
            frees = [self.index[s] for s in dict.fromkeys(op.sources) if last[s] == op.name]
            self._calls.append((run, tuple(i + part * n for i in frees for part in range(4))))
        self._output = self.full(flow.output)

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """The model's output for a batch, at full width.

        ``training`` is for functional calls; modules read their own flag.
        """
        # Per value: the kept channels, the constants, the full-width copy, and whether a fused call has made it.
        env: list[Any] = [None] * (4 * self.count)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        env[self._input] = x
        for run, frees in self._calls:
            run(env, training)
            for i in frees:
                env[i] = None
        return self._output(env)

    def channels(self, op: Op) -> Channels | None:
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
        spread = Spread(channels.kept, channels.width, op.layout.dim, self.native)

        def full(env: list[Any]) -> Tensor:
            if env[2 * n + j] is None:
                env[2 * n + j] = spread(env[j], env[n + j], None)
            return env[2 * n + j]

        return full

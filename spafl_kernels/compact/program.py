"""A compact plan turned into a list of calls: the forward pass on compact activations.

Every value has two parts: the tensor of kept channels, and the constants of its dropped channels (None when they are
all 0). The tensors of layers and norms are read from slots at every run, so that whoever owns them may replace them.
The calls themselves are made in :mod:`~spafl_kernels.compact.builders`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .builders import BUILDERS
from .scope import Run, Scope


class Program:
    """Runs a flow under a plan. ``macs`` are executed per sample by one training step, ``macs_fixed`` per step."""

    def __init__(self, scope: Scope) -> None:
        flow, index, n = scope.flow, scope.index, scope.count
        self._channels_last, self._places = scope.channels_last, 4 * n
        self._calls: list[tuple[Run, tuple[int, ...]]] = []
        last = {name: op.name for op in flow.ops.values() for name in op.sources}
        last[flow.output] = ""
        for op in flow.ops.values():
            if op.kind == "input":
                self._input = index[op.name]
                continue
            if op.kind in ("output", "inner"):
                continue
            run = BUILDERS[op.kind](scope, op, index[op.name])
            frees = [index[s] for s in dict.fromkeys(op.sources) if last[s] == op.name]
            self._calls.append((run, tuple(i + part * n for i in frees for part in range(4))))
        self._output = scope.full(flow.output)
        self.macs, self.macs_fixed = scope.macs, scope.macs_fixed

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """The model's output for a batch, at full width.

        ``training`` is for functional calls; modules read their own flag.
        """
        env: list[Any] = [None] * self._places
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        env[self._input] = x
        for run, frees in self._calls:
            run(env, training)
            for i in frees:
                env[i] = None
        return self._output(env)

"""A compact plan turned into a list of calls: the forward pass on compact activations.

Every value has two parts: the tensor of kept channels, and the constants of its dropped channels (None when they are
all 0). The tensors of layers and norms are read from slots at every run, so that whoever owns them may replace them.
The calls themselves are made in :mod:`~spafl_kernels.compact.builders`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from .builders import BUILDERS
from .scope import Run, Scope


class Program:
    """Runs a flow under a plan. ``macs`` are executed per sample by one training step, ``macs_fixed`` per step."""

    def __init__(self, scope: Scope) -> None:
        flow, index, n = scope.flow, scope.index, scope.count
        self._channels_last, self._places = scope.channels_last, 4 * n
        self._calls: list[tuple[Run, tuple[int, ...]]] = []
        self._scope, self._names = scope, []  # type: tuple[Scope, list[str]]
        last = {name: op.name for op in flow.ops.values() for name in op.sources}
        last |= {s: "" for op in flow.ops.values() if op.kind == "output" for s in op.sources}
        for op in flow.ops.values():
            if op.kind == "input":
                self._input = index[op.name]
                continue
            if op.kind in ("output", "inner"):
                continue
            run = BUILDERS[op.kind](scope, op, index[op.name])
            frees = [index[s] for s in dict.fromkeys(op.sources) if last[s] == op.name]
            self._names.append(op.name)
            self._calls.append((run, tuple(i + part * n for i in frees for part in range(4))))
        self._outputs = flow.outputs
        self._reads = {s: scope.full(s) for op in flow.ops.values() if op.kind == "output" for s in op.sources}
        self.macs, self.macs_fixed = scope.macs, scope.macs_fixed

    def __call__(self, x: Tensor, training: bool) -> Any:
        """What the model returns for a batch, at full width.

        ``training``: the first of the trace's patterns rather than the second; modules read their own flag.
        """
        env: list[Any] = [None] * self._places
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        env[self._input] = x
        for run, frees in self._calls:
            run(env, training)
            for i in frees:
                env[i] = None
        return _filled(self._outputs, lambda node: self._reads[node.name](env))

    def values(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every tensor on the way, at full width, by the name of its node; for a program without fused calls."""
        env: list[Any] = [None] * self._places
        env[self._input] = x
        for name, (run, _) in zip(self._names, self._calls):
            run(env, True)
            value = self._scope.full(name)(env)
            if isinstance(value, Tensor):
                yield name, value.clone()


def _filled(value: Any, read: Callable[[fx.Node], Any]) -> Any:
    """What ``forward`` returns, with values for nodes."""
    if isinstance(value, fx.Node):
        return read(value)
    if isinstance(value, tuple):
        return tuple(_filled(v, read) for v in value)
    if isinstance(value, list):
        return [_filled(v, read) for v in value]
    if isinstance(value, dict):
        return {k: _filled(v, read) for k, v in value.items()}
    return value

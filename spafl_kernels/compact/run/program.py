"""A compact plan turned into a list of calls: the forward pass on compact activations.

Every value has two parts: the tensor of kept channels, and the constants of its dropped channels (None when they are
all 0). The tensors of layers and norms are read from slots at every run, so that whoever owns them may replace them.
The calls themselves are made by the kinds of operation (:mod:`~spafl_kernels.compact.kinds`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..kinds.ends import Input, Output
from .scope import Run, Scope, Values

__all__ = ["Program", "Values"]


class Program:
    """Runs a flow under a plan. ``macs`` are executed per sample by one training step, ``macs_fixed`` per step."""

    def __init__(self, scope: Scope) -> None:
        flow, index = scope.flow, scope.index
        ops = [op for op in flow.ops.values() if scope.runs(op)]
        outputs = [s for op in flow.ops.values() if isinstance(op, Output) for s in op.sources]
        self._channels_last, self._scope = scope.channels_last, scope
        self._inputs = [index[op.name] for op in flow.ops.values() if isinstance(op, Input)]
        self._names = [op.name for op in ops]
        last = {index[s]: op.name for op in ops for s in op.sources} | {index[s]: "" for s in outputs}
        self._calls: list[tuple[Run, tuple[int, ...]]] = []
        for op in ops:
            frees = (i for i in dict.fromkeys(index[s] for s in op.sources) if last[i] == op.name)
            self._calls.append((op.build(scope, index[op.name]), tuple(frees)))
        self._outputs, self._places = flow.outputs, scope.places
        self._reads = {s: scope.full(s) for s in outputs}
        self.macs, self.macs_fixed = scope.macs, scope.macs_fixed

    def __call__(self, x: Tensor | Sequence[Tensor], training: bool) -> Any:
        """What the model returns for a batch, or for the tensors that it is called with, at full width.

        ``training``: the first of the trace's patterns rather than the second; modules read their own flag.
        """
        env = Values(self._places)
        kept, constants, wide = env.kept, env.constants, env.wide
        for i, t in zip(self._inputs, (x,) if isinstance(x, Tensor) else x, strict=True):
            images = self._channels_last and t.dim() == 4
            kept[i] = t.contiguous(memory_format=torch.channels_last) if images else t
        for run, frees in self._calls:
            run(env, training)
            for i in frees:
                kept[i] = constants[i] = wide[i] = None
        return _filled(self._outputs, lambda node: self._reads[node.name](env))

    def values(self, tensors: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor on the way, at full width, by the name of its node; those inside a fused call are left out."""
        env = Values(self._places)
        for i, t in zip(self._inputs, tensors, strict=True):
            env.kept[i] = t
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
        parts = [_filled(v, read) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [_filled(v, read) for v in value]
    if isinstance(value, dict):
        return {k: _filled(v, read) for k, v in value.items()}
    return value

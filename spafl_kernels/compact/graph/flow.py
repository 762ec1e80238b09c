"""Channel flow: which threshold layers decide which channels of which tensor.

The model is traced with ``torch.fx`` and every tensor gets a :class:`Layout`: its channel dimension as a list of
segments, each a range of some threshold layer's filters, or of several layers' filters that were added: a channel of
a residual stream is kept as long as one of the layers that write to it keeps it. A consumer whose input has a layout
needs only the columns of the channels that are kept. Where a layout cannot be carried on, the tensor is expanded to
full width, and :attr:`Flow.stops` says which edge and why.

Dropped channels are constants: 0, or one number per channel that is the same for every sample and position (a kept
bias, or what BatchNorm makes of a constant). Only operations that keep them so are followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from .inputs import Input
from .layout import Layout
from .trace import Trace

if TYPE_CHECKING:
    from ..kinds.base import Op
    from ..kinds.layers import Layer
    from ..kinds.norms import BatchNorm

__all__ = ["Flow"]


@dataclass
class Flow:
    """A traced model: ``ops`` in order, and what was found about its layers.

    Args:
        inputs: what is known of the tensors that the model is called with.
        trace: what was read, and what it holds good for.
        batch: samples in the shapes of ``ops``.
        layers, norms: op of every compactable layer (convolution, linear) and BatchNorm, by module name.
        proofs: by threshold layer, why the gradient of its pruned rows is zero although the estimator lets it pass:
            ``None`` if it need not be, else the norms between the layer and the ReLU that blocks it, each
            ``(norm name or "", layout of the norm's input or None)``; blocked where the constant in front of the ReLU
            is <= 0.
        stops: ``(edge, reason)`` where channels could not be followed.
        loose: names of parameters that are used at full width (not in ``layers`` or ``norms``) and have a gradient.
        unused: names of thresholds that nothing in the result depends on; only a penalty moves them.
        apart: threshold layers that are not in ``layers``, and why: they run as they are.
        whole: modules that run as they are though their kind is known, and why.
        writers: names of nodes that write to their first argument, which must be a copy.
        stored: what becomes of dropped channels must be a number before the model runs, for an exported model.
        output, outputs: the first node that is returned, and all of them as ``forward`` returns them.
    """

    model: nn.Module
    inputs: tuple[Input, ...]
    trace: Trace
    ops: dict[str, Op] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    norms: dict[str, BatchNorm] = field(default_factory=dict)
    proofs: dict[str, tuple[tuple[str, Layout | None], ...] | None] = field(default_factory=dict)
    stops: list[tuple[str, str]] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    apart: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)
    output: str = ""
    outputs: Any = None
    stored: bool = False
    batch: int = 2

    def __post_init__(self) -> None:
        # A module registered under two names is one module: name it as named_modules does.
        self.names = {id(m): name for name, m in self.model.named_modules()}

    def explain(self) -> str:
        lines = []
        for name in self.layers:
            origin = "input at full width"
            if (layout := self.layout_in(name)) is not None:
                origin = "input columns from " + ", ".join(source or "(dense)" for source in layout.sources)
            lines.append(f"{name}: {origin}")
        lines += [f"{name}: as it stands, at full width: {reason}" for name, reason in self.apart.items()]
        for edge, reason in self.stops:
            lines.append(f"full width at {edge}: {reason}")
        return "\n".join(lines)

    def layout_in(self, name: str) -> Layout | None:
        """Layout of what a layer or norm reads, None at full width."""
        return self.layers[name].reads if name in self.layers else self.norms[name].reads

    def source(self, op: Op) -> Op:
        """The first operation that ``op`` reads."""
        return self.ops[op.sources[0]]

    def users(self, op: Op) -> list[Op]:
        """The operations that read ``op``, questions for its shape included."""
        return [self.ops[user.name] for user in op.node.users]

    def single_reader(self, op: Op) -> bool:
        """Whether one operation alone reads the numbers of ``op``."""
        from ..kinds.ends import Shape

        return len([user for user in self.users(op) if not isinstance(user, Shape)]) == 1

    def read_compact(self, op: Op) -> bool:
        """Whether a layer or norm can read the channels of ``op`` that are kept, through whatever follows channels."""
        return any(u.reads_channels for u in self.through(op))

    def through(self, op: Op) -> Iterator[Op]:
        """The operations that read ``op``, also through whatever follows channels; each once, however many ways lead
        to it."""
        seen, pending = {op.name}, [op]
        while pending:
            for user in self.users(pending.pop()):
                if user.name not in seen:
                    seen.add(user.name)
                    yield user
                    pending += [user] if user.passes_channels else []

    def stop(self, op: Op, reason: str) -> None:
        """Note that ``op`` reads at full width, and why."""
        for source in op.sources:
            layout = self.ops[source].layout
            if layout is not None:
                self.stops.append((f"{', '.join(filter(None, layout.sources))} -> {op.name}", reason))

    def attribute(self, path: str) -> Any:
        """What a ``get_attr`` node reads."""
        if path in self.trace.constants:
            return self.trace.constants[path]
        parent, _, name = path.rpartition(".")
        return getattr(self.model.get_submodule(parent), name)

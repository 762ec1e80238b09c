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

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import nn

from .layout import Layout
from .trace import Trace


@dataclass
class Op:
    """One node of the trace.

    Args:
        kind: ``input``, ``layer``, ``depthwise``, ``norm``, ``relu`` (any activation with f(x) = f'(x) = 0 for
            x <= 0), ``unary``, ``pool``, ``same``, ``flatten``, ``dropout``, ``add``, ``cat``, ``split``, ``item``,
            ``shape``, ``attention``, ``inner`` (part of one), ``output`` or ``other`` (runs at full width).
        sources: names of the tensor inputs that are followed.
        layout: of the result; None at full width.
        const: dropped channels of the result may be constants other than 0.
        grad: the result depends on a parameter that is not frozen.
        apply: the function of a ``relu``, ``unary``, ``pool`` or ``same`` op.
        shape: of the result at batch 2; None if it is not a tensor.
        macs: of an ``other`` op, per sample, forward only.
        data: what the kind needs; of an ``other`` op that could be followed, why it is not.
        writes: an ``other`` op that writes to its first argument, which must be a copy.
    """

    node: Any  # fx.Node, whose arguments are typed too widely to be of help
    kind: str
    sources: tuple[str, ...] = ()
    layout: Layout | None = None
    const: bool = False
    grad: bool = False
    apply: Callable[..., Any] | None = None
    module: Any = None
    shape: tuple[int, ...] | None = None
    macs: int = 0
    data: Any = None
    writes: bool = False

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def positions(self) -> int:
        """Of a layer: the places in one sample's result where a filter is applied."""
        shape = self.shape or ()
        return prod(shape[2:] if isinstance(self.module, nn.Conv2d) else shape[1:-1])


@dataclass
class Flow:
    """A traced model: ``ops`` in order, and what was found about its layers.

    Args:
        layers, norms: op of every compactable layer (convolution, linear) and BatchNorm, by module name.
        proofs: by threshold layer, why the gradient of its pruned rows is zero although the estimator lets it pass:
            ``None`` if it need not be, else the norms between the layer and the ReLU that blocks it, each
            ``(norm name or "", layout of the norm's input or None)``; blocked where the constant in front of the ReLU
            is <= 0.
        stops: ``(edge, reason)`` where channels could not be followed.
        loose: names of parameters that are used at full width (not in ``layers`` or ``norms``) and have a gradient.
        unused: names of thresholds that nothing in the result depends on; only a penalty moves them.
        apart: threshold layers that are not in ``layers``, and why: they run as they are.
        output, outputs: the first node that is returned, and all of them as ``forward`` returns them.
        trace: what was read, and what it holds good for.
    """

    model: nn.Module
    image: tuple[int, ...]
    ops: dict[str, Op] = field(default_factory=dict)
    layers: dict[str, Op] = field(default_factory=dict)
    norms: dict[str, Op] = field(default_factory=dict)
    proofs: dict[str, tuple[tuple[str, Layout | None], ...] | None] = field(default_factory=dict)
    stops: list[tuple[str, str]] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    apart: dict[str, str] = field(default_factory=dict)
    output: str = ""
    outputs: Any = None
    trace: Trace | None = None

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
        op = self.layers[name] if name in self.layers else self.norms[name]
        return op.data

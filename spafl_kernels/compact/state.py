"""What the compact engines are made of: a layer's tensors, gathers, and what happens to rows that are pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import ThresholdLayer
from ..training import SGDOptions
from .flow import Flow, Layout
from .plan import Channels
from .program import LayerSlot

__all__ = [
    "Condition", "Gather", "LayerState", "Piece", "Powers", "VectorGather", "all_channels", "full_name", "per_filter",
    "put_rows", "same_channels",
]  # fmt: skip


class LayerState:
    """One convolution or linear: its full tensors, and its place in the arena."""

    def __init__(self, name: str, module: Any, index: int) -> None:
        self.name, self.module = name, module
        self.rows = module.weight.shape[0]
        self.inputs = module.weight.shape[1]
        self.size = module.weight[0].numel()
        self.is_threshold = isinstance(module, ThresholdLayer)
        self.window = self.is_threshold and module.estimator == "window"
        self.mask_bias = self.is_threshold and module.mask_bias
        self.begin = index  # of its first threshold among all thresholds
        # A convolution in groups needs its rows where they are.
        self.all_rows = isinstance(module, nn.Conv2d) and module.groups > 1 and module.weight.shape[1] > 1
        self.all_rows |= isinstance(module, nn.Conv2d) and module.groups not in (1, module.out_channels)
        self.slot = LayerSlot(module.weight)
        # Set by each plan: views of the arena as matrices, one row per kept filter.
        self.kept_rows: Any = None
        self.kept_grad: Any = None
        self.dead_rows: Any = None
        self.dead_grad: Any = None
        self.dead_const = False  # dropped columns read constants, so autograd gives their gradient
        self.dots: Any = None  # r_i of every row
        # Set by each change of the masks.
        self.far: Tensor | None = None
        self.signed = False
        self.mask_grad: Any = None
        self.row_channels: Channels | None = None
        self.column_channels: Channels | None = None

    def read(self, momentum: Mapping[str, Tensor]) -> None:
        prefix = f"{self.name}." if self.name else ""
        m = self.module
        self.weight = m.weight.data.view(self.rows, self.inputs, -1)
        self.momentum = momentum[f"{prefix}weight"].view(self.rows, self.inputs, -1) if momentum else None
        self.bias = None if m.bias is None else m.bias.data
        self.bias_momentum = momentum[f"{prefix}bias"] if momentum and m.bias is not None else None


@dataclass
class Piece:
    """One tensor in the arena: where it belongs, and where it is."""

    key: tuple[str, str]
    shape: tuple[int, ...]
    at: int = 0

    @property
    def size(self) -> int:
        size = 1
        for s in self.shape:
            size *= s
        return size

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.at : self.at + self.size].view(self.shape)


def per_filter(value: Tensor, layout: Layout, name: str, rows: int) -> Tensor:
    """By filter of layer ``name``: the largest of its channels' values in ``layout``, or 0 if that is larger."""
    out, at = value.new_zeros(rows), 0
    for s in layout.segments:
        if s.source == name:
            part = value[at : at + s.width].view(-1, s.repeat).amax(1)
            out[s.start : s.stop] = torch.maximum(out[s.start : s.stop], part)
        at += s.width
    return out


def full_name(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def all_channels(width: int, device: torch.device) -> Channels:
    return Channels(width, torch.arange(width, device=device), torch.empty(0, dtype=torch.int64, device=device), 0)


def same_channels(a: Channels, b: Channels | None) -> bool:
    return b is not None and a.pads == b.pads and torch.equal(a.kept, b.kept)


def put_rows(full: Tensor, rows: Channels, values: Tensor) -> None:
    if len(rows.dropped):
        full.index_copy_(0, rows.kept, values)
    else:
        full.copy_(values)


class Gather:
    """Takes a layer's weight and momentum at its kept rows and its kept or dropped columns."""

    def __init__(self, layer: LayerState, which: str) -> None:
        self.layer, self.which = layer, which

    def take(self) -> tuple[Tensor, Tensor | None]:
        rows, cols = self.layer.row_channels, self.layer.column_channels
        assert rows is not None and cols is not None

        def part(full: Tensor) -> Tensor:
            x = full.index_select(0, rows.kept) if len(rows.dropped) else full
            pads = 0
            if self.which == "dropped":
                x = x.index_select(1, cols.dropped)
            else:
                pads = cols.pads
                x = x.index_select(1, cols.kept) if len(cols.dropped) else x
            return F.pad(x, (0, 0, 0, pads, 0, rows.pads)) if pads or rows.pads else x

        momentum = self.layer.momentum
        return part(self.layer.weight), None if momentum is None else part(momentum)


class VectorGather:
    """Takes a per-channel vector and its momentum at the kept (then zeros) or the dropped channels."""

    def __init__(self, full: Tensor, momentum: Tensor | None, channels: Channels, dropped: bool = False) -> None:
        self.full, self.momentum, self.channels, self.dropped = full, momentum, channels, dropped

    def take(self) -> tuple[Tensor, Tensor | None]:
        def part(full: Tensor) -> Tensor:
            if self.dropped:
                return full[self.channels.dropped]
            return F.pad(full[self.channels.kept], (0, self.channels.pads))

        return part(self.full), None if self.momentum is None else part(self.momentum)


class Powers:
    """``M^k`` of the map that SGD without a gradient applies to ``(w, v)``: ``v <- mu v + wd w; w <- w - lr v``."""

    def __init__(self, options: SGDOptions, dtype: torch.dtype, device: torch.device) -> None:
        lr, mu, wd = options.lr, options.momentum, options.weight_decay
        self._step = torch.tensor([[1 - lr * wd, -lr * mu], [wd, mu]], dtype=torch.float64)
        self._rows = [torch.eye(2, dtype=torch.float64)]
        self._dtype, self._device = dtype, device
        self._table: Tensor | None = None

    def at(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``a, b, c, d`` of ``w <- a w + b v; v <- c w + d v`` after ``steps`` (int64) steps."""
        need = int(steps.max()) + 1 if steps.numel() else 1
        if self._table is None or need > len(self._table):
            size = max(64, 2 * need)
            while len(self._rows) < size:
                self._rows.append(self._step @ self._rows[-1])
            self._table = torch.stack(self._rows).flatten(1).to(self._dtype).to(self._device)
        a, b, c, d = self._table[steps].unbind(1)
        return a, b, c, d


class Condition:
    """When the pruned rows of a layer must be computed although they are pruned."""

    def __init__(
        self, layer: LayerState, proof: tuple[tuple[str, Layout | None], ...] | None, noisy: list[Any]
    ) -> None:
        self.layer, self.proof, self.noisy = layer, proof, noisy
        # The answer cannot change while the masks stay.
        self.fixed = layer.all_rows or (proof is None and not noisy)

    @classmethod
    def of(cls, flow: Flow, layer: LayerState) -> Condition | None:
        proof = flow.proofs[layer.name]
        bias = layer.module.bias is not None and not layer.mask_bias
        noisy = []
        if bias:
            # BatchNorm of a constant c != 0 is beta up to rounding; at beta = 0 the sign of that rounding decides
            # whether ReLU passes a gradient, so such channels are computed as they are.
            noisy = [
                (name, layout)
                for name in flow.norms
                if (layout := flow.layout_in(name)) is not None and any(s.source == layer.name for s in layout.segments)
            ]
        if proof is not None and not bias and not layer.all_rows and all(not norm for norm, _ in proof):
            return None
        return cls(layer, proof, noisy)

    def carry(self, trainer: Any, far: Tensor | None) -> Tensor | None:
        """Rows to keep though pruned (also set for active ones): bool ``(rows,)`` or None."""
        layer = self.layer
        if layer.all_rows:
            return torch.ones(layer.rows, dtype=torch.bool, device=trainer._device)
        result: Tensor | None = None
        passes = not layer.window
        if layer.window and far is not None:
            part = far[layer.begin : layer.begin + layer.rows]
            passes = bool(part.any())
        if passes:
            if self.proof is None:
                result = torch.ones(layer.rows, dtype=torch.bool, device=trainer._device)
            else:
                result = torch.zeros(layer.rows, dtype=torch.bool, device=trainer._device)
                for norm, layout in self.proof:
                    result |= trainer._constant_in_front(layer, norm, layout) > 0
            if layer.window:
                result = result & part
        for norm, layout in self.noisy:
            zero = trainer._constant_in_front(layer, norm, layout, zero=True) > 0
            result = zero if result is None else result | zero
        return result

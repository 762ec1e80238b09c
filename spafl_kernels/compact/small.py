"""An exported model while it is made: its graph, its modules, and what is known of every value."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..convert import to_dense
from .graph.flow import Flow
from .plan.plan import Channels, Plan
from .run.constants import all_places, chosen, like_value

__all__ = ["Small", "Value", "dense_copy", "out_of_place", "take_rows_of"]


@dataclass
class Value:
    """A node of the new graph.

    ``channels``: those that are kept (None: all); ``constants``: see :mod:`.run.constants`.
    """

    node: fx.Node
    channels: Channels | None
    constants: Tensor | None = None

    def __post_init__(self) -> None:
        if self.channels is None or not len(self.channels.dropped):
            self.constants = None


class Small:
    """The graph of a small model under a plan.

    Args:
        flow: of the model, in eval mode.
        plan: which filters are kept.
        folded: by layer, the norm that becomes a part of it.

    Attributes:
        values: by operation, what it has become.
    """

    def __init__(self, flow: Flow, plan: Plan, folded: Mapping[str, Any]) -> None:
        self.flow, self.plan, self.folded = flow, plan, folded
        self.root, self.graph = nn.Module(), fx.Graph()
        self.values: dict[str, Value] = {}
        self._wide: dict[str, fx.Node] = {}
        self._moved = 0

    def finished(self) -> nn.Module:
        self.graph.output(fx.node.map_arg(self.flow.outputs, lambda node: self.full(node.name)))
        self.graph.eliminate_dead_code(
            is_impure_node=lambda n: n.op in ("placeholder", "output") or n.target in ("__setitem__", torch._assert)
        )
        module = fx.GraphModule(self.root, self.graph, class_name=f"{type(self.flow.model).__name__}Small")
        module.delete_all_unused_submodules()
        # The TorchScript exporter to ONNX takes what has a graph for a scripted module, and asks that for its names.
        for names in ("inputs", "outputs"):
            setattr(module.graph, names, list)
        return module.eval()

    def source(self, op: Any) -> Value:
        return self.values[op.sources[0]]

    def channels(self, op: Any) -> Channels | None:
        return None if op.layout is None else self.plan.channels(op.layout)

    # -- pieces of the graph ---------------------------------------------------------------------------------------

    def module(self, name: str, m: nn.Module, *args: Any, **kwargs: Any) -> fx.Node:
        target = name.replace(".", "_") or "layer"
        self.root.add_module(target, m)
        return self.graph.call_module(target, args, kwargs)

    def buffer(self, name: str, value: Tensor) -> fx.Node:
        target = name.replace(".", "_")
        self.root.register_buffer(target, value.clone())
        return self.graph.get_attr(target)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def of_one_size(self, node: fx.Node, shape: tuple[int, ...], dim: int) -> None:
        """Refuse other sizes of a value than those of ``shape``, but for batch and channels, when the model runs.

        Constants that go with it are those of this size, and what is added to a value of size 1 is broadcast.
        """
        asked = self.call(getattr, node, "shape")
        for part in (slice(1, dim), slice(dim + 1, len(shape))):
            if shape[part]:
                same = self.call(operator.eq, self.call(operator.getitem, asked, part), tuple(shape[part]))
                self.call(torch._assert, same, f"exported for values of size {shape[1:]}; export it for others")

    # -- channels --------------------------------------------------------------------------------------------------

    def full(self, name: str) -> fx.Node:
        """The value at full width."""
        value = self.values[name]
        if value.channels is None or value.channels.full:
            return value.node
        if name not in self._wide:
            everything = torch.arange(value.channels.width, device=value.channels.kept.device)
            self._wide[name] = self.relayout(name, everything)
        return self._wide[name]

    def relayout(self, name: str, wanted: Tensor, zeros: int = 0) -> fx.Node:
        """The channels ``wanted``: kept ones moved, dropped ones filled with their constants; then so many zeros."""
        op, value = self.flow.ops[name], self.values[name]
        channels, layout = value.channels, op.layout
        assert channels is not None and layout is not None
        ndim = len(op.shape or ())
        # Dropped channels are read from any place, and then replaced; padding the value first would be another copy,
        # behind which the TorchScript exporter to ONNX does not know the size of an image.
        place = torch.zeros(channels.width, dtype=torch.int64, device=channels.kept.device)
        place[channels.kept] = torch.arange(len(channels.kept), device=place.device)
        there = torch.zeros(channels.width, dtype=torch.bool, device=place.device).index_fill_(0, channels.kept, True)
        self._moved += 1
        index = F.pad(place[wanted], (0, zeros))
        node = self.call(
            torch.index_select, value.node, layout.dim, self.buffer(f"{name}_channels_{self._moved}", index)
        )
        mask = F.pad(there[wanted], (0, zeros))
        if bool(mask.all()):
            return node
        like = next(self.flow.model.parameters())
        c = like.new_zeros(len(channels.dropped)) if value.constants is None else value.constants
        c = like_value(c, layout.dim, ndim)
        # The same way: constants and one more channel of zeros.
        place = torch.full((channels.width,), len(channels.dropped), device=place.device)
        place[channels.dropped] = torch.arange(len(channels.dropped), device=place.device)
        c = F.pad(c, [0, 0] * (ndim - 1 - layout.dim) + [0, 1])
        base = chosen(c, F.pad(place[wanted], (0, zeros), value=len(channels.dropped)), layout.dim)
        which = self.buffer(f"{name}_kept_{self._moved}", like_value(mask, layout.dim, ndim))
        return self.call(torch.where, which, node, self.buffer(f"{name}_constants_{self._moved}", base))

    def narrowed(self, op: Any, node: fx.Node) -> Value:
        """The channels of ``op`` that are kept, of a value at full width."""
        channels = self.channels(op)
        if channels is None or channels.full:
            return Value(node, channels)
        dim = op.layout.dim
        index = self.buffer(f"{op.name}_channels", channels.kept)
        node = self.call(torch.index_select, node, dim, index)
        return Value(self.padded(node, channels.pads, dim, len(op.shape or ())), channels)

    def padded(self, node: fx.Node, pads: int, dim: int, ndim: int) -> fx.Node:
        """So many channels of zeros behind the others."""
        return self.call(F.pad, node, [0, 0] * (ndim - 1 - dim) + [0, pads]) if pads else node

    def known(self, name: str) -> Tensor:
        """A parameter or buffer that is read, by the name of its operation."""
        return self.flow.attribute(str(self.flow.ops[name].node.target)).detach()

    def constant_maps(self, op: Any) -> Tensor | None:
        """The constants of what ``op`` reads at every position, for one sample."""
        value, source = self.source(op), self.flow.ops[op.sources[0]]
        assert source.layout is not None
        shape = (1, *(source.shape or ())[1:])
        return None if value.constants is None else all_places(value.constants, shape, source.layout.dim)


def out_of_place(module: nn.Module) -> nn.Module:
    """A copy that does not write to its input, which others may read."""
    small = copy.deepcopy(module)
    if getattr(small, "inplace", False):
        small.inplace = False  # type: ignore[assignment]
    return small


def dense_copy(module: nn.Module) -> nn.Module:
    """A copy that needs nothing of this package, with its mask burnt in."""
    return to_dense(out_of_place(module))


def take_rows_of(full: Tensor, rows: Channels) -> Tensor:
    """The kept rows, then zero rows."""
    return F.pad(full.index_select(0, rows.kept), [0, 0] * (full.dim() - 1) + [0, rows.pads])

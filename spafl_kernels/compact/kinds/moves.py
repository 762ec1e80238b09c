"""Operations that move channels: flatten, concatenation, chunks."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..graph.calls import Call, Signature, target_of
from ..graph.layout import Layout, Segment
from ..run.constants import all_places, joined
from ..small import Value
from .base import Const, Op, Sign, Stop
from .channelwise import Same
from .reshapes import Reshape, Slice

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["Concatenation", "Flatten", "Item", "Split"]


@dataclass(eq=False)
class Flatten(Op):
    """``(N, C, ...)`` to ``(N, C * ...)``."""

    kind = "flatten"
    modules = (nn.Flatten, nn.Unflatten)
    _FLATTEN = Signature("input start_dim end_dim", start_dim=0, end_dim=-1)
    _DIM, _SIZES = Signature("input dim"), Signature("input dim sizes")
    calls: ClassVar[Mapping[Any, Any]] = {
        "flatten": _FLATTEN, torch.flatten: _FLATTEN, "view": None, "reshape": None, torch.reshape: None,
        "squeeze": _DIM, torch.squeeze: _DIM, "unsqueeze": _DIM, torch.unsqueeze: _DIM, "unflatten": _SIZES,
        torch.unflatten: _SIZES,
    }  # fmt: skip
    passes_channels = True

    @property
    def sign(self) -> Sign:
        return Sign.KEEPS

    # A dimension that goes if it is 1, which a batch may be.
    squeezed: int | None = None

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        return cls(node)

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        if not call.values:
            return cls(call.node) if _is_plain_reshape(call.node) else None
        dim = call.values.get("dim", 1)
        if not isinstance(call.values["input"], fx.Node) or type(dim) is not int:
            return None
        return cls(call.node, squeezed=dim if call.target in ("squeeze", torch.squeeze) else None)

    def refine(self, flow: Flow) -> Op:
        before = flow.source(self)
        if before.layout is None or self.shape is None:
            return self
        if self.squeezed is not None and self.squeezed % len(before.shape or (0,)) == 0:
            return self
        if self.shape == before.shape:
            return Same(self.node, module=self.module)
        return Reshape.between(self.node, self.module, before, self.shape) or self

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        shape, result = before.shape or (), self.shape or ()
        rest = prod(shape[2:])
        if before.layout is None:
            raise Stop
        if self.squeezed is not None:
            raise Stop("a batch of one that goes")
        if len(result) == 2 and result[0] == shape[0] and before.layout.dim == 1:
            self.layout = before.layout.repeated(rest, 1)
            # What varies over positions is a number per channel now.
            self.const = Const.SAME if before.const == Const.PLACE else before.const
        elif len(shape) > 2 and len(result) == 2 and before.layout.dim == len(shape) - 1 and rest == shape[-1]:
            raise Stop("flattened with tokens in front of channels")
        else:
            raise Stop("reshape cuts through channels")

    def build(self, scope: Scope, i: int) -> Run:
        j = scope.index[self.sources[0]]
        before, after = scope.channels(scope.op(self.sources[0])), scope.channels(self)
        assert before is not None and after is not None

        def run(env: Values, training: bool) -> None:
            x, c = env.kept[j], env.constants[j]
            repeat = prod(x.shape[2:])
            if c is not None:
                env.constants[i] = _flat(c, x.shape)
            if (before.pads and repeat > 1) or after.pads != before.pads:
                x = F.pad(x.narrow(1, 0, len(before.kept)).flatten(1), (0, after.pads))
            env.kept[i] = x.flatten(1)

        return run

    def export(self, small: Small) -> Value:
        source = small.source(self)
        before, after = source.channels, small.channels(self)
        assert before is not None and after is not None
        node = source.node
        if before.pads and not after.pads:
            node = small.call(torch.narrow, node, 1, 0, len(before.kept))
        node = small.call(torch.flatten, node, 1)
        if after.pads:
            # All channels are pruned: one zero feature stands for them.
            node = small.call(torch.narrow, node, 1, 0, after.pads)
        shape, c = small.flow.source(self).shape or (), source.constants
        return Value(node, after, None if c is None else _flat(c, shape))


def _flat(c: torch.Tensor, shape: Any) -> torch.Tensor:
    """Constants of a value of this shape, flattened like it."""
    if c.dim() == 1:
        repeat = prod(shape[2:])
        return c.repeat_interleave(repeat) if repeat > 1 else c
    flat = all_places(c, shape, 1).flatten(1)
    return flat[0] if len(flat) == 1 else flat


def _is_plain_reshape(node: fx.Node) -> bool:
    """Sizes only, and no number for the batch."""
    if node.kwargs or len(node.args) < 2 or "otherwise" in node.meta or not isinstance(node.args[0], fx.Node):
        return False
    sizes: Any = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    if not sizes or not all(type(s) is int or isinstance(s, fx.Node) for s in sizes):
        return False
    if any(isinstance(s, fx.Node) and target_of(s) is getattr and s.args[1] == "dtype" for s in sizes):
        return False
    return isinstance(sizes[0], fx.Node) or sizes[0] == -1


@dataclass(eq=False)
class Concatenation(Op):
    """``parts``: names of the tensors; ``dim``: along which."""

    kind = "concatenation"
    _CAT = Signature("tensors dim out", dim=0, out=None)
    calls: ClassVar[Mapping[Any, Any]] = {torch.cat: _CAT, torch.concat: _CAT, torch.concatenate: _CAT}
    passes_channels = True
    fresh = True

    parts: tuple[str, ...] = ()
    dim: int = 0

    @property
    def sign(self) -> Sign:
        return Sign.KEEPS

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        parts, dim = call.values["tensors"], call.values["dim"]
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, fx.Node) for p in parts):
            return None
        return cls(call.node, parts=tuple(p.name for p in parts), dim=dim) if isinstance(dim, int) and parts else None

    def follow(self, flow: Flow) -> None:
        parts = [flow.ops[name] for name in self.parts]
        if all(p.layout is None for p in parts):
            raise Stop
        self.dim = dim = self.dim % len(parts[0].shape or (0,))
        if any(p.layout is not None and p.layout.dim != dim for p in parts) or dim == 0:
            raise Stop("concatenation along another dimension")
        segments: list[Segment] = []
        for part in parts:
            segments += part.layout.segments if part.layout is not None else (Segment((), (part.shape or ())[dim]),)
            self.const |= part.const
        if self.const == Const.VARIES:
            raise Stop("concatenation of channels that vary over samples and over positions")
        self.layout = Layout(dim, tuple(segments))

    def build(self, scope: Scope, i: int) -> Run:
        dim, ndim = self.dim, len(self.shape or ())
        after = scope.channels(self)
        assert after is not None
        parts = []
        for name in self.parts:
            source = scope.op(name)
            channels = scope.channels(source)
            width = (source.shape or ())[dim]
            parts.append(
                (scope.index[name], width if channels is None else len(channels.kept),
                 0 if channels is None else len(channels.dropped))
            )  # fmt: skip

        def run(env: Values, training: bool) -> None:
            xs = [env.kept[j] for j, _, _ in parts]
            xs = [x if x.shape[dim] == real else x.narrow(dim, 0, real) for x, (_, real, _) in zip(xs, parts)]
            if after.pads:
                shape = list(xs[0].shape)
                shape[dim] = after.pads
                xs.append(xs[0].new_zeros(shape))
            env.kept[i] = torch.cat(xs, dim)
            env.constants[i] = joined([(env.constants[j], dropped) for j, _, dropped in parts], dim, ndim, xs[0])

        return run

    def export(self, small: Small) -> Value:
        after, nodes, constants = small.channels(self), [], []
        assert after is not None
        for name in self.parts:
            value = small.values[name]
            node, part = value.node, value.channels
            if part is not None:
                constants.append((value.constants, len(part.dropped)))
                if part.pads and len(part.kept):
                    node = small.call(torch.narrow, node, self.dim, 0, len(part.kept))
                elif part.pads:
                    continue  # nothing of it is left
            nodes.append(node)
        node = small.call(torch.cat, nodes or [small.values[self.parts[0]].node], self.dim)
        like = next(small.flow.model.parameters())
        c = joined(constants, self.dim, len(self.shape or ()), like)
        return Value(node, after, c)


@dataclass(eq=False)
class Split(Op):
    """A tuple of parts. ``dim``: along which; ``pieces``: ``(first, end)`` of each."""

    kind = "split"
    _CHUNK = Signature("input chunks dim", dim=0)
    calls: ClassVar[Mapping[Any, Any]] = {
        "chunk": _CHUNK, torch.chunk: _CHUNK, "split": Signature("input split_size dim", dim=0),
        torch.split: Signature("tensor split_size_or_sections dim", dim=0),
    }  # fmt: skip
    passes_channels = True

    dim: int = 0
    chunks: int = 0
    sizes: tuple[int, ...] = ()
    pieces: tuple[tuple[int, int], ...] = ()

    @property
    def sign(self) -> Sign:
        return Sign.KEEPS

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        x, how, dim = call.values.values()
        sizes = tuple(how) if isinstance(how, (list, tuple)) else (how,)
        if not isinstance(x, fx.Node) or not all(type(s) is int for s in (*sizes, dim)):
            return None
        chunks = how if call.target in ("chunk", torch.chunk) else 0
        return cls(call.node, dim=dim, chunks=chunks, sizes=() if chunks else sizes)

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        if before.layout is None:
            raise Stop
        if self.dim % len(before.shape or (0,)) != before.layout.dim:
            raise Stop("chunks along another dimension")
        if not all(target_of(user) is operator.getitem and isinstance(user.args[1], int) for user in self.node.users):
            raise Stop("chunks that are not taken one by one")
        width, sizes = before.layout.width, self.sizes
        if len(sizes) < 2:
            size = -(-width // self.chunks) if self.chunks else sizes[0]
            sizes = tuple(min(size, width - low) for low in range(0, width, size))
        ends = list(accumulate(sizes))
        self.pieces = tuple(zip([0, *ends], ends))
        if any(before.layout.narrow(*piece) is None for piece in self.pieces):
            raise Stop("a chunk cuts through a flattened channel")

    def build(self, scope: Scope, i: int) -> Run:
        """A tuple of tensors and one of constants: one backward for all of them, where slices would have one each."""
        source = scope.op(self.sources[0])
        j, before, layout = scope.index[source.name], scope.channels(source), source.layout
        assert before is not None and layout is not None
        ends = torch.tensor([high for _, high in self.pieces])
        sizes, dropped = (
            torch.searchsorted(c, ends).diff(prepend=ends.new_zeros(1)).tolist()
            for c in (before.host.kept, before.host.dropped)
        )
        sizes.append(before.pads)
        dim = layout.dim

        def run(env: Values, training: bool) -> None:
            c = env.constants[j]
            env.kept[i] = env.kept[j].split(sizes, dim)
            env.constants[i] = None if c is None else c.split(dropped, 0 if c.dim() == 1 else dim)

        return run

    def export(self, small: Small) -> Value:
        """Parts are cut where they are read."""
        source = small.source(self)
        return Value(source.node, source.channels, source.constants)


@dataclass(eq=False)
class Item(Op):
    """One part of a :class:`Split`. ``index``: which; ``piece``: ``(first, end)`` of its channels."""

    kind = "item"
    calls: ClassVar[Mapping[Any, Any]] = {operator.getitem: None}
    passes_channels = True

    index: Any = 0
    piece: tuple[int, int] = (0, 0)

    def refine(self, flow: Flow) -> Op:
        before = flow.source(self)
        if isinstance(before, Split) or before.layout is None:
            return self
        return Slice.of_index(self.node, self.index) or self

    @property
    def sign(self) -> Sign:
        return Sign.KEEPS

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        return cls(call.node, index=call.node.args[1])

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        if not isinstance(before, Split) or not isinstance(self.index, int):
            raise Stop("getitem is not followed" if before.layout is not None else "")
        whole = flow.source(before)
        assert whole.layout is not None
        self.piece = before.pieces[self.index]
        self.layout, self.const = whole.layout.narrow(*self.piece), whole.const

    def build(self, scope: Scope, i: int) -> Run:
        j, split, after = scope.index[self.sources[0]], scope.op(self.sources[0]), scope.channels(self)
        assert after is not None and self.layout is not None and isinstance(split, Split)
        index, dim, pads = self.index % len(split.pieces), self.layout.dim, after.pads

        def run(env: Values, training: bool) -> None:
            x, c = env.kept[j][index], env.constants[j]
            if pads:
                shape = list(x.shape)
                shape[dim] = pads
                x = torch.cat([x, x.new_zeros(shape)], dim)
            env.kept[i], env.constants[i] = x, None if c is None else c[index]

        return run

    def export(self, small: Small) -> Value:
        source, after, (low, high) = small.source(self), small.channels(self), self.piece
        before = source.channels
        assert before is not None and after is not None and self.layout is not None
        node, c, dim = source.node, source.constants, self.layout.dim
        if high - low < before.width:
            if len(after.kept):
                start = int((before.kept < low).sum())
                node = small.call(torch.narrow, node, dim, start, len(after.kept))
            else:
                # One channel of zeros.
                node = small.call(torch.mul, small.call(torch.narrow, node, dim, 0, 1), 0.0)
            if c is not None:
                start = int((before.dropped < low).sum())
                c = c.narrow(0 if c.dim() == 1 else dim, start, len(after.dropped))
        return Value(node, after, c)

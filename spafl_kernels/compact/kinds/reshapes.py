"""Operations that put numbers elsewhere: permutations, reshapes that keep channels, slices, shuffles."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..graph.calls import Call, Signature, is_literal
from ..graph.layout import Layout, Segment
from ..plan.plan import Channels
from ..run.constants import all_places, chosen
from ..run.spread import Spread
from ..small import Value
from .base import Op, Sign, Stop

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["Permutation", "PixelShuffle", "Reshape", "Shuffle", "Slice"]


class Moved(Op):
    """Every number of the result is one of the source's."""

    passes_channels = True

    @property
    def sign(self) -> Sign:
        return Sign.KEEPS


@dataclass(eq=False)
class Permutation(Moved):
    """Dimensions in another order: ``order[d]`` of the source is ``d`` of the result."""

    kind = "permutation"
    _TRANSPOSE = Signature("input dim0 dim1")
    calls: ClassVar[Mapping[Any, Any]] = {
        "permute": None, torch.permute: Signature("input dims"), "transpose": _TRANSPOSE, torch.transpose: _TRANSPOSE
    }  # fmt: skip

    dims: tuple[int, ...] = ()
    swapped: bool = False
    order: tuple[int, ...] = ()

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        args = call.node.args[1:]
        if call.target == "permute":
            given: Any = call.node.kwargs.get("dims", args[0] if len(args) == 1 else args)
        elif "dims" in call.values:
            given = call.values["dims"]
        else:
            given = call.values["dim0"], call.values["dim1"]
        if not isinstance(given, (tuple, list)) or not given or not all(type(d) is int for d in given):
            return None
        return cls(call.node, dims=tuple(given), swapped=call.target in ("transpose", torch.transpose))

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        if before.layout is None:
            raise Stop
        ndim = len(before.shape or ())
        dims = [d % ndim for d in self.dims]
        if self.swapped:
            order = list(range(ndim))
            order[dims[0]], order[dims[1]] = dims[1], dims[0]
            dims = order
        self.order = tuple(dims)
        if self.order[0] != 0:
            raise Stop("a permutation of the batch")
        self.layout = Layout(self.order.index(before.layout.dim), before.layout.segments)
        self.const = before.const

    def build(self, scope: Scope, i: int) -> Run:
        j, order = scope.index[self.sources[0]], self.order

        def run(env: Values, training: bool) -> None:
            c = env.constants[j]
            env.kept[i] = env.kept[j].permute(order)
            env.constants[i] = c if c is None or c.dim() == 1 else c.permute(order)

        return run

    def export(self, small: Small) -> Value:
        source = small.source(self)
        c = source.constants
        c = c if c is None or c.dim() == 1 else c.permute(self.order)
        return Value(small.call(torch.permute, source.node, list(self.order)), small.channels(self), c)


@dataclass(eq=False)
class Reshape(Moved):
    """Other dimensions around the same channels. ``sizes``: of the result, 0 for the batch and -1 for the channels."""

    kind = "reshape"

    sizes: tuple[int, ...] = ()

    @classmethod
    def between(cls, node: Any, module: Any, before: Op, result: tuple[int, ...]) -> Reshape | None:
        """The operation, if the result has the batch and the channels of ``before`` as dimensions of their own."""
        shape, layout = before.shape or (), before.layout
        if layout is None or layout.dim == 0 or not result or result[0] != shape[0]:
            return None
        front, behind = prod(shape[1 : layout.dim]), prod(shape[layout.dim + 1 :])
        for d in range(1, len(result)):
            same = result[d] == shape[layout.dim] and prod(result[1:d]) == front and prod(result[d + 1 :]) == behind
            if same:
                sizes = (0, *result[1:d], -1, *result[d + 1 :])
                return cls(node, module=module, sizes=sizes)
        return None

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        assert before.layout is not None
        self.layout, self.const = Layout(self.sizes.index(-1), before.layout.segments), before.const

    def shape_of(self, batch: int, channels: int) -> list[int]:
        return [batch if s == 0 and d == 0 else channels if s == -1 else s for d, s in enumerate(self.sizes)]

    def constants(self, c: Tensor | None, shape: Any, dim: int) -> Tensor | None:
        if c is None or c.dim() == 1:
            return c
        c = all_places(c, shape, dim)
        return c.reshape(self.shape_of(c.shape[0], c.shape[dim]))

    def build(self, scope: Scope, i: int) -> Run:
        source = scope.op(self.sources[0])
        j = scope.index[source.name]
        assert source.layout is not None
        dim = source.layout.dim

        def run(env: Values, training: bool) -> None:
            x = env.kept[j]
            env.kept[i] = x.reshape(self.shape_of(x.shape[0], x.shape[dim]))
            env.constants[i] = self.constants(env.constants[j], x.shape, dim)

        return run

    def export(self, small: Small) -> Value:
        source, before, channels = small.source(self), small.flow.source(self), small.channels(self)
        assert before.layout is not None and channels is not None
        shape = (1, *(before.shape or ())[1:])
        node = self.exported_call(small, source.node, channels.stored)
        return Value(node, channels, self.constants(source.constants, shape, before.layout.dim))

    def exported_call(self, small: Small, x: fx.Node, stored: int) -> fx.Node:
        """As the model calls it, so that images of other sizes become what they do there."""
        node, word, m = self.node, _word(self.node), self.module
        if isinstance(m, nn.Flatten):
            return small.call(torch.flatten, x, m.start_dim, m.end_dim)
        if word in ("flatten", "squeeze", "unsqueeze"):
            args, kwargs = (fx.node.map_arg(part, lambda _: x) for part in (node.args, node.kwargs))
            return small.graph.create_node(node.op, node.target, args, kwargs)
        fixed: list[Any] = [small.graph.call_method("size", (x, 0)), *self.shape_of(0, stored)[1:]]
        if word in ("view", "reshape") and not node.kwargs:
            sizes = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
            if len(sizes) == len(fixed):
                fixed = [small.full(s.name) if isinstance(s, fx.Node) else s for s in sizes]
                fixed[self.sizes.index(-1)] = stored
        return small.call(torch.reshape, x, fixed)


@dataclass(eq=False)
class Rearranged(Moved):
    """Channels in another order, or some of them. ``index``: by channel of the result, the channel of the source."""

    index: tuple[int, ...] = ()

    def elsewhere(self, x: Tensor) -> Tensor:
        """What happens along the other dimensions."""
        return x

    def exported_elsewhere(self, small: Small, node: fx.Node) -> fx.Node:
        return node

    def constants(self, c: Tensor | None, dropped: Tensor, dim: int, shape: Any) -> Tensor | None:
        """The constants of the result's dropped channels, which are ``dropped`` among the source's."""
        if c is None:
            return None
        c = chosen(c, dropped, dim)
        return (
            c if c.dim() == 1 else self.elsewhere(all_places(c, [*shape[:dim], len(dropped), *shape[dim + 1 :]], dim))
        )

    def places(self, before: Channels, after: Channels) -> tuple[Tensor, Tensor]:
        """Of the result's kept and dropped channels, their places among the source's kept and dropped ones; host."""
        index, b, a = torch.tensor(self.index, dtype=torch.int64), before.host, after.host
        return b.order[index[a.kept]], b.order[index[a.dropped]] - len(b.kept)

    def build(self, scope: Scope, i: int) -> Run:
        source, after = scope.op(self.sources[0]), scope.channels(self)
        before, j = scope.channels(source), scope.index[source.name]
        assert before is not None and after is not None and source.layout is not None
        dim, pads = source.layout.dim, after.pads
        kept, dropped = self.places(before, after)
        start = _first_of_run(kept)
        alike = start == 0 and len(kept) + pads == before.stored and len(kept) == len(before.kept)
        index, dropped = kept.to(scope.device), dropped.to(scope.device)

        def run(env: Values, training: bool) -> None:
            x, c = env.kept[j], env.constants[j]
            env.constants[i] = self.constants(c, dropped, dim, x.shape)
            if not alike:
                x = x.index_select(dim, index) if start is None else x.narrow(dim, start, len(index))
                if pads:
                    x = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, pads])
            env.kept[i] = self.elsewhere(x)

        return run

    def export(self, small: Small) -> Value:
        source, before, after = small.source(self), small.flow.source(self), small.channels(self)
        assert source.channels is not None and after is not None and before.layout is not None
        dim, ndim = before.layout.dim, len(before.shape or ())
        kept, dropped = self.places(source.channels, after)
        node, start = source.node, _first_of_run(kept)
        if start is not None and len(kept):
            node = small.call(torch.narrow, node, dim, start, len(kept))
        elif len(kept):
            node = small.call(
                torch.index_select, node, dim, small.buffer(f"{self.name}_order", kept.to(after.kept.device))
            )
        else:  # one channel of zeros
            node = small.call(torch.mul, small.call(torch.narrow, node, dim, 0, 1), 0.0)
        node = small.padded(node, after.pads if len(kept) else 0, dim, ndim)
        shape = (1, *(before.shape or ())[1:])
        c = self.constants(source.constants, dropped.to(after.kept.device), dim, shape)
        return Value(self.exported_elsewhere(small, node), after, c)


def _first_of_run(index: Tensor) -> int | None:
    """Where a run of neighbours begins; None if it is not one."""
    first = int(index[0]) if len(index) else 0
    return first if torch.equal(index, torch.arange(first, first + len(index))) else None


@dataclass(eq=False)
class Slice(Rearranged):
    """``cuts``: by dimension of the source, a slice or a number."""

    kind = "slice"
    calls: ClassVar[Mapping[Any, Any]] = {
        "narrow": Signature("input dim start length"), torch.narrow: Signature("input dim start length")
    }  # fmt: skip

    cuts: tuple[Any, ...] = ()
    along: tuple[int, slice] | None = None

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        rest = call.literals("input")
        if (
            not isinstance(call.values["input"], fx.Node)
            or rest is None
            or not all(type(v) is int for v in rest.values())
        ):
            return None
        start, length = rest["start"], rest["length"]
        return cls(call.node, along=(rest["dim"], slice(start, start + length))) if start >= 0 else None

    @classmethod
    def of_index(cls, node: Any, index: Any) -> Slice | None:
        """``x[index]``, of slices and numbers."""
        cuts = index if isinstance(index, tuple) else (index,)
        known = all(c is Ellipsis or isinstance(c, slice) or type(c) is int for c in cuts)
        steps = [s for c in cuts if isinstance(c, slice) for s in (c.start, c.stop, c.step)]
        if not known or not all(s is None or type(s) is int for s in steps) or cuts.count(Ellipsis) > 1:
            return None
        return cls(node, cuts=cuts)

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        if before.layout is None:
            raise Stop
        shape, dim = before.shape or (), before.layout.dim
        whole = slice(None)
        cuts = list(self.cuts)
        if self.along is not None:
            cuts = [whole] * len(shape)
            cuts[self.along[0] % len(shape)] = self.along[1]
        at = cuts.index(Ellipsis) if Ellipsis in cuts else len(cuts)
        cuts = [*cuts[:at], *[whole] * (len(shape) - len(cuts) + (at < len(cuts))), *cuts[at + 1 :]]
        if cuts[0] != whole:
            raise Stop("a part of the batch")
        if not isinstance(cuts[dim], slice):
            raise Stop("one channel alone")
        self.index = tuple(range(before.layout.width)[cuts[dim]])
        if not self.index:
            raise Stop("no channel at all")
        self.cuts = (*cuts[:dim], whole, *cuts[dim + 1 :])
        gone = sum(not isinstance(c, slice) for c in cuts[:dim])
        self.layout, self.const = Layout(dim - gone, before.layout.take(self.index)), before.const

    def elsewhere(self, x: Tensor) -> Tensor:
        return x[self.cuts] if any(c != slice(None) for c in self.cuts) else x

    def exported_elsewhere(self, small: Small, node: fx.Node) -> fx.Node:
        return small.call(operator.getitem, node, self.cuts) if any(c != slice(None) for c in self.cuts) else node


@dataclass(eq=False)
class Shuffle(Rearranged):
    """A chain of reshapes and transpositions that puts channels into another order, as ShuffleNet's."""

    kind = "channel shuffle"

    @classmethod
    def in_graph(cls, flow: Flow) -> Iterator[tuple[Op, tuple[str, ...]]]:
        for op in list(flow.ops.values()):
            if op.node.op in ("call_method", "call_function") and _word(op.node) in _RESHAPES:
                inner, first = _chain(flow, op)
                index = _channel_order(flow, first, [*inner[::-1], op]) if inner else None
                if index is not None:
                    yield cls(op.node, sources=(first.name,), index=index), tuple(o.name for o in inner)

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        if before.layout is None:
            raise Stop
        if before.layout.dim != 1:
            raise Stop("channels are not where the shuffle has them")
        self.layout, self.const = Layout(1, before.layout.take(self.index)), before.const


_RESHAPES = {"reshape", "view", "flatten", "unflatten"}
_TURNS = {"transpose", "permute", "contiguous", "clone"}


def _word(node: fx.Node) -> str:
    target = node.target
    return (
        str(target)
        if node.op == "call_method"
        else getattr(target, "__name__", "")
        if node.op == "call_function"
        else ""
    )


def _chain(flow: Flow, last: Op) -> tuple[list[Op], Op]:
    """From the result backwards what only moves numbers and has no other reader, and what the first of it reads."""
    inner: list[Op] = []
    op = last
    while op.sources:  # what is part of another operation has none
        before = flow.ops[op.sources[0]]
        usable = before.shape is not None and len(before.node.users) == 1 and "otherwise" not in before.node.meta
        if not (usable and before.sources and _word(before.node) in _RESHAPES | _TURNS):
            return inner, before
        inner.append(before)
        op = before
    return [], op


def _channel_order(flow: Flow, first: Op, chain: list[Op]) -> tuple[int, ...] | None:
    """The channel of the source, by channel of the result, if that is all the chain does."""
    shape = first.shape or ()
    if (
        len(shape) < 3
        or chain[-1].shape != shape
        or not any(_word(op.node) in ("transpose", "permute") for op in chain)
    ):
        return None
    start = torch.arange(prod(shape)).view(shape)
    x = start
    for op in chain:
        word, args = _word(op.node), op.node.args[1:]
        if word in _RESHAPES:
            x = x.reshape(op.shape or ())
        elif word in ("transpose", "permute"):
            if not is_literal([*args, *op.node.kwargs.values()]):
                return None
            x = getattr(x, word)(*args, **op.node.kwargs)
    order = x.select(0, 0).flatten(1)[:, 0] // prod(shape[2:])
    if torch.equal(x, start.index_select(1, order)) and not torch.equal(x, start):
        return tuple(order.tolist())
    return None


@dataclass(eq=False)
class PixelShuffle(Op):
    """Channels put beside one another: a channel of the result is dropped with all those that it is made of."""

    kind = "pixel shuffle"
    modules = (nn.PixelShuffle,)
    calls: ClassVar[Mapping[Any, Any]] = {F.pixel_shuffle: Signature("input upscale_factor")}
    passes_channels = True
    fresh = True

    factor: int = 1

    @property
    def sign(self) -> Sign:
        return Sign.KEEPS

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        return cls(node, factor=m.upscale_factor)

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        x, factor = call.values["input"], call.values["upscale_factor"]
        return cls(call.node, factor=factor) if isinstance(x, fx.Node) and isinstance(factor, int) else None

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        if before.layout is None:
            raise Stop
        if before.layout.dim != 1 or len(self.shape or ()) != 4:
            raise Stop("channels are not where the shuffle has them")
        if before.const:
            raise Stop("a pixel shuffle of pruned channels that are not zero")
        square = self.factor**2
        parts = before.layout.take(range(before.layout.width), merge=False)
        segments = []
        for low in range(0, len(parts), square):
            group = parts[low : low + square]
            sources = sorted({s for part in group for s in part.sources}) if all(p.sources for p in group) else []
            segments.append(Segment(tuple(sources), 1))
        self.layout = Layout(1, tuple(segments))

    def build(self, scope: Scope, i: int) -> Run:
        source, after = scope.op(self.sources[0]), scope.channels(self)
        before, j = scope.channels(source), scope.index[source.name]
        assert before is not None and after is not None
        spread, factor = self.spread(scope, before, after), self.factor

        def run(env: Values, training: bool) -> None:
            env.kept[i] = F.pixel_shuffle(spread(env.kept[j], None, None), factor)

        return run

    def spread(self, scope: Scope, before: Channels, after: Channels) -> Spread:
        """Puts the source's kept channels where those of the result's kept channels are."""
        place = self.positions(before, after)
        return Spread(place, after.stored * self.factor**2, 1, scope.native, scope.device)

    def positions(self, before: Channels, after: Channels) -> Tensor:
        kept, square = before.host.kept, self.factor**2
        return after.host.order[kept // square] * square + kept % square

    def export(self, small: Small) -> Value:
        source, after = small.source(self), small.channels(self)
        assert source.channels is not None and after is not None
        # Where in the result's channels each comes from; one more channel of zeros is where the others do.
        place = self.positions(source.channels, after)
        index = torch.full((after.stored * self.factor**2,), source.channels.stored)
        index[place] = torch.arange(len(place))
        node = small.padded(source.node, 1, 1, 4)
        node = small.call(
            torch.index_select, node, 1, small.buffer(f"{self.name}_channels", index.to(after.kept.device))
        )
        return Value(small.call(F.pixel_shuffle, node, self.factor), after)

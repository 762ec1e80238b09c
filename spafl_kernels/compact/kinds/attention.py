"""Multi-head attention, found in a trace: softmax(q k' scale) v with heads that are blocks of channels.

Written with matmul and softmax or with ``scaled_dot_product_attention``; what is not recognised runs as it stands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..run.heads import Heads, attend
from ..run.spread import Pick, packed
from ..small import Value
from .base import Op
from .whole import as_it_stands

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["Attention"]

_WORDS: dict[Any, str] = {
    torch.reshape: "reshape", torch.flatten: "flatten", torch.transpose: "transpose", torch.permute: "permute",
    torch.matmul: "matmul", operator.matmul: "matmul", torch.softmax: "softmax", F.softmax: "softmax",
    operator.mul: "mul", torch.mul: "mul", operator.truediv: "div", torch.div: "div",
    F.scaled_dot_product_attention: "attention",
}  # fmt: skip
_METHODS = {"reshape", "view", "flatten", "unflatten", "transpose", "permute", "matmul", "softmax", "mul", "div"}
_RESHAPES = {"reshape", "view", "flatten", "unflatten"}

# Of scaled_dot_product_attention, what may be given.
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}


@dataclass(frozen=True)
class _Found:
    """``q``, ``k``, ``v``: nodes of shape (N, tokens, channels); ``inner``: nodes between these and the result."""

    q: str
    k: str
    v: str
    heads: int
    scale: float
    inner: tuple[str, ...]


@dataclass(eq=False)
class Attention(Op):
    """The last node of it. ``sources``: q, k and v, of shape (N, tokens, channels)."""

    kind = "attention"

    heads: int = 1
    scale: float = 1.0

    @classmethod
    def in_graph(cls, flow: Flow) -> Iterator[tuple[Op, tuple[str, ...]]]:
        """Attention without dropout or mask, heads along channels."""
        shapes = {name: op.shape for name, op in flow.ops.items()}
        for name, op in flow.ops.items():
            found = _Finder(shapes, flow.model).match(op.node)
            if found is None or any("otherwise" in flow.ops[n].node.meta for n in (name, *found.inner)):
                continue
            sources = found.q, found.k, found.v
            yield cls(op.node, sources=sources, heads=found.heads, scale=found.scale), found.inner

    def follow(self, flow: Flow) -> None:
        """q and k are read where both keep a channel; the result has the channels of v."""
        sources = [flow.ops[name] for name in self.sources]
        known = [s.layout.sources for s in sources if s.layout is not None and s.const]
        if known:
            edge = f"{', '.join(dict.fromkeys(filter(None, sum(known, ()))))} -> {self.name}"
            flow.stops.append((edge, "attention over pruned channels that are not zero"))
        v = sources[2]
        if v.layout is not None and not v.const:
            self.layout = v.layout

    def build(self, scope: Scope, i: int) -> Run:
        shape, heads, scale = self.shape or (), self.heads, self.scale
        ops = [scope.op(name) for name in self.sources]
        # A channel that is dropped and not 0 must be there.
        known = [None if source.const else scope.channels(source) for source in ops]
        widths = (ops[0].shape or ())[2], (ops[2].shape or ())[2]
        places = Heads([c and c.host for c in known], widths, heads, scope.plan.multiple > 1)
        after, width = scope.channels(self), places.width * heads
        reads: list[Callable[[Values], Tensor]] = [
            packed(scope, source, channels, pick, place, width, 2)
            for source, channels, pick, place in zip(ops, known, places.picks, places.places)
        ]
        unpack, stored = None, shape[2] if after is None else after.stored
        if not len(places.places[2]) == width == stored:
            unpack = Pick(places.places[2], stored, 2, scope.native, scope.device)
        tokens = (ops[1].shape or ())[1]
        scope.macs += 6 * shape[1] * tokens * width
        fused = scope.native

        def run(env: Values, training: bool) -> None:
            q, k, v = (read(env) for read in reads)
            out = attend(q, k, v, heads, scale, fused)
            env.kept[i] = out if unpack is None else unpack(out)

        return run

    def export(self, small: Small) -> Value:
        """As it stands, at full width; then the channels that are kept."""
        return small.narrowed(self, as_it_stands(self, small))


class _Mismatch(Exception):
    pass


class _Finder:
    """Walks from the result to q, k and v; what lies between may have no other reader."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...] | None], model: nn.Module) -> None:
        self.shapes, self.model = shapes, model
        self.inner: list[str] = []

    def match(self, node: fx.Node) -> _Found | None:
        try:
            return self._match(node)
        except _Mismatch:
            return None

    def _match(self, node: fx.Node) -> _Found:
        shape = self._shape(node)
        joined = self._step(node, _RESHAPES)
        heads_last = self._shape(joined)
        self._require(len(heads_last) == 4 and shape == (*heads_last[:2], heads_last[2] * heads_last[3]))
        core = self._swapped(joined)
        if self._word(core) == "attention":
            self._take(core)
            q, k, v = core.args[:3] if len(core.args) == 3 else self._fail()
            self._require({n: x for n, x in core.kwargs.items() if n != "scale"}.items() <= _DEFAULTS.items())
            scale = core.kwargs.get("scale")
            scale = self._shape(q)[-1] ** -0.5 if scale is None else scale
        else:
            weights, v = self._product(core)
            scores, scale = self._scaled(self._softmax(weights))
            q, turned = self._product(scores)
            self._take(turned)
            self._require(self._word(turned) == "transpose" and set(turned.args[1:]) in ({-1, -2}, {2, 3}))
            k = turned.args[0]
        if not isinstance(scale, (int, float)):
            self._fail()
        (source_q, heads), (source_k, of_k), (source_v, of_v) = (self._split(x) for x in (q, k, v))
        self._require(heads == of_k == of_v and self._shape(q)[-1] == self._shape(k)[-1])
        return _Found(source_q, source_k, source_v, heads, float(scale), tuple(self.inner))

    # -- pieces ----------------------------------------------------------------------------------------------------

    def _product(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        self._take(node)
        self._require(self._word(node) == "matmul" and len(node.args) == 2)
        return node.args[0], node.args[1]  # type: ignore[return-value]

    def _softmax(self, node: fx.Node) -> fx.Node:
        """What the softmax reads; dropout that does nothing may lie behind it."""
        module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.Identity, nn.Dropout)):
            self._take(node)
            self._require(isinstance(module, nn.Identity) or module.p == 0)
            return self._softmax(node.args[0])  # type: ignore[arg-type]
        self._take(node)
        last = (-1, len(self._shape(node)) - 1)
        if module is not None:
            self._require(type(module) is nn.Softmax and module.dim in last)
        else:
            dims = [*node.args[1:], *node.kwargs.values()]
            self._require(self._word(node) == "softmax" and len(dims) == 1 and dims[0] in last)
        return node.args[0]  # type: ignore[return-value]

    def _scaled(self, node: fx.Node) -> tuple[fx.Node, float]:
        word, args = self._word(node), node.args
        if word not in ("mul", "div"):
            return node, 1.0
        self._take(node)
        numbers = [a for a in args if isinstance(a, (int, float))]
        self._require(len(args) == 2 and len(numbers) == 1 and not node.kwargs)
        self._require(word == "mul" or isinstance(args[1], (int, float)))
        tensor = next(a for a in args if isinstance(a, fx.Node))
        return tensor, float(numbers[0]) if word == "mul" else 1 / float(numbers[0])

    def _split(self, node: Any) -> tuple[str, int]:
        """(N, heads, tokens, channels a head) comes from (N, tokens, channels): that node and the number of heads."""
        parts = self._swapped(node)
        whole = self._step(parts, _RESHAPES)
        shape, before = self._shape(parts), self._shape(whole)
        self._require(len(shape) == 4 and before == (*shape[:2], shape[2] * shape[3]))
        self._take(parts)
        return whole.name, shape[2]

    def _swapped(self, node: Any) -> fx.Node:
        """What ``node`` is with dimensions 1 and 2 exchanged."""
        self._require(isinstance(node, fx.Node))
        self._take(node)
        if self._word(node) in ("contiguous", "clone"):
            return self._swapped(node.args[0])
        args = node.args[1:]
        if self._word(node) == "permute":
            args = args[0] if len(args) == 1 else args  # type: ignore[assignment]
            self._require(tuple(args) == (0, 2, 1, 3))
        else:
            self._require(self._word(node) == "transpose" and len(args) == 2 and set(args) in ({1, 2}, {-2, -3}))
        return node.args[0]  # type: ignore[return-value]

    def _step(self, node: fx.Node, words: set[str]) -> fx.Node:
        self._require(self._word(node) in words and bool(node.args) and isinstance(node.args[0], fx.Node))
        return node.args[0]  # type: ignore[return-value]

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _take(self, node: Any) -> None:
        self._require(isinstance(node, fx.Node) and len(node.users) == 1)
        self.inner.append(node.name)

    def _word(self, node: fx.Node) -> str:
        if node.op == "call_method":
            return str(node.target) if node.target in _METHODS | {"contiguous", "clone"} else ""
        return _WORDS.get(node.target, "") if node.op == "call_function" else ""

    def _shape(self, node: Any) -> tuple[int, ...]:
        shape = self.shapes.get(node.name) if isinstance(node, fx.Node) else None
        return shape if shape is not None else self._fail()

    def _require(self, condition: bool) -> None:
        if not condition:
            self._fail()

    def _fail(self) -> NoReturn:
        raise _Mismatch

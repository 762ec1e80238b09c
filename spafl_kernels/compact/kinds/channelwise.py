"""Operations that do the same to every channel: activations, and those that do nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..graph.calls import Bound, Call, Signature, bound
from ..run.spread import zero_pads
from ..small import Value, out_of_place
from .base import Const, Op, Sign

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["Activation", "Channelwise", "Elementwise", "Relu", "Same", "exported_function"]


class Channelwise(Op):
    """The channels of the result are those of the one source."""

    passes_channels = True

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        self.layout, self.const = before.layout, before.const


@dataclass(eq=False)
class Same(Channelwise):
    """The same values: ``nn.Identity``, ``contiguous``, ``clone``, a dropout that drops nothing."""

    kind = "same"
    modules = (nn.Identity,)
    _COPY = Signature("input memory_format", memory_format=None)
    calls: ClassVar[Mapping[Any, Any]] = {"contiguous": _COPY, "clone": _COPY, torch.clone: _COPY}

    @property
    def sign(self) -> Sign:
        return Sign.KEEPS

    @classmethod
    def of_module(cls, node: Any, m: nn.Module, flow: Flow) -> Op | None:
        return cls(node)

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        fits = isinstance(call.values["input"], fx.Node) and call.literals("input") is not None
        return cls(call.node) if fits else None

    def build(self, scope: Scope, i: int) -> Run:
        j = scope.index[self.sources[0]]

        def run(env: Values, training: bool) -> None:
            env.kept[i], env.constants[i] = env.kept[j], env.constants[j]

        return run

    def export(self, small: Small) -> Value:
        source = small.source(self)
        return Value(source.node, small.channels(self), source.constants)


@dataclass(eq=False)
class Elementwise(Channelwise):
    """A function of every number alone. ``apply``: the function, not in place; ``at_zero``: what it makes of 0."""

    apply: Callable[..., Tensor] = F.relu
    at_zero: float = 0.0

    def follow(self, flow: Flow) -> None:
        super().follow(flow)
        if self.layout is not None and self.at_zero:
            self.const |= Const.SAME

    def constants(self, c: Tensor | None, count: int, like: Tensor) -> Tensor | None:
        """What becomes of the constants of ``count`` dropped channels."""
        if c is not None:
            return self.apply(c)
        return like.new_full((count,), self.at_zero) if self.at_zero and count else None

    def build(self, scope: Scope, i: int) -> Run:
        apply, j = self.apply, scope.index[self.sources[0]]
        source, channels = scope.op(self.sources[0]), scope.channels(self)
        count = 0 if channels is None else len(channels.dropped)
        inside = apply
        if apply is F.relu and source.fresh and scope.flow.single_reader(source):
            inside = torch.relu_
        if self.at_zero and channels is not None:
            assert self.layout is not None
            dim = self.layout.dim

            def shifted(env: Values, training: bool) -> None:
                y = env.kept[i] = zero_pads(apply, env.kept[j], channels, dim)
                env.constants[i] = self.constants(env.constants[j], count, y)

            return shifted

        def run(env: Values, training: bool) -> None:
            env.kept[i] = inside(env.kept[j])
            c = env.constants[j]
            if c is not None:
                env.constants[i] = apply(c)

        return run

    def export(self, small: Small) -> Value:
        source, channels = small.source(self), small.channels(self)
        node = exported_function(self, small, source.node)
        like = next(small.flow.model.parameters())
        count = 0 if channels is None else len(channels.dropped)
        return Value(node, channels, self.constants(source.constants, count, like))


def exported_function(op: Any, small: Small, node: fx.Node) -> fx.Node:
    """``op``, which has a module or a function ``apply``, on ``node``."""
    if op.module is not None:
        return small.module(op.name, out_of_place(op.module), node)
    apply = op.apply
    if isinstance(apply, Bound):
        return small.call(apply.function, node, **apply.rest)
    if isinstance(apply, partial):
        return small.call(apply.func, node, **apply.keywords)
    return small.call(apply, node)


_INPLACE = Signature("input inplace", inplace=False)
_ALONE = Signature("input")
_HARDTANH = Signature("input min_val max_val inplace", min_val=-1.0, max_val=1.0, inplace=False)


@dataclass(eq=False)
class Relu(Elementwise):
    """``f(x) = f'(x) = 0`` for ``x <= 0``: a proof that the gradient of a pruned row is 0."""

    kind = "relu"
    modules = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
    calls: ClassVar[Mapping[Any, Any]] = {
        F.relu: _INPLACE, torch.relu: _ALONE, F.relu_: _INPLACE, torch.relu_: _ALONE, "relu": _ALONE,
        "relu_": _ALONE, F.relu6: _INPLACE, F.hardtanh: _HARDTANH,
    }  # fmt: skip

    @property
    def sign(self) -> Sign:
        return Sign.BLOCKS

    @property
    def plain(self) -> bool:
        return self.apply is F.relu

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        if type(m) is nn.Hardtanh:
            return _hardtanh(node, m.min_val, m.max_val)
        return cls(node, apply=F.relu if type(m) is nn.ReLU else F.relu6)

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        rest = call.literals("input")
        if not isinstance(call.values["input"], fx.Node) or rest is None:
            return None
        if call.target is F.hardtanh:
            return _hardtanh(call.node, rest["min_val"], rest["max_val"])
        return cls(call.node, apply=F.relu6 if call.target is F.relu6 else F.relu)


_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Signature, tuple[Any, ...]]] = {
    "gelu": (F.gelu, Signature("input approximate", approximate="none"), (F.gelu,)),
    "silu": (F.silu, _INPLACE, (F.silu,)),
    "tanh": (torch.tanh, _ALONE, (F.tanh, torch.tanh, "tanh", "tanh_")),
    "leaky_relu": (
        F.leaky_relu,
        Signature("input negative_slope inplace", negative_slope=0.01, inplace=False),
        (F.leaky_relu,),
    ),
    "elu": (F.elu, Signature("input alpha inplace", alpha=1.0, inplace=False), (F.elu,)),
    "hardswish": (F.hardswish, _INPLACE, (F.hardswish,)),
    "mish": (F.mish, _INPLACE, (F.mish,)),
    "softsign": (F.softsign, _ALONE, (F.softsign,)),
    "sigmoid": (torch.sigmoid, _ALONE, (F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_")),
    "hardsigmoid": (F.hardsigmoid, _INPLACE, (F.hardsigmoid,)),
    "softplus": (F.softplus, Signature("input beta threshold", beta=1, threshold=20), (F.softplus,)),
    "selu": (F.selu, _INPLACE, (F.selu, torch.selu)),
    "celu": (F.celu, Signature("input alpha inplace", alpha=1.0, inplace=False), (F.celu,)),
    "logsigmoid": (F.logsigmoid, _ALONE, (F.logsigmoid,)),
}
_OF_MODULES: dict[type, Callable[[Any], Callable[..., Tensor]]] = {
    nn.GELU: lambda m: partial(F.gelu, approximate=m.approximate),
    nn.SiLU: lambda m: F.silu,
    nn.Tanh: lambda m: torch.tanh,
    nn.LeakyReLU: lambda m: partial(F.leaky_relu, negative_slope=m.negative_slope),
    nn.ELU: lambda m: partial(F.elu, alpha=m.alpha),
    nn.Hardswish: lambda m: F.hardswish,
    nn.Mish: lambda m: F.mish,
    nn.Softsign: lambda m: F.softsign,
    nn.Sigmoid: lambda m: torch.sigmoid,
    nn.Hardsigmoid: lambda m: F.hardsigmoid,
    nn.Softplus: lambda m: partial(F.softplus, beta=m.beta, threshold=m.threshold),
    nn.SELU: lambda m: F.selu,
    nn.CELU: lambda m: partial(F.celu, alpha=m.alpha),
    nn.LogSigmoid: lambda m: F.logsigmoid,
}


@dataclass(eq=False)
class Activation(Elementwise):
    """Any other activation."""

    kind = "activation"
    modules = tuple(_OF_MODULES)
    calls: ClassVar[Mapping[Any, Any]] = {t: signature for _, signature, ts in _FUNCTIONS.values() for t in ts}

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        return cls.of_function(node, _OF_MODULES[type(m)](m))

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        rest = call.literals("input")
        if not isinstance(call.values["input"], fx.Node) or rest is None:
            return None
        function = next(f for f, _, targets in _FUNCTIONS.values() if call.target in targets)
        return cls.of_function(call.node, bound(function, rest))

    @classmethod
    def of_function(cls, node: Any, apply: Callable[..., Tensor]) -> Op:
        return cls(node, apply=apply, at_zero=float(apply(torch.zeros((), dtype=torch.float64))))


def _hardtanh(node: Any, low: float, high: float) -> Op:
    apply = partial(F.hardtanh, min_val=low, max_val=high)
    return Relu(node, apply=apply) if low == 0 < high else Activation.of_function(node, apply)

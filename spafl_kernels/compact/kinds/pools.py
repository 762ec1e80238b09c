"""Pools over positions, and means and maxima over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...cpu.conv_pool import POOLS, DirectReluPool
from ..graph.calls import Call, Signature, bound
from ..graph.layout import Layout
from ..run.constants import all_places
from ..small import Value
from .base import Sign, Stop
from .channelwise import Channelwise, exported_function
from .spatial import Spatial

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small
    from .base import Op

__all__ = ["Pool", "Reduction"]

_MAX = "input kernel_size stride padding dilation ceil_mode return_indices"
_MAX_DEFAULTS: dict[str, Any] = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
_AVERAGE = Signature(
    "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None,
)  # fmt: skip


@dataclass(eq=False)
class Pool(Spatial):
    """A pool over the positions of images.

    Args:
        is_max: it takes maxima.
        window: of a max-pool without overlap, padding or dilation that a compiled kernel knows.
    """

    kind = "pool"
    modules = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
    calls: ClassVar[Mapping[Any, Any]] = {
        F.max_pool2d: Signature(_MAX, **_MAX_DEFAULTS, return_indices=False),
        torch.max_pool2d: Signature(_MAX.removesuffix(" return_indices"), **_MAX_DEFAULTS),
        F.avg_pool2d: _AVERAGE,
        F.adaptive_avg_pool2d: Signature("input output_size"),
        F.adaptive_max_pool2d: Signature("input output_size return_indices", return_indices=False),
    }

    is_max: bool = False
    window: int | None = None

    @property
    def sign(self) -> Sign:
        return Sign.KEEPS

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        if getattr(m, "return_indices", False):
            return None
        keeps, is_max = True, type(m) is nn.MaxPool2d
        if type(m) is nn.AvgPool2d:
            keeps = _keeps_constants(m.padding, m.count_include_pad, m.divisor_override)
        return cls(node, apply=m, is_max=is_max, keeps=keeps, window=_plain_window(m) if is_max else None)

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        rest = call.literals("input")
        if not isinstance(call.values["input"], fx.Node) or rest is None or rest.pop("return_indices", False):
            return None
        function: Any = F.max_pool2d if call.target is torch.max_pool2d else call.target
        keeps = function is not F.avg_pool2d or _keeps_constants(
            rest["padding"], rest["count_include_pad"], rest["divisor_override"]
        )
        return cls(call.node, apply=bound(function, rest), is_max=function is F.max_pool2d, keeps=keeps)

    def build(self, scope: Scope, i: int) -> Run:
        apply, j = self.apply, scope.index[self.sources[0]]
        # A ReLU that waits for this pool: the same function with the same gradient, on a quarter of the elements.
        relu = scope.deferred.get(self.sources[0])
        if relu is None:
            return super().build(scope, i)
        after: Any = torch.relu_ if relu.plain else relu.apply
        outside, window = relu.apply, self.window
        direct = relu.plain and scope.native and window is not None

        def pooled(env: Values, training: bool) -> None:
            y, c = env.kept[j], env.constants[j]
            shape = y.shape
            if direct and y.is_contiguous():
                assert window is not None
                env.kept[i] = DirectReluPool.apply(y, window)
            else:
                env.kept[i] = after(apply(y))
            env.constants[i] = None if c is None else outside(self.constants(c, len(c), y, shape))

        return pooled


def _keeps_constants(padding: Any, counted: bool, divisor: Any) -> bool:
    return divisor is None and (padding in (0, (0, 0), [0, 0]) or not counted)


def _plain_window(m: Any) -> int | None:
    if m.ceil_mode:
        return None
    window = m.kernel_size if isinstance(m.kernel_size, int) else m.kernel_size[0]
    square = m.kernel_size in (window, (window, window)) and m.stride in (window, (window, window))
    return window if square and window in POOLS and m.padding in (0, (0, 0)) and m.dilation in (1, (1, 1)) else None


@dataclass(eq=False)
class Reduction(Channelwise):
    """A mean or the largest over some dimensions. ``function``, ``dims``, ``keep``: as the call has them."""

    kind = "reduction"
    _MEAN = Signature("input dim keepdim dtype out", dim=None, keepdim=False, dtype=None, out=None)
    _AMAX = Signature("input dim keepdim out", dim=None, keepdim=False, out=None)
    calls: ClassVar[Mapping[Any, Any]] = {"mean": _MEAN, torch.mean: _MEAN, "amax": _AMAX, torch.amax: _AMAX}
    fresh = True

    function: Callable[..., Tensor] = torch.mean
    dims: tuple[int, ...] = ()
    keep: bool = False

    @property
    def sign(self) -> Sign:
        return Sign.KEEPS

    @property
    def apply(self) -> Callable[..., Tensor]:
        return partial(self.function, dim=self.dims, keepdim=self.keep)

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        rest = call.literals("input")
        if not isinstance(call.values["input"], fx.Node) or rest is None or rest.get("dtype") is not None:
            return None
        dims = (rest["dim"],) if isinstance(rest["dim"], int) else rest["dim"]
        if not dims or not all(isinstance(d, int) for d in dims):
            return None
        function = torch.amax if "dtype" not in rest else torch.mean
        return cls(call.node, function=function, dims=tuple(dims), keep=bool(rest["keepdim"]))

    def follow(self, flow: Flow) -> None:
        before = flow.source(self)
        if before.layout is None:
            return
        dim, dims = before.layout.dim, sorted(d % len(before.shape or ()) for d in self.dims)
        if 0 in dims or dim in dims:
            raise Stop("reduction over channels or batch")
        left = dim if self.keep else dim - sum(d < dim for d in dims)
        self.layout, self.const = Layout(left, before.layout.segments), before.const

    def build(self, scope: Scope, i: int) -> Run:
        apply, j = self.apply, scope.index[self.sources[0]]

        layout = scope.op(self.sources[0]).layout
        dim = 0 if layout is None else layout.dim

        def run(env: Values, training: bool) -> None:
            x, c = env.kept[j], env.constants[j]
            env.kept[i], env.constants[i] = apply(x), self.constants(c, x.shape, dim)

        return run

    def constants(self, c: Tensor | None, shape: Any, dim: int) -> Tensor | None:
        """What becomes of the constants of a value of this shape."""
        return c if c is None or c.dim() == 1 else self.apply(all_places(c, shape, dim))

    def export(self, small: Small) -> Value:
        source, before = small.source(self), small.flow.source(self)
        dim = 0 if before.layout is None else before.layout.dim
        c = self.constants(source.constants, (1, *(before.shape or ())[1:]), dim)
        return Value(exported_function(self, small, source.node), small.channels(self), c)

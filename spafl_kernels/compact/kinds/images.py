"""Padding and upsampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx, nn
from torch.nn import functional as F

from ..graph.calls import Call, Signature, bound
from .base import Op, Sign, Stop
from .spatial import Spatial

if TYPE_CHECKING:
    from ..graph.flow import Flow

__all__ = ["Padding", "Upsampling"]

_MODES = {
    nn.ZeroPad2d: "constant", nn.ConstantPad2d: "constant", nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate", nn.CircularPad2d: "circular",
}  # fmt: skip


@dataclass(eq=False)
class Padding(Spatial):
    """``sides``: as ``F.pad`` has them."""

    kind = "padding"
    modules = tuple(_MODES)
    calls: ClassVar[Mapping[Any, Any]] = {F.pad: Signature("input pad mode value", mode="constant", value=None)}

    sides: tuple[int, ...] = ()

    @property
    def sign(self) -> Sign:
        return Sign.KEEPS if self.fills <= 0 else Sign.LOSES

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        return cls.of_padding(node, tuple(m.padding), _MODES[type(m)], float(getattr(m, "value", 0.0)))

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        rest = call.literals("input")
        if not isinstance(call.values["input"], fx.Node) or rest is None:
            return None
        if not isinstance(rest["pad"], (tuple, list)) or not all(isinstance(p, int) for p in rest["pad"]):
            return None
        return cls.of_padding(call.node, tuple(rest["pad"]), rest["mode"], float(rest["value"] or 0.0))

    @classmethod
    def of_padding(cls, node: Any, sides: tuple[int, ...], mode: str, value: float) -> Op:
        if mode == "constant":
            apply = partial(F.pad, pad=sides, mode=mode, value=value)
            return cls(node, apply=apply, keeps=not any(sides), fills=value if any(sides) else 0.0, sides=sides)
        return cls(node, apply=partial(F.pad, pad=sides, mode=mode), sides=sides)

    def follow(self, flow: Flow) -> None:
        if len(self.sides) > 4 and any(self.sides[4:]) and flow.source(self).layout is not None:
            raise Stop("padding of channels or of the batch")
        super().follow(flow)


@dataclass(eq=False)
class Upsampling(Spatial):
    """Weights of one position sum to 1, so a constant stays what it is. ``mixes``: some may be negative."""

    kind = "upsampling"
    modules = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
    calls: ClassVar[Mapping[Any, Any]] = {
        F.interpolate: Signature(
            "input size scale_factor mode align_corners recompute_scale_factor antialias", size=None,
            scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None, antialias=False,
        )
    }  # fmt: skip

    mixes: bool = False

    @property
    def sign(self) -> Sign:
        return Sign.LOSES if self.mixes else Sign.KEEPS

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        rest = {k: getattr(m, k) for k in ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")}
        return cls(node, apply=partial(F.interpolate, **rest), mixes=m.mode == "bicubic")

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        rest = call.literals("input")
        if not isinstance(call.values["input"], fx.Node) or rest is None:
            return None
        return cls(call.node, apply=bound(F.interpolate, rest), mixes=rest["mode"] == "bicubic")

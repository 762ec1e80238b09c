"""Convolutions over one dimension, and transposed ones over two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ...layers import ThresholdConv1d, ThresholdConvTranspose2d
from ..run.constants import all_places, typed
from ..small import Small
from .base import Const, Op
from .layers import Layer, under_mask

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..plan.slots import LayerSlot
    from ..run.program import Values
    from ..run.scope import Run, Scope

__all__ = ["OtherConvolution"]


@dataclass(eq=False)
class OtherConvolution(Layer):
    """Without groups. What the constants of dropped channels add is the convolution of one sample of them."""

    kind = "other convolution"
    modules: ClassVar[tuple[type, ...]] = (nn.Conv1d, ThresholdConv1d, nn.ConvTranspose2d, ThresholdConvTranspose2d)

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        if m.groups > 1:
            return Layer.of_module(node, m, flow)
        flow.layers[flow.names[id(m)]] = op = cls(node, grad=True)
        return op

    def takes_tail(self, scope: Scope) -> bool:
        return False

    def build(self, scope: Scope, i: int) -> Run:
        m, source = self.module, scope.op(self.sources[0])
        name, j = scope.flow.names[id(m)], scope.index[source.name]
        slot, shape = scope.layers[name], source.shape or ()
        mask_bias = getattr(m, "mask_bias", False)
        drops = scope.channels(self) is not None and len(scope.plan.rows[name].dropped) > 0
        const_out, const_in = bool(self.const) and drops, self.reads_constants(scope)
        read = scope.full(source.name) if self.columns is None else None
        self.count_macs(scope, source, slot, const_in)

        def run(env: Values, training: bool) -> None:
            weight, bias, dropped = slot.masked(mask_bias)
            mask = slot.mask
            y = self.apply(env.kept[j] if read is None else read(env), weight, bias if mask is None else None)
            if const_in and (c := env.constants[j]) is not None:
                assert dropped is not None
                y = y + self.apply(all_places(c, shape, 1), dropped, None)
            if mask is not None:
                y = under_mask(y, mask, bias, mask_bias, self.along)
            env.kept[i] = y
            if const_out:
                env.constants[i] = typed(slot.bias_dropped, y)

        return run

    def count_macs(self, scope: Scope, source: Op, slot: LayerSlot, const_in: bool, as_map: bool = False) -> None:
        scope.macs += (3 if source.grad else 2) * slot.weight.numel() * self.positions
        if const_in and (dropped := slot.weight_dropped) is not None:
            products = 3 * dropped.numel() * self.positions
            scope.macs += products if source.const == Const.SAMPLE else 0
            scope.macs_fixed += 0 if source.const == Const.SAMPLE else products

    def exported_constants(
        self, small: Small, dropped: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        maps = small.constant_maps(self)
        assert maps is not None
        return bias, self.apply(maps, dropped, None)

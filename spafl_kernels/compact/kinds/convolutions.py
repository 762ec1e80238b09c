"""Convolutions over one dimension, and transposed ones over two."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...layers import ThresholdConv1d, ThresholdConvTranspose2d
from ..run.constants import all_places, typed
from ..small import Small
from .base import Const, Op
from .layers import Layer, under_mask
from .whole import Whole

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..plan.slots import LayerSlot
    from ..run.program import Values
    from ..run.scope import Run, Scope

__all__ = ["OtherConvolution"]


@dataclass(eq=False)
class OtherConvolution(Layer):
    """Without groups. What the constants of dropped channels add is the convolution of one sample of them.

    ``places``: where a kernel is applied in one sample: positions of the result, of the input if it is transposed.
    """

    kind = "other convolution"
    modules: ClassVar[tuple[type, ...]] = (nn.Conv1d, ThresholdConv1d, nn.ConvTranspose2d, ThresholdConvTranspose2d)

    places: int = 0

    @classmethod
    def of_module(cls, node: Any, m: Any, flow: Flow) -> Op | None:
        name = flow.names[id(m)]
        if m.groups > 1:
            flow.whole[name] = "it has groups"
            return Whole(node, reason=flow.whole[name])
        flow.layers[name] = op = cls(node, grad=True)
        return op

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, nn.ConvTranspose2d)

    @property
    def positions(self) -> int:
        return self.places

    def follow(self, flow: Flow) -> None:
        super().follow(flow)
        self.places = prod((flow.source(self) if self.transposed else self).shape[2:])  # type: ignore[index]

    def takes_tail(self, scope: Scope) -> bool:
        return False

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        m = self.module
        if self.transposed:
            weight = weight.transpose(0, 1)
            return F.conv_transpose2d(x, weight, bias, m.stride, m.padding, m.output_padding, 1, m.dilation)
        pad_first, padding = self.outer_padding()
        if pad_first is not None:
            x = F.pad(x, pad_first, mode=m.padding_mode)
        return F.conv1d(x, weight, bias, m.stride, padding, m.dilation)

    def build(self, scope: Scope, i: int) -> Run:
        m, source = self.module, scope.op(self.sources[0])
        name, j = scope.flow.names[id(m)], scope.index[source.name]
        slot, shape = scope.layers[name], source.shape or ()
        mask_bias = getattr(m, "mask_bias", False)
        drops = scope.channels(self) is not None and len(scope.plan.rows[name].dropped) > 0
        const_out, const_in = bool(self.const) and drops, self.reads_constants(scope)
        read = scope.full(source.name) if self.columns is None else None
        self.count_macs(scope, source, slot, const_in)
        along = (1, -1, *(1,) * (len(shape) - 2))

        def run(env: Values, training: bool) -> None:
            weight, bias, dropped = slot.masked(mask_bias)
            mask = slot.mask
            y = self.apply(env.kept[j] if read is None else read(env), weight, bias if mask is None else None)
            if const_in and (c := env.constants[j]) is not None:
                assert dropped is not None
                y = y + self.apply(all_places(c, shape, 1), dropped, None)
            if mask is not None:
                y = under_mask(y, mask, bias, mask_bias, along)
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

    def exported_conv(
        self, small: Small, name: str, node: fx.Node, weight: Tensor, bias: Tensor | None, groups: int
    ) -> fx.Node:
        if not self.transposed:
            return super().exported_conv(small, name, node, weight, bias, groups)
        m, (filters, inputs) = self.module, weight.shape[:2]
        made = nn.ConvTranspose2d(
            inputs, filters, m.kernel_size, m.stride, m.padding, m.output_padding, 1, bias is not None, m.dilation,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        made.weight.copy_(weight.transpose(0, 1))
        if bias is not None:
            assert made.bias is not None
            made.bias.copy_(bias)
        return small.module(name, made, node)

    def exported_constants(
        self, small: Small, dropped: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        maps = small.constant_maps(self)
        assert maps is not None
        return bias, self.apply(maps, dropped, None)

"""Where a program finds the compact tensors of its layers and norms, whoever owns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class LayerSlot:
    """Compact tensors of one layer. Rows are the kept filters, then zero rows.

    Args:
        weight: ``(rows, kept inputs + pads, *kernel)``.
        weight_dropped: ``(rows, dropped inputs, *kernel)``; may be None where dropped inputs are 0.
        bias: ``(rows,)`` or None.
        bias_dropped: bias of the dropped filters; None without bias.
        mask: ``(rows,)`` multiplies the output if some kept filters are pruned; its gradient is ``sum G w`` per row.
        rows: ``(rows,)`` multiplies the weights instead, where that gradient is not wanted.
    """

    weight: Any
    weight_dropped: Tensor | None = None
    bias: Tensor | None = None
    bias_dropped: Tensor | None = None
    mask: Tensor | None = None
    rows: Tensor | None = None

    def masked(self, mask_bias: bool) -> tuple[Any, Tensor | None, Tensor | None]:
        """Weight, bias and the weights of dropped inputs under ``rows``."""
        weight, bias, dropped, rows = self.weight, self.bias, self.weight_dropped, self.rows
        if rows is not None:
            column = rows.view(-1, *(1,) * (weight.dim() - 1))
            weight = weight * column
            dropped = None if dropped is None else dropped * column
            bias = bias * rows if bias is not None and mask_bias else bias
        return weight, bias, dropped


@dataclass
class NormSlot:
    """Compact tensors of one BatchNorm; four are those of dropped channels, None if there are none.

    ``batches``: how many it has seen in training that its module does not know of.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    weight_dropped: Tensor | None = None
    bias_dropped: Tensor | None = None
    mean_dropped: Tensor | None = None
    var_dropped: Tensor | None = None
    batches: int = 0

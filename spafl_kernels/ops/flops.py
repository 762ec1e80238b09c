"""What ``torch.utils.flop_counter`` counts for the threshold operators: the same layer with all its filters active.

That is also what it counts for the masked reference. How many filters are active is known on the device only; what is
executed is counted by :mod:`spafl_kernels.executed`. Importing this module registers the formulas, as
:mod:`spafl_kernels.training` does; ``import spafl_kernels`` does not, for the counter imports triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from ..triton.geometry import Geometry
from . import library  # noqa: F401  (defines the operators)

_SPAFL = torch.ops.spafl
OPERATORS = (
    _SPAFL.threshold_linear, _SPAFL.threshold_linear_backward, _SPAFL.threshold_conv2d,
    _SPAFL.threshold_conv2d_backward,
)  # fmt: skip

# Formulas get shapes in the place of tensors.
Shape = Sequence[int]


def _linear(input: Shape, weight: Shape) -> int:
    return 2 * math.prod(weight) * input[1]


def _conv2d(input: Shape, weight: Shape, stride: Shape, padding: Shape, dilation: Shape) -> int:
    pairs = [(pair[0], pair[1]) for pair in (stride, padding, dilation)]
    g = Geometry(weight[2], input[3], input[4], (weight[3], weight[4]), *pairs)
    return 2 * math.prod(weight) * input[1] * math.prod(g.output)


@register_flop_formula(_SPAFL.threshold_linear)
def _(input: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _linear(input, weight)


@register_flop_formula(_SPAFL.threshold_conv2d)
def _(
    input: Shape, weight: Shape, threshold: Shape, bias: Shape | None, stride: Shape, padding: Shape, dilation: Shape,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _conv2d(input, weight, stride, padding, dilation)


@register_flop_formula(_SPAFL.threshold_linear_backward)
def _(
    grad: Shape, input: Shape, weight: Shape, packed: Shape, plan: Shape, bias: Shape | None, mask_bias: bool,
    need_input: bool, need_weight: bool, **_: Any,
) -> int:  # fmt: skip
    return (need_input + need_weight) * _linear(input, weight)


@register_flop_formula(_SPAFL.threshold_conv2d_backward)
def _(
    grad: Shape, input: Shape, weight: Shape, packed: Shape, plan: Shape, bias: Shape | None, stride: Shape,
    padding: Shape, dilation: Shape, mask_bias: bool, need_input: bool, need_weight: bool, **_: Any,
) -> int:  # fmt: skip
    return (need_input + need_weight) * _conv2d(input, weight, stride, padding, dilation)


def of_other_operators(counter: FlopCounterMode) -> int:
    """FLOPs that a counter has seen outside the threshold operators."""
    by_operator = counter.get_flop_counts().get("Global", {})
    return counter.get_total_flops() - sum(by_operator.get(op, 0) for op in OPERATORS)

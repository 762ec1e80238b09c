"""Multiply-accumulates of PyTorch's own operators, and what its counter is to say of the threshold operators.

``torch.utils.flop_counter`` counts the weight gradient of a convolution in groups as that of one without, and neither
attention on a CPU nor the LSTM that runs in one operator; :class:`Counter` has formulas of its own for these.

For the threshold operators it counts the same layer with all its filters active, as for the masked reference. How many
filters are active is known on the device only; what is executed is counted by :mod:`spafl_kernels.executed`. Importing
this module registers those formulas, as :mod:`spafl_kernels.training` does; ``import spafl_kernels`` does not, for the
counter imports triton.
"""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula, shape_wrapper

from .gpu import operators  # noqa: F401  (defines the operators)
from .gpu.geometry import Geometry

_ATEN = torch.ops.aten
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
    grad: Shape, input: Shape, weight: Shape, packed: Shape, selection: Shape, bias: Shape | None, mask_bias: bool,
    need_input: bool, need_weight: bool, **_: Any,
) -> int:  # fmt: skip
    return (need_input + need_weight) * _linear(input, weight)


@register_flop_formula(_SPAFL.threshold_conv2d_backward)
def _(
    grad: Shape, input: Shape, weight: Shape, packed: Shape, selection: Shape, bias: Shape | None, stride: Shape,
    padding: Shape, dilation: Shape, mask_bias: bool, need_input: bool, need_weight: bool, **_: Any,
) -> int:  # fmt: skip
    return (need_input + need_weight) * _conv2d(input, weight, stride, padding, dilation)


# ------------------------------------------------------------------------------------------ PyTorch's own operators
def _convolution_backward(
    grad: Shape, x: Shape, weight: Shape, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, output_mask: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Each of both gradients costs what the forward pass does, in groups too."""
    positions = math.prod((x if transposed else grad)[2:])
    return 2 * (output_mask[0] + output_mask[1]) * grad[0] * math.prod(weight) * positions


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and weighted sum."""
    return 2 * math.prod(query[:-2]) * query[-2] * key[-2] * (query[-1] + value[-1])


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Two products for each of the two; scores that are computed once more do not count."""
    return 2 * _attention(query, key, value)


def _recurrent(x: Shape, weight: Shape, hidden: Shape, *_: Any, **__: Any) -> int:
    """One layer in one direction over ``(time, batch, features)``."""
    return 2 * x[0] * x[1] * (math.prod(weight) + math.prod(hidden))


def _recurrent_backward(x: Shape, weight: Shape, hidden: Shape, *_: Any, **__: Any) -> int:
    return 2 * _recurrent(x, weight, hidden)


_FORMULAS: dict[Any, Any] = {
    _ATEN.convolution_backward: _convolution_backward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _ATEN._scaled_dot_product_flash_attention_backward: _attention_backward,
    _ATEN._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _ATEN._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    _ATEN.mkldnn_rnn_layer: _recurrent,
    _ATEN.mkldnn_rnn_layer_backward: _recurrent_backward,
}
_FORMULAS = {operator: shape_wrapper(formula) for operator, formula in _FORMULAS.items()}


class Counter(TorchDispatchMode):
    """A context that counts the FLOPs of convolutions, matrix products, attention and recurrent layers, two a MAC.

    As :class:`torch.utils.flop_counter.FlopCounterMode`, by whose formulas it counts. Around a mode's dispatch PyTorch
    has its compiler keep out, and imports it for that: most of what a worker process took to start.

    Attributes:
        flops: by operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Tally[Any] = Tally()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what is counted here is never compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, operator = kwargs or {}, func._overloadpacket
        formula = _FORMULAS.get(operator) or flop_registry.get(operator)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops[operator] += formula(*args, **kwargs, out_val=result)
        return result

    def total(self) -> int:
        """FLOPs of all operators."""
        return self.flops.total()

    def of_other_operators(self) -> int:
        """FLOPs outside the threshold operators."""
        return self.total() - sum(self.flops[operator] for operator in OPERATORS)

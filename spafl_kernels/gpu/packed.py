"""What the threshold operators run on a GPU: the threshold pass and the launchers of the packed kernels.

Clients come first everywhere. Nothing is checked here but a pass that was given; ``triton`` is imported at first use.
"""

from __future__ import annotations

import functools
import types

import torch
from torch import Tensor

from ..reference import Estimator
from . import choice
from .arguments import check_selected
from .geometry import Geometry
from .packing import Selection


@functools.cache
def launchers() -> types.ModuleType:
    """:mod:`spafl_kernels.gpu.triton` with its launchers; names of that package alone are looked up at every use."""
    from .triton import launchers

    return launchers


def forward(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, geometry: Geometry | None,
    estimator: Estimator, mask_bias: bool, selection: Tensor | None, packed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(output, selection, packed)``; the last two are those that were given, or made here.

    Args:
        input, weight, threshold, bias, estimator, mask_bias, selection, packed: as for the operators.
        geometry: of a convolution; None: a linear layer.
    """
    run = launchers()
    check_selected(input, weight, selection, packed)
    if selection is None or packed is None:
        made, packed, _ = run.select_layer(weight, threshold, estimator, input.dtype)
    else:
        made = Selection(selection, weight.shape[1])
    tf32 = input.dtype == torch.float32 and choice.tf32(conv=geometry is not None)
    if geometry is not None:
        return run.layer_forward(input, packed, made, bias, geometry, mask_bias, tf32), made.data, packed
    y = run.layer_forward(input[..., None, None], packed, made, bias, Geometry(weight.shape[2]), mask_bias, tf32)
    return y.squeeze(4).squeeze(3), made.data, packed


def backward(
    grad: Tensor, input: Tensor, weight: Tensor, packed: Tensor, selection: Tensor, bias: Tensor | None,
    geometry: Geometry | None, mask_bias: bool, need_input: bool, need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """``(dinput, dweight, dthreshold, dbias)``; None where not needed."""
    run, made = launchers(), Selection(selection, weight.shape[1])
    tf32 = input.dtype == torch.float32 and choice.tf32(conv=geometry is not None)
    if geometry is not None:
        return run.layer_backward(
            grad, input, weight, packed, made, bias, geometry, mask_bias, tf32, need_input, need_weight
        )
    dx, dw, dtau, db = run.layer_backward(
        grad[..., None, None], input[..., None, None], weight, packed, made, bias, Geometry(weight.shape[2]),
        mask_bias, tf32, need_input, need_weight,
    )  # fmt: skip
    return None if dx is None else dx.squeeze(4).squeeze(3), dw, dtau, db

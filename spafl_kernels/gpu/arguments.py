"""Arguments of the threshold operators: what no implementation can compute is refused, in one line each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .geometry import Geometry
from .packing import capacity, row_stride, selection_size

_LOW = (torch.float16, torch.bfloat16)


def check(
    input: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, estimator: str, dims: tuple[int, int]
) -> None:
    """Shapes, devices and dtypes; ``dims``: dimensions of input and weight, clients first.

    Raises:
        ValueError: names the argument.
    """
    reference.check_estimator(estimator)
    shape, filters = input.shape, weight.shape
    if len(shape) != dims[0] or len(filters) != dims[1]:
        raise ValueError(
            f"input and weight must have {dims[0]} and {dims[1]} dimensions, clients first; got shapes "
            f"{tuple(shape)} and {tuple(filters)}"
        )
    clients, out = filters[0], filters[1]
    if shape[0] != clients or shape[2] != filters[2]:
        raise ValueError(
            f"input must have {clients} clients and {filters[2]} input channels, as weight has; got shape "
            f"{tuple(shape)}"
        )
    if out == 0 or filters[2:].numel() == 0:
        raise ValueError(f"weight must have at least one filter and one number per filter; got {tuple(filters)}")
    device, dtype = weight.device, weight.dtype
    others = (("threshold", threshold),) if bias is None else (("threshold", threshold), ("bias", bias))
    for name, tensor in others:
        if tensor.shape != (clients, out):
            raise ValueError(f"{name} must have shape {(clients, out)}; got {tuple(tensor.shape)}")
    for name, tensor in (("input", input), *others):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but weight is on {device}")
    for name, tensor in others:
        if tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype} but weight has {dtype}")
    if input.dtype != dtype and not (dtype == torch.float32 and input.dtype in _LOW):
        raise ValueError(
            f"input must have the dtype of weight, or float16 or bfloat16 with a float32 weight; got {input.dtype} and "
            f"{dtype}"
        )


def check_selected(input: Tensor, weight: Tensor, selection: Tensor | None, packed: Tensor | None) -> None:
    """Refuse a pass that was made for another layer, or in another dtype.

    Raises:
        ValueError: says what was expected and what was given.
    """
    if selection is None and packed is None:
        return
    clients, out = weight.shape[:2]
    rows = (clients, capacity(out), row_stride(weight.shape[2:].numel()))
    if selection is None or packed is None or selection.shape != (clients, selection_size(out)) or packed.shape != rows:
        shapes = [None if t is None else tuple(t.shape) for t in (selection, packed)]
        raise ValueError(
            f"selection and packed must have shapes {(clients, selection_size(out))} and {rows}; got {shapes}"
        )
    if selection.dtype != torch.int32:
        raise ValueError(f"selection must be int32; got {selection.dtype}")
    if packed.dtype != input.dtype:
        raise ValueError(f"packed must have the dtype of input; got {packed.dtype} and {input.dtype}")


def geometry(
    input: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Geometry:
    """Sizes of a convolution; ``input`` and ``weight`` are shapes, clients first.

    Raises:
        ValueError: stride, padding or dilation that no convolution has, or an input that is smaller than the kernel.
    """
    pairs: list[tuple[int, int]] = []
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(value) != 2 or min(value) < least:
            raise ValueError(f"{name} must be two integers of at least {least}; got {list(value)}")
        pairs.append((value[0], value[1]))
    kernel = (weight[3], weight[4])
    found = Geometry(weight[2], input[3], input[4], kernel, *pairs)
    if min(found.output) < 1:
        raise ValueError(
            f"input of size {tuple(input[3:])} is too small for kernel {kernel}, padding {pairs[1]} and dilation "
            f"{pairs[2]}: the output would be {found.output}"
        )
    return found

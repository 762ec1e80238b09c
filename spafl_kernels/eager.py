"""Whether a call is plain eager: nobody but autograd would see an operator, so that the dispatcher can be left out."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def _ordinary(device: str) -> frozenset[int]:
    """Key sets of tensors whose memory holds their values as they are: no wrapper, transform, or lazy negation."""
    with torch.inference_mode():
        inference = torch.empty(0, device=device)
    with torch.inference_mode(False):
        tensors = (inference, torch.empty(0, device=device))
    return frozenset(torch._C._dispatch_keys(t).raw_repr() for t in tensors)


def unseen() -> bool:
    """Whether no mode, transform or tracer would see an operator."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
    )


def plain(first: Tensor, *others: Tensor | None) -> bool:
    """Whether nobody but autograd would see an operator on these tensors, and kernels may read their memory."""
    if not unseen():
        return False
    if torch._C._dispatch_keys(first).raw_repr() not in _ordinary("cuda" if first.is_cuda else "cpu"):
        return False
    for tensor in others:  # noqa: SIM110 (any() of a generator takes as long as all the rest)
        if tensor is not None and not _is_parameter(tensor):
            return False
    return True


def _is_parameter(tensor: Tensor) -> bool:
    """The same as for the first tensor; faster for a parameter, which is never a wrapper that transforms leave."""
    if type(tensor) is torch.nn.Parameter:
        return not tensor.is_neg()
    return torch._C._dispatch_keys(tensor).raw_repr() in _ordinary("cuda" if tensor.is_cuda else "cpu")

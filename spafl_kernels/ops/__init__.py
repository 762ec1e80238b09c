"""Operators of the threshold layers: schema, CPU, CUDA and fake implementations, autograd, autocast, vmap.

``torch.ops.spafl.threshold_linear`` and ``torch.ops.spafl.threshold_conv2d`` take a leading client dimension in every
tensor: each client has its own weights, thresholds and batch, and all run in one launch. ``torch.func.vmap`` over them
becomes more clients of the same call. A single layer is one client. They return ``(output, plan, packed)``; plan and
packed weights (see :mod:`spafl_kernels.triton.plan`) are what the backward operators need.

Mixed precision: weights may be float32 while the input is float16 or bfloat16. Masks are always decided in the dtype of
the weights; autocast therefore casts the input only.
"""

from .backend import Explanation, explain
from .library import conv2d, linear

__all__ = ["Explanation", "conv2d", "explain", "linear"]

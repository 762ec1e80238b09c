"""Number types that kernels take as compile-time arguments."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def offset_type(x: Tensor) -> tl.dtype:
    """Integer for offsets inside one image of ``(clients, N, H, W, C)``: 32 bits where they are enough.

    The start of an image is always a 64-bit offset. Inside, 64-bit multiplications would be most of the address work.
    """
    extent = sum((size - 1) * stride for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True))
    return tl.int32 if extent < 2**31 else tl.int64

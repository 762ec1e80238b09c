"""Number types that kernels take as compile-time arguments."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def is_wide(x: Tensor) -> bool:
    """Whether offsets inside one image of ``(clients, N, H, W, C)`` need 64 bits.

    The start of an image is always a 64-bit offset. Inside, 64-bit multiplications would be most of the address work.
    """
    return sum((size - 1) * stride for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True)) >= 2**31

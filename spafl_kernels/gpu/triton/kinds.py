"""Number types that kernels take as compile-time arguments."""

from __future__ import annotations

import torch
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

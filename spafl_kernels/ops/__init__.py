"""Operators with a compiled kernel and a plain-PyTorch twin that computes the same.

Every function takes ``backend``: ``"auto"`` uses the compiled kernel where it applies and the twin elsewhere,
``"native"`` raises where the kernel cannot be used, ``"torch"`` always takes the twin.
"""

from ._backend import ready
from .conv_pool import DirectConvReluPool, DirectReluPool, conv_relu_pool, relu_pool
from .sgd import sgd_step
from .step import FilterRows, threshold_step
from .threshold import threshold_pass

__all__ = [
    "DirectConvReluPool",
    "DirectReluPool",
    "FilterRows",
    "conv_relu_pool",
    "ready",
    "relu_pool",
    "sgd_step",
    "threshold_pass",
    "threshold_step",
]

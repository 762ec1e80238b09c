"""Operators of the threshold layers, in one place whatever the module that has them.

On the CPU: operators with a compiled kernel and a plain-PyTorch twin that computes the same (:func:`batch_norm_relu`,
:func:`conv_relu_pool`, :func:`relu_pool`, :func:`expand_channels`, :func:`image_conv`, :func:`sgd_step`,
:func:`threshold_pass`). They take ``backend``: ``"auto"`` uses the compiled kernel where it applies and the twin
elsewhere, ``"native"`` raises where the kernel cannot be used, ``"torch"`` always takes the twin.

On a GPU: ``torch.ops.spafl.threshold_linear`` and ``torch.ops.spafl.threshold_conv2d``, with schema, CPU, CUDA and fake
implementations, autograd, autocast and vmap. They take a leading client dimension in every tensor: each client has its
own weights, thresholds and batch, and all run in one launch. ``torch.func.vmap`` over them becomes more clients of the
same call; a single layer is one client. They return ``(output, selection, packed)``; selection and packed weights (see
:mod:`spafl_kernels.gpu.packing`) are what the backward operators need. Weights may be float32 while the input is
float16 or bfloat16: masks are always decided in the dtype of the weights, so autocast casts the input only. A layer in
plain eager mode runs the same launchers without the dispatcher (:mod:`spafl_kernels.gpu.direct`).
:func:`spafl_kernels.explain` says which implementation a layer uses on an input, and why.
"""

from .backend import Explanation
from .cpu.channels import DirectExpandChannels, expand_channels
from .cpu.compiled import ready
from .cpu.conv_pool import DirectConvReluPool, DirectReluPool, conv_relu_pool, relu_pool
from .cpu.image_conv import DirectImageConv, image_conv, image_passes
from .cpu.norm import DirectBatchNormRelu, batch_norm_relu
from .cpu.sgd import sgd_step
from .cpu.step import FilterRows, threshold_step
from .cpu.threshold import threshold_pass
from .gpu.single import conv2d, linear

__all__ = [
    "DirectBatchNormRelu",
    "DirectConvReluPool",
    "DirectExpandChannels",
    "DirectImageConv",
    "DirectReluPool",
    "Explanation",
    "FilterRows",
    "batch_norm_relu",
    "conv2d",
    "conv_relu_pool",
    "expand_channels",
    "image_conv",
    "image_passes",
    "linear",
    "ready",
    "relu_pool",
    "sgd_step",
    "threshold_pass",
    "threshold_step",
]

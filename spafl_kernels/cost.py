"""Counting, not measuring: multiply-accumulates of a model's layers on one sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def layer_macs(model: nn.Module, sample: Tensor, per_token: bool = True) -> dict[str, int]:
    """Multiply-accumulates of one forward pass of every convolution and linear layer, dense, for one sample.

    Args:
        model: any module; run once in eval mode without gradients, its mode restored.
        sample: one input with a batch dimension of 1.
        per_token: count a linear layer for every token it is applied to; the counter published with SpaFL counts it
            once per sample.

    Returns:
        By layer name: ``weights * output positions``, of a transposed convolution ``weights * input positions``. A
        layer that is called twice counts twice.
    """
    counts: dict[str, int] = {}
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            weight: Any = module.weight
            per_position = math.prod(weight.shape)
            if isinstance(module, nn.Linear):
                positions = output.numel() // weight.shape[0] // sample.shape[0]
            else:  # every place of the input of a transposed convolution meets the kernel, else of the output
                place = args[0] if isinstance(module, _ConvTransposeNd) else output
                positions = math.prod(place.shape[2:]) * place.shape[0] // sample.shape[0]
            if isinstance(module, nn.Linear) and not per_token:
                positions = 1
            counts[name] = counts.get(name, 0) + per_position * positions

        return hook

    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            handles.append(module.register_forward_hook(watch(name)))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(sample)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return counts

"""Drop-in layers: those of ``torch.nn`` with one trainable threshold per filter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from . import functional
from .threshold_layer import ThresholdLayer

__all__ = ["ThresholdConv1d", "ThresholdConv2d", "ThresholdConvTranspose2d", "ThresholdLayer", "ThresholdLinear"]


def _padded(layer: nn.Conv1d | nn.Conv2d, input: Tensor) -> tuple[Tensor, Any]:
    """The input and the zeros that the operator has to add to it; anything but zeros is padded here."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


class ThresholdConv2d(ThresholdLayer, nn.Conv2d):
    """``nn.Conv2d`` whose filters are pruned, whole, while ``mean|w| <= threshold``.

    Args:
        estimator: straight-through rule of the comparison, ``"identity"`` (SpaFL, arXiv 2406.00431) or ``"window"``
            (the published CIFAR code).
        mask_bias: prune a filter's bias with it; by default a pruned filter still adds its bias.

    All other arguments, shapes and the state dict are those of :class:`torch.nn.Conv2d`; the state dict also holds
    ``threshold``, shape ``(out_channels,)``, initially 0.
    """

    def forward(self, input: Tensor) -> Tensor:
        input, padding = _padded(self, input)
        stride: Any = self.stride
        dilation: Any = self.dilation
        return functional.threshold_conv2d(
            input, self.weight, self.threshold, self.bias, stride, padding, dilation, self.groups,
            self.estimator, self.mask_bias, self.known_density, self.selected,
        )  # fmt: skip


class ThresholdConv1d(ThresholdLayer, nn.Conv1d):
    """``nn.Conv1d`` whose filters are pruned, whole, while ``mean|w| <= threshold``.

    Args:
        estimator, mask_bias: as for :class:`ThresholdConv2d`.

    All other arguments, shapes and the state dict are those of :class:`torch.nn.Conv1d`; the state dict also holds
    ``threshold``, shape ``(out_channels,)``, initially 0.
    """

    def forward(self, input: Tensor) -> Tensor:
        input, padding = _padded(self, input)
        stride: Any = self.stride
        dilation: Any = self.dilation
        return functional.threshold_conv1d(
            input, self.weight, self.threshold, self.bias, stride, padding, dilation, self.groups,
            self.estimator, self.mask_bias, self.known_density,
        )  # fmt: skip


class ThresholdConvTranspose2d(ThresholdLayer, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` whose filters are pruned, whole, while ``mean|w| <= threshold``.

    The filter of an output channel is ``weight[:, o]`` within its group, see :func:`spafl_kernels.reference.filters`.

    Args:
        estimator, mask_bias: as for :class:`ThresholdConv2d`.

    All other arguments, shapes and the state dict are those of :class:`torch.nn.ConvTranspose2d`; the state dict also
    holds ``threshold``, shape ``(out_channels,)``, initially 0.
    """

    @property
    def transposed_groups(self) -> int:
        return self.groups

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        stride: Any = self.stride
        padding: Any = self.padding
        dilation: Any = self.dilation
        kernel: Any = self.kernel_size
        extra: Any = self._output_padding(input, output_size, stride, padding, kernel, 2, dilation)
        return functional.threshold_conv_transpose2d(
            input, self.weight, self.threshold, self.bias, stride, padding, extra, self.groups, dilation,
            self.estimator, self.mask_bias,
        )  # fmt: skip


class ThresholdLinear(ThresholdLayer, nn.Linear):
    """``nn.Linear`` whose neurons are pruned, whole, while ``mean|w| <= threshold``.

    Args:
        estimator: straight-through rule of the comparison, ``"identity"`` (SpaFL, arXiv 2406.00431) or ``"window"``
            (the published CIFAR code).
        mask_bias: prune a neuron's bias with it; by default a pruned neuron still adds its bias.

    All other arguments, shapes and the state dict are those of :class:`torch.nn.Linear`; the state dict also holds
    ``threshold``, shape ``(out_features,)``, initially 0.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.threshold_linear(
            input, self.weight, self.threshold, self.bias, self.estimator, self.mask_bias, self.known_density,
            self.selected,
        )  # fmt: skip

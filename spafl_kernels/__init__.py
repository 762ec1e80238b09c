"""Threshold layers whose forward and backward pass skip pruned filters."""

from .convert import convert, to_dense
from .diagnostics import explain
from .functional import (
    active_filters,
    density,
    filter_scores,
    importance_update_,
    observe,
    threshold_conv1d,
    threshold_conv2d,
    threshold_conv_transpose2d,
    threshold_layers,
    threshold_linear,
    threshold_penalty,
)
from .layers import ThresholdConv1d, ThresholdConv2d, ThresholdConvTranspose2d, ThresholdLayer, ThresholdLinear

__version__ = "0.1.0"

__all__ = [
    "ThresholdConv1d",
    "ThresholdConv2d",
    "ThresholdConvTranspose2d",
    "ThresholdLayer",
    "ThresholdLinear",
    "active_filters",
    "convert",
    "density",
    "explain",
    "filter_scores",
    "importance_update_",
    "observe",
    "threshold_conv1d",
    "threshold_conv2d",
    "threshold_conv_transpose2d",
    "threshold_layers",
    "threshold_linear",
    "threshold_penalty",
    "to_dense",
]

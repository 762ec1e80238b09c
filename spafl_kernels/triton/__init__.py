"""Triton kernels of the threshold layers, and their launchers. ``triton`` itself is imported at first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Geometry": "geometry",
    "ModelPass": "threshold",
    "Plan": "plan",
    "layer_backward": "backward",
    "capacity": "plan",
    "layer_forward": "forward",
    "plan_layer": "threshold",
    "plan_size": "plan",
    "row_stride": "plan",
}
__all__ = [
    "Geometry", "ModelPass", "Plan", "capacity", "layer_backward", "layer_forward", "plan_layer", "plan_size",
    "row_stride",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOME[name]}", __name__)
    return getattr(module, name)

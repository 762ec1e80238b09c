"""Triton kernels of the threshold layers, and their launchers. ``triton`` itself is imported at first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "ModelPass": "threshold",
    "layer_backward": "backward",
    "layer_forward": "forward",
    "select_layer": "threshold",
}
__all__ = ["ModelPass", "layer_backward", "layer_forward", "select_layer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOME[name]}", __name__)
    return getattr(module, name)

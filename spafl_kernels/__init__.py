"""Threshold layers whose forward and backward pass skip pruned filters."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from .convert import convert, to_dense
from .diagnostics import explain
from .functional import (
    active_filters,
    collapse_guard_,
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

if TYPE_CHECKING:
    from .compact import CompactModule, CompactTrainer
    from .compact.audit import audit
    from .compact.export import export
    from .engines import make_trainer
    from .training import AdamOptions, MaskedTrainer, SGDOptions, TrainResult, Unsupported

# What trains and compiles whole models is imported when somebody asks for it.
_LAZY = {
    "AdamOptions": "training",
    "CompactModule": "compact",
    "CompactTrainer": "compact",
    "MaskedTrainer": "training",
    "SGDOptions": "training",
    "TrainResult": "training",
    "Unsupported": "training",
    "audit": "compact",
    "export": "compact",
    "make_trainer": "engines",
    "ops": "ops",
}

__all__ = [
    "AdamOptions",
    "CompactModule",
    "CompactTrainer",
    "MaskedTrainer",
    "SGDOptions",
    "ThresholdConv1d",
    "ThresholdConv2d",
    "ThresholdConvTranspose2d",
    "ThresholdLayer",
    "ThresholdLinear",
    "TrainResult",
    "Unsupported",
    "active_filters",
    "audit",
    "collapse_guard_",
    "convert",
    "density",
    "explain",
    "export",
    "filter_scores",
    "importance_update_",
    "make_trainer",
    "observe",
    "threshold_conv1d",
    "threshold_conv2d",
    "threshold_conv_transpose2d",
    "threshold_layers",
    "threshold_linear",
    "threshold_penalty",
    "to_dense",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return importlib.metadata.version("spafl-kernels")
        except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
            return "0+unknown"
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name]}", __name__)
    return module if name == _LAZY[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "__version__"})

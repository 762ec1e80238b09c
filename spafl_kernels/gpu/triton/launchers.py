"""All launchers in one place, for callers that import Triton late and call them often."""

from . import backward, forward, threshold
from .backward import layer_backward
from .forward import layer_forward
from .launch import current_stream
from .threshold import select_layer

__all__ = ["backward", "current_stream", "forward", "layer_backward", "layer_forward", "select_layer", "threshold"]

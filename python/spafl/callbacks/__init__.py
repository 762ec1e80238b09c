"""Who watches a run: TensorBoard, CSV, Weights & Biases, or a class of one's own; see :mod:`.base`."""

from .base import Callback, Round, Watched
from .registry import CALLBACKS, register_callback

__all__ = ["CALLBACKS", "Callback", "Round", "Watched", "register_callback"]

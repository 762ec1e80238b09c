"""Triton kernels of the threshold layers, and their launchers. Importing this package imports ``triton``."""

from .backward import backward
from .forward import forward
from .geometry import Geometry
from .plan import Plan, capacity, plan_size, row_stride
from .threshold import ModelPass, plan_layer

__all__ = ["Geometry", "ModelPass", "Plan", "backward", "capacity", "forward", "plan_layer", "plan_size", "row_stride"]

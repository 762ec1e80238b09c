"""Whole models on compact tensors: only active filters, and only active input channels, are stored and computed."""

from .flow import Flow, trace_flow
from .trainer import CompactTrainer

__all__ = ["CompactTrainer", "Flow", "trace_flow"]

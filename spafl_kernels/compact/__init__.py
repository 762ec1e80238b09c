"""Whole models on compact tensors: only active filters, and only active input channels, are stored and computed."""

from .audit import Audit, LayerAudit, audit
from .export import export
from .flow import Flow
from .follow import trace_flow
from .module import CompactModule
from .trainer import CompactTrainer

__all__ = ["Audit", "CompactModule", "CompactTrainer", "Flow", "LayerAudit", "audit", "export", "trace_flow"]

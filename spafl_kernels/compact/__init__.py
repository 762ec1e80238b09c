"""Whole models on compact tensors: only active filters, and only active input channels, are stored and computed."""

from typing import TYPE_CHECKING, Any

from .audit import Audit, LayerAudit, audit
from .export import export
from .graph.flow import Flow
from .graph.follow import trace_flow
from .trainer import CompactTrainer

if TYPE_CHECKING:
    from .module import CompactModule

__all__ = ["Audit", "CompactModule", "CompactTrainer", "Flow", "LayerAudit", "audit", "export", "trace_flow"]


def __getattr__(name: str) -> Any:
    """The module for anybody's loop tells the compiler to keep out, for which torch._dynamo is imported: a third of
    what an import took for those who want a trainer alone."""
    if name == "CompactModule":
        from .module import CompactModule

        return CompactModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

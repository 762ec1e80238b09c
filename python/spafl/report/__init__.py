"""Reports of run folders: PNGs, one self-contained HTML page, and a comparison table. Reads files, runs nothing."""

from .page import write_report
from .run_data import ReportError
from .table import comparison_table

__all__ = ["ReportError", "comparison_table", "write_report"]

"""The SpaFL federated simulator: algorithms, data, round loop, cost accounting and reports.

In Python: :func:`run` a configuration, or :func:`load_run` a folder; both give a :class:`~spafl.api.RunResult`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import RunResult, load_run, run
    from .config import RunConfig
    from .errors import UserError

# Imported on first use: `import spafl` alone must stay quick, and light enough for a client's process.
_HOMES = {"run": "api", "load_run": "api", "RunResult": "api", "RunConfig": "config", "UserError": "errors"}

__all__ = ["RunConfig", "RunResult", "UserError", "__version__", "load_run", "run"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("spafl-kernels")
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

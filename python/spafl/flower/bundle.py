"""The folder that ``flwr run`` takes: two imports and a run's configuration. The code is what nodes have installed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import tomli_w

from ..config import RunConfig

_APP = '''"""Made by spafl.flower; the code is the installed package's."""

from spafl.flower.client_app import app as client
from spafl.flower.server_app import app as server

__all__ = ["client", "server"]
'''


def write_app(folder: Path, config: RunConfig, out: Path) -> Path:
    """Write the app of a run.

    Args:
        folder: made if need be.
        config: of the run.
        out: the run folder, on the server's machine.

    Returns:
        ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spafl_app.py").write_text(_APP)
    project = {
        # Nothing to install at run time: nodes have what they need, and may be offline.
        "project": {
            "name": "spafl-app",
            "version": _version(),
            "description": "SpaFL",
            "dependencies": [],
            "license": "Apache-2.0",
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "spafl",
                    "components": {"serverapp": "spafl_app:server", "clientapp": "spafl_app:client"},
                    "config": {"spafl-config": config.to_toml(), "spafl-out": str(out.resolve())},
                }
            }
        },
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project))
    return folder


def _version() -> str:
    try:
        return importlib.metadata.version("spafl-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0"

"""The folder that ``flwr run`` takes: two imports and a run's configuration. The code is what nodes have installed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import tomli_w

from ..config import RunConfig

# One module each: a client's process does not import the server.
_APP = '''"""Made by spafl.flower; the code is the installed package's."""

from spafl.flower.{side}_app import app

__all__ = ["app"]
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
    for side in ("client", "server"):
        (folder / f"spafl_{side}.py").write_text(_APP.format(side=side))
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
                    "components": {"serverapp": "spafl_server:app", "clientapp": "spafl_client:app"},
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

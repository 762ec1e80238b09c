"""Flower's server app: starts or resumes the run that the app's configuration describes."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..config import resolve_config
from ..errors import UserError, WriteError
from ..merge import TooFewUploads
from .message import config_text
from .strategy import SpaFLStrategy


class Stopped(Exception):
    """The run ended before its last round; the text says why, in one line."""


app = ServerApp()
LOG = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run to the end.

    Raises:
        Stopped: wrong configuration, too few clients or uploads, or a run folder that cannot be used.
    """
    try:
        text = config_text(context)
        if not text:
            raise UserError("the app's configuration lacks spafl-config; start runs with python -m spafl.flower")
        config = resolve_config(tomllib.loads(text))
        SpaFLStrategy(config, Path(str(context.run_config["spafl-out"])), LOG.info).start(grid)
    except tomllib.TOMLDecodeError as error:
        raise Stopped(f"spafl-config is not valid TOML: {error}") from None
    except (UserError, TooFewUploads, WriteError) as error:
        raise Stopped(str(error)) from None  # Flower logs it, and marks the run as failed

"""Flower's server app: starts or resumes the run that the app's configuration describes."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..config import RunConfig, resolve_config
from ..errors import UserError, WriteError
from ..merge import TooFewUploads
from .strategy import SpaFLStrategy


class Stopped(Exception):
    """The run ended before its last round; the text says why, in one line."""


app = ServerApp()
LOG = logging.getLogger("flwr")


def configured(context: Context) -> RunConfig:
    """The configuration in ``spafl-config``, the text of a TOML file.

    Raises:
        UserError: it is missing or wrong.
    """
    text = context.run_config.get("spafl-config")
    if not isinstance(text, str) or not text:
        raise UserError("the app's configuration lacks spafl-config; start runs with python -m spafl.flower")
    try:
        return resolve_config(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"spafl-config is not valid TOML: {error}") from None


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run to the end.

    Raises:
        Stopped: wrong configuration, too few clients or uploads, or a run folder that cannot be used.
    """
    try:
        config = configured(context)
        SpaFLStrategy(config, Path(str(context.run_config["spafl-out"])), LOG.info).start(grid)
    except (UserError, TooFewUploads, WriteError) as error:
        raise Stopped(str(error)) from None  # Flower logs it, and marks the run as failed

"""Start or resume a run on a federation of Flower's.

    python -m spafl.flower CONFIG.toml --out RUN [--federation NAME] [--set section.key=value ...] [-- flwr's options]

``NAME`` is a connection in ``$FLWR_HOME/config.toml`` (``[superlink.NAME]``). Exit status: that of ``flwr run``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..config import load_config
from ..errors import UserError
from .bundle import write_app


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m spafl.flower", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path, help="configuration file of the run")
    parser.add_argument("--out", type=Path, required=True, help="run folder, on the server's machine")
    parser.add_argument("--federation", default="local", help="connection of Flower's configuration (default: local)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting")
    given = sys.argv[1:] if arguments is None else arguments
    cut = given.index("--") if "--" in given else len(given)
    args, options = parser.parse_args(given[:cut]), given[cut + 1 :]
    flwr = Path(sys.executable).with_name("flwr")
    command = str(flwr) if flwr.exists() else shutil.which("flwr")
    if command is None:
        print("spafl: error: Flower is not installed: pip install 'spafl-kernels[flower]'", file=sys.stderr)
        return 2
    try:
        config = load_config(args.config, args.set)
    except UserError as error:
        print(f"spafl: error: {error}", file=sys.stderr)
        return 2
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        app = write_app(Path(folder) / "app", config, args.out)
        run = [command, "run", str(app), args.federation, "--stream", *options]
        # Flower starts its other programs by name.
        path = os.pathsep.join([str(Path(command).parent), os.environ.get("PATH", "")])
        return subprocess.run(run, env={**quiet, **os.environ, "PATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())

"""A SuperLink on this machine for Flower's simulation engine: of its own, and ended with its user.

``flwr run`` would start one too, but on a fixed port, which another one may have; it gives up after 15 seconds, which a
busy machine needs to import what Flower needs; and it leaves the process behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

CONNECTION = "spafl-local"


@contextlib.contextmanager
def simulation_link(home: Path, seconds: float = 180.0) -> Iterator[str]:
    """Run a SuperLink in simulation mode; yields the name of the connection to it, in ``home``.

    Args:
        home: ``FLWR_HOME`` of the link, and of whoever starts runs on it.
        seconds: to wait until it answers.

    Raises:
        UserError: it does not start; names its log.
    """
    home.mkdir(parents=True, exist_ok=True)
    log, port = home / "superlink.log", _free_port()
    connection = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(f'[superlink]\ndefault = "{CONNECTION}"\n\n{connection}')
    programs = str(Path(sys.executable).parent)
    environment = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as Ray will do unasked; else it warns in every run
        **os.environ,
        "FLWR_HOME": str(home),
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),  # Flower starts its other programs by name
    }
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port),
               "--database", str(home / "link.db"), "--disable-runtime-dependency-installation"]  # fmt: skip
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        _wait_for(process, port, seconds, log)
        yield CONNECTION
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):  # what is left of its group
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for(process: subprocess.Popen[bytes], port: int, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise UserError(f"flower-superlink ended with status {process.returncode}; its log is {log}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise UserError(f"flower-superlink did not answer within {seconds:g} s; its log is {log}")


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port

"""Environments of their own for tests of what is not installed here, with all that is."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tell(*command, **more):
    """What a program prints; its failure fails the test."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def environment(folder, *packages):
    """``(python, environment variables)`` of a new environment with these packages; this checkout comes first, then
    they, then what is installed here."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    tell(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages, env=clean)
    own = tell(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", env=clean).strip()
    path = [ROOT, ROOT / "python", own, sysconfig.get_paths()["purelib"]]
    return python, clean | {"PYTHONPATH": os.pathsep.join(map(str, path))}

"""Which version of the sources a figure was measured with, also on a machine that has neither git nor the history."""

from __future__ import annotations

import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Written by whoever copies the sources without their history, beside the copy's other build products.
FILE = "build/gpu/COMMIT"


def commit(root: pathlib.Path = ROOT, *, changes: bool = True) -> str:
    """The commit of the sources in ``root``, as git abbreviates it; "unknown" if nothing says it.

    Asked in this order: the environment variable ``SPAFL_COMMIT``; git, where ``root`` is a checkout and git is
    installed; the file ``build/gpu/COMMIT``.

    Args:
        changes: let git add ``-dirty`` where tracked files differ from the commit.
    """
    said = os.environ.get("SPAFL_COMMIT", "").strip()
    if said:
        return said
    # A copy without history may lie in somebody else's checkout, whose commit says nothing of it.
    if (root / ".git").exists():
        command = ["git", "describe", "--always", "--exclude=*", *["--dirty"] * changes]
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        except OSError:
            pass  # no git here
        else:
            if done.returncode == 0 and done.stdout.strip():
                return done.stdout.strip()
    file = root / FILE
    return (file.read_text().strip() if file.is_file() else "") or "unknown"

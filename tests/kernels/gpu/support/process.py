"""Triton reads TRITON_INTERPRET when a kernel is defined: interpreter and compiler need a process each."""

import os
import subprocess
import sys

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Which of the tests that were collected run in this process: (i, n), every n-th from the i-th.
_VARIABLE = "SPAFL_TEST_PART"
PART = tuple(map(int, os.environ.get(_VARIABLE, "0/1").split("/")))


def pytest_in_own_process(file: str, interpret: bool, part: tuple[int, int] = (0, 1)) -> None:
    """Run the tests of ``file`` by a pytest of its own, with or without the interpreter; fail with its output.

    ``part``: ``(i, n)``, every n-th test from the i-th.
    """
    folder = os.path.dirname(os.path.abspath(file))
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "PYTEST_ADDOPTS": ""}
    environment[_VARIABLE] = "{}/{}".format(*part)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--durations=10", os.path.abspath(file)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"

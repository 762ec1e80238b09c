"""compute-sanitizer over a run of every kernel; and that run itself, in the interpreter, where there is no GPU."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu.toolkit import program

pytest.importorskip("triton")
SMOKE = pathlib.Path(__file__).with_name("support") / "smoke.py"
FOUND = 9  # exit code that the tool is told to give for what it finds
SECONDS = 150  # per run


@pytest.mark.slow
def test_the_smoke_run_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(SMOKE), "--device", "cpu"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "every kernel ran on cpu; CUDA C++ kernels: no\n"


@pytest.fixture(scope="module")
def sanitizer():
    """Runs the smoke script under a tool of compute-sanitizer; skips, and says why, where that cannot be."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    path = program("compute-sanitizer")
    if path is None:
        pytest.skip("compute-sanitizer is not installed: neither on the path nor in CUDA_HOME/bin")
    # Every tensor an allocation of its own: a write behind it is then outside of everything.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    smoke = [sys.executable, str(SMOKE)]
    # Without the tool first: kernels are compiled, and a failure here is not the tool's.
    done = subprocess.run(smoke, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [path, "--tool", name, "--error-exitcode", str(FOUND), *smoke, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        if "Device not supported" in done.stdout + done.stderr:
            pytest.skip(f"compute-sanitizer does not work on this machine: {name} says 'Device not supported'")
        return done

    return run


@pytest.mark.gpu
def test_a_planted_write_is_found(sanitizer):
    done = sanitizer("memcheck", "--plant")
    assert done.returncode != 0 and "Invalid __global__ write" in done.stdout + done.stderr, done.stdout[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["memcheck", "racecheck"])
def test_nothing_is_found(sanitizer, name):
    done = sanitizer(name)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "every kernel ran on cuda" in done.stdout

"""The same tests of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_build
import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++: the CUDA kernels cannot be run on the CPU")


def run_tests(library, *arguments, **environment):
    # -s: a sanitizer writes its report and ends the process, so pytest must not hold the output back.
    command = [sys.executable, "-m", "pytest", "-s", "-x", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    full = {**inherited, "SPAFL_TEST_CUDA_LIBRARY": str(library), "SPAFL_TEST_CUDA_SCHEDULES": "7", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=full, cwd=cuda_build.REPOSITORY)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["threshold_pass", "fused_step", "compact_copies"])
def test_kernels_under_the_sanitizers(name):
    library = cuda_build.on_cpu(sanitize=True)
    done = run_tests(library, HERE / f"test_cuda_{name}.py", **cuda_build.sanitizer_environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_the_sanitizers_catch_a_read_past_the_end():
    edit = ("threshold_pass.cu", "if (filter >= layer.filters) return;", "if (filter > layer.filters) return;")
    library = cuda_build.on_cpu(sanitize=True, edits=[edit])
    tests = f"{HERE / 'test_cuda_threshold_pass.py'}::test_layers_longer_than_many_blocks"
    done = run_tests(library, tests, **cuda_build.sanitizer_environment())
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr + done.stdout
    assert "threshold_pass.cu" in done.stderr + done.stdout

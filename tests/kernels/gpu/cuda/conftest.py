"""The CUDA kernels on the CPU: every test here calls them through the operators of ``spafl_kernels.gpu.cuda_ops``.

Environment (set by test_cuda_sanitizers.py and test_cuda_faults.py for the processes that they start):
    SPAFL_TEST_CUDA_LIBRARY     a library to test instead of the one built here
    SPAFL_TEST_CUDA_SCHEDULES   schedule seeds, default "0,1,2"
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("support")))

import cuda_build

from spafl_kernels.gpu import cuda_ops

SCHEDULES = [int(s) for s in os.environ.get("SPAFL_TEST_CUDA_SCHEDULES", "0,1,2").split(",")]


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The kernels compiled for the CPU, loaded into torch; skips where there is no C++ compiler."""
    path = os.environ.get("SPAFL_TEST_CUDA_LIBRARY")
    if not path:
        if not shutil.which("g++"):
            pytest.skip("no g++: the CUDA kernels cannot be run on the CPU")
        path = cuda_build.on_cpu()
    former = cuda_ops._namespace, cuda_ops._reason
    cuda_ops.load(path, cuda_build.NAMESPACE)
    cuda_ops._namespace, cuda_ops._reason = former  # tests elsewhere must not see it: see on_the_cpu
    handle = ctypes.CDLL(str(path))
    handle.emu_launches.restype = ctypes.c_ulonglong
    return handle


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrappers of ``cuda_ops`` call the CPU build during the tests of this folder."""
    monkeypatch.setattr(cuda_ops, "_namespace", cuda_build.NAMESPACE)
    monkeypatch.setattr(cuda_ops, "_reason", None)


@pytest.fixture(params=SCHEDULES, ids=lambda seed: f"schedule{seed}")
def schedule(request: pytest.FixtureRequest, library: ctypes.CDLL) -> ctypes.CDLL:
    """Runs the test once per order of blocks and threads."""
    library.emu_seed(request.param)
    return library


@pytest.fixture
def one_schedule(library: ctypes.CDLL) -> ctypes.CDLL:
    """One shuffled order, for tests whose point is elsewhere."""
    library.emu_seed(SCHEDULES[-1])
    return library

"""Proof that the tests of the kernels can fail: each seeded fault must turn one of them red."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_build
import pytest

HERE = Path(__file__).parent
BARRIER = "  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;\n  __syncthreads();"
DECAY = "    const T decayed = multiply_add(p, weight_decay, g);\n    g = weight_decay != 0 ? decayed : g;\n"
MOMENTUM = "    if (buf) g = *buf = add(multiply(*buf, momentum), g);\n"
TAIL = "if (lane < length - chunks * N)"

# fault: (file of csrc/cuda, text, faulty text), tests that must see it
FAULTS = {
    "a missing barrier": (
        ("numeric.cuh", BARRIER, BARRIER.replace("__syncthreads();", "")),
        ("fused_step", "own_norms"),
    ),
    "a tie kept": (
        ("numeric.cuh", "widen(mean) > widen(tau)", "widen(mean) >= widen(tau)"),
        ("threshold_pass", "tie"),
    ),
    "the tail of a row forgotten": (
        ("threshold_pass.cu", TAIL, TAIL.replace("lane <", "lane + 1 <")),
        ("threshold_pass", "float64_equals and 0.5"),
    ),
    "padding past the last filter forgotten": (
        ("threshold_pass.cu", "if (start + LIST_ROWS >= layer.filters)", "if (start + LIST_ROWS > layer.filters + 64)"),
        ("threshold_pass", "float64_equals and 1.0"),
    ),
    "weight decay after momentum": (
        ("fused_step.cu", DECAY + MOMENTUM, MOMENTUM + DECAY),
        ("fused_step", "three_float64"),
    ),
    "NaN clipped to one": (
        ("fused_step.cu", "factor > 1 ? (T)1 : factor", "factor < 1 ? factor : (T)1"),
        ("fused_step", "nan"),
    ),
    "thresholds left out of the norm": (
        ("fused_step.cu", "if (p.threshold && lane == 0)", "if (false && lane == 0)"),
        ("fused_step", "three_float64"),
    ),
    "padding written back": (
        ("compact_rows.cu", "listed && column < columns", "listed"),
        ("compact_copies", "gather_then"),
    ),
}


# One; another is caught by the test that reads past the end in test_cuda_sanitizers.py.
QUICK = ("NaN clipped to one",)


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++: the CUDA kernels cannot be run on the CPU")
@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FAULTS]
)
def test_a_seeded_fault_is_caught(fault):
    edit, (file, expression) = FAULTS[fault]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"SPAFL_TEST_CUDA_LIBRARY": str(cuda_build.on_cpu(edits=[edit])), "SPAFL_TEST_CUDA_SCHEDULES": "7"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line",
         HERE / f"test_cuda_{file}.py", "-k", expression],
        capture_output=True, text=True, env=environment, cwd=cuda_build.REPOSITORY,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (60, 60)),  # a fault may also loop forever
    )  # fmt: skip
    # 1: a test failed; negative: killed by a signal. 5 would mean that no test was chosen, 2 to 4 that pytest failed.
    assert done.returncode == 1 or done.returncode < 0, done.stdout[-3000:] + done.stderr[-3000:]

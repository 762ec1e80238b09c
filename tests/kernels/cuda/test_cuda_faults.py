"""Proof that the tests of the kernels can fail: each seeded fault must turn one of them red."""

from __future__ import annotations

import json
import os
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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++: the CUDA kernels cannot be run on the CPU")
def test_every_seeded_fault_is_caught(tmp_path):
    jobs = [
        (str(cuda_build.on_cpu(edits=[edit])), str(HERE / f"test_cuda_{file}.py"), expression)
        for edit, (file, expression) in FAULTS.values()
    ]
    answer = tmp_path / "codes.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, HERE / "support" / "run_forked.py", json.dumps(jobs), answer],
        capture_output=True,
        text=True,
        env={**environment, "SPAFL_TEST_CUDA_SCHEDULES": "7"},
        cwd=cuda_build.REPOSITORY,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    codes = dict(zip(FAULTS, json.loads(answer.read_text())))
    # 1: a test failed; negative: killed by a signal. 5 would mean that no test was chosen, 2 to 4 that pytest failed.
    assert not {fault: code for fault, code in codes.items() if code != 1 and code >= 0}

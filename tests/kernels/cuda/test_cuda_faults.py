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
        ("threshold_pass.cu", "widen(score) > widen(tau)", "widen(score) >= widen(tau)"),
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


@pytest.fixture(scope="module")
def exit_codes(tmp_path_factory):
    """pytest's exit code for every fault."""
    if not shutil.which("g++"):
        pytest.skip("no g++: the CUDA kernels cannot be run on the CPU")
    jobs = [
        (str(cuda_build.on_cpu(edits=[edit])), str(HERE / f"test_cuda_{file}.py"), expression)
        for edit, (file, expression) in FAULTS.values()
    ]
    answer = tmp_path_factory.mktemp("faults") / "codes.json"
    done = subprocess.run(
        [sys.executable, HERE / "support" / "run_forked.py", json.dumps(jobs), answer],
        capture_output=True,
        text=True,
        env={**os.environ, "SPAFL_TEST_CUDA_SCHEDULES": "7"},
        cwd=cuda_build.REPOSITORY,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(zip(FAULTS, json.loads(answer.read_text())))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(exit_codes, fault):
    # 1: a test failed; negative: killed by a signal. 5 would mean that no test was chosen, 2 to 4 that pytest failed.
    assert exit_codes[fault] == 1 or exit_codes[fault] < 0, exit_codes[fault]

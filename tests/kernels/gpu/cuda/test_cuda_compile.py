"""nvcc for sm_90a: warnings and spills are errors, the machine code is held to sass_ratchet.json, the library loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_build
import cuda_sass as sass
import pytest
import torch

pytestmark = [
    pytest.mark.compile_only,
    pytest.mark.skipif(
        cuda_build.cuda_home() is None, reason="no nvcc in CUDA_HOME or /usr/local/cuda: nothing is compiled"
    ),
]
RATCHET = json.loads(Path(__file__).with_name("sass_ratchet.json").read_text())
# 128-bit (loads, stores) of the widest loop over a row. A broken one is four narrow ones.
WIDE = {
    "score_kernel": (8, 0),
    "square_sum_kernel": (8, 0),
    "update_kernel": (12, 8),
    "list_kernel": (8, 8),
    "compact_kernel": (8, 8),
}


@pytest.fixture(scope="module")
def measured():
    if sass.tools() is None:
        pytest.skip("no cuobjdump and nvdisasm: they come with Triton, which is not installed")
    return sass.measure()


@pytest.mark.parametrize("kernel", RATCHET["kernels"])
def test_machine_code(measured, kernel):
    now, before = measured["kernels"][kernel], RATCHET["kernels"][kernel]
    assert now["stack"] == 0 and now["local"] == 0 and now["local_accesses"] == 0
    # 65,536 registers of a multiprocessor: 128 keep two blocks of 256 threads on it.
    assert now["reg"] <= 128
    widest = max(now["wide_loops"], key=lambda loop: loop.get("LDG.128", 0))
    assert (widest.get("LDG.128", 0), widest.get("STG.128", 0)) == WIDE[kernel.split("<")[0]]
    for loop in now["wide_loops"]:
        assert not loop.get("LDG") and not loop.get("STG"), "a wide loop has narrow accesses too"
    if measured["nvcc"] != RATCHET["nvcc"]:
        return  # other compilers may count a little differently
    assert now["reg"] <= before["reg"]
    assert len(now["wide_loops"]) == len(before["wide_loops"])
    for loop, old in zip(now["wide_loops"], before["wide_loops"]):
        assert loop["all"] <= 1.1 * old["all"]


def test_the_ratchet_names_every_kernel(measured):
    assert set(measured["kernels"]) == set(RATCHET["kernels"])


def test_a_spill_fails_the_build(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text("""
__global__ void __launch_bounds__(1024, 2) kernel(float* x) {  // 32 registers a thread, 64 values alive
  float a[64];
#pragma unroll
  for (int j = 0; j < 64; j++) a[j] = x[j];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 64; j++) x[63 - j] = a[j] * a[j * 7 % 64];
}
""")
    with pytest.raises(RuntimeError, match="Registers are spilled to local memory"):
        cuda_build.compile_cuda(source, tmp_path / "spill.cubin", "-cubin")


# Stands for the library of a CUDA torch, which `import torch` loads out of the global scope.
STREAM = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }'
LOAD = """
import ctypes, sys, torch
from spafl_kernels.gpu import cuda_ops
if sys.argv[2:]:
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_LOCAL)
try:
    cuda_ops.load(sys.argv[1])
except RuntimeError as error:
    print("load:", error)
    cuda_ops._reason = str(error)
print(cuda_ops.available(), cuda_ops.why_not())
for name in cuda_ops.NAMES:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"spafl::{name}", "CUDA"), name
weights, thresholds = [torch.ones(1, 2, 3)], [torch.zeros(1, 2)]
state = cuda_ops.mask_state(weights)
try:
    cuda_ops.threshold_pass(weights, thresholds, state)
except (NotImplementedError, RuntimeError) as error:
    print("refused:", str(error).splitlines()[0])
"""


def test_the_extension_loads_in_a_torch_with_cuda_and_says_what_a_torch_without_lacks(tmp_path):
    library = cuda_build.extension(tmp_path)
    (tmp_path / "stream.cpp").write_text(STREAM)
    stub = tmp_path / "libtorch_cuda.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "stream.cpp"), "-o", str(stub)], check=True)

    def load(*libraries: Path) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", LOAD, *map(str, libraries)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{cuda_build.REPOSITORY}:{cuda_build.REPOSITORY / 'python'}"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    with_cuda = load(library, stub)
    assert with_cuda[0] == "True None"
    assert with_cuda[1].startswith(
        "refused: Could not run 'spafl::threshold_pass_cuda' with arguments from the 'CPU' backend"
    )
    if torch.version.cuda is None:
        why = (
            "no library in this process defines aoti_torch_get_current_cuda_stream, by which the CUDA kernels find "
            "their stream: this torch was built without CUDA"
        )
        call = f"refused: threshold_pass_cuda: the CUDA operators are not available: {why}"
        assert load(library) == [f"load: {why}", f"False {why}", call]

"""Stage: the tests that need a GPU, in parallel, without those that compile for long."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

from .device import Visit
from .runner import ROOT

FILES = ("tests/kernels/cuda/test_cuda_on_device.py", "tests/kernels/triton/test_gpu.py")
# inductor compiles, compute-sanitizer has a stage of its own, and so has the benchmark.
LEFT_OUT = "not inductor"


def run(visit: Visit) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "--no-header", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and not visit.rehearsal:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    command += ["--collect-only"] if visit.rehearsal else ["-m", "gpu", "-k", LEFT_OUT]
    done = subprocess.Popen([*command, *FILES], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.stdout is not None
    last = ""
    for line in done.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
        if line.startswith(("FAILED", "ERROR")):
            visit.wrong(line.strip()[:300])
    code = done.wait()
    visit.add("tests", code=code, result=re.sub(r"=+", "", last).strip())
    if code not in (0, 5) and not visit.red:
        visit.wrong(f"pytest ended with {code}: {last}")

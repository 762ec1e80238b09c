"""Stage: the tests that need a GPU, in parallel, without those that compile for long."""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import subprocess
import sys

from .device import Visit
from .runner import ROOT

FILES = (
    "tests/kernels/gpu/cuda/test_cuda_on_device.py",
    "tests/kernels/gpu/test_captured_gpu.py",
    "tests/kernels/gpu/test_gpu.py",
)
# inductor compiles, compute-sanitizer has a stage of its own, and so has the benchmark.
LEFT_OUT = "not inductor"
RESULT = re.compile(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b")


def run(visit: Visit) -> None:
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "--no-header", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and not visit.rehearsal:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    command += ["--collect-only"] if visit.rehearsal else ["-m", "gpu", "-k", LEFT_OUT]
    done = subprocess.Popen([*command, *FILES], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.stdout is not None
    last, ended = "", collections.Counter[str]()
    for line in done.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
        if line.startswith(("FAILED", "ERROR")):  # of the list at the end
            visit.wrong(line.strip()[:300])
        elif found := RESULT.search(line):
            ended[found[1]] += 1
            if ended.total() % 10 == 0:  # a stage that is killed has said how far it came
                visit.folder.add(visit.stage, "progress", **ended)
    code = done.wait()
    visit.add("tests", code=code, result=re.sub(r"=+", "", last).strip())
    if code not in (0, 5) and not visit.red:
        visit.wrong(f"pytest ended with {code}: {last}")

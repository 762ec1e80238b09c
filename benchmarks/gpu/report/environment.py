"""Stage: what is installed, whether the extension works, what the device reaches, and what a launch costs the host."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from spafl_kernels import env

from .. import toolkit
from ..clock import Device, tf32
from .device import Visit, median_us

# One CUDA C++ operator, in a process of its own: a jump to nowhere must not end the stage.
OPERATOR = """
import torch
from spafl_kernels.gpu import cuda_ops
if not cuda_ops.available():
    raise SystemExit(cuda_ops.why_not())
w, t = [torch.randn(2, 64, 32, 3, 3, device="cuda")], [torch.full((2, 64), .8, device="cuda")]
state = cuda_ops.mask_state(w, pad_to=8)
cuda_ops.threshold_pass(w, t, state, compare=False)
want = w[0].double().flatten(2).abs().mean(2) > .8
assert torch.equal(state.mask, want), "the mask is not that of the definition"
print("right")
"""


def run(visit: Visit) -> None:
    facts = env.report()
    facts.pop("platform")
    visit.add("environment", kernel=platform.release(), **facts)
    device = visit.device()
    visit.add("device", name=device.name, **_driver())
    _extension(visit)
    _caches(visit)
    _ceilings(visit, device)
    _launches(visit, device)


def _driver() -> dict[str, Any]:
    """What nvidia-smi says; nothing without it."""
    asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit"
    if not torch.cuda.is_available():
        return {}
    p = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count, "memory": p.total_memory,
        "l2": p.L2_cache_size, "shared_per_block": p.shared_memory_per_block_optin,
    }  # fmt: skip
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        facts.update(zip(asked.split(","), (part.strip() for part in done.stdout.splitlines()[0].split(",")))
                     if done.returncode == 0 and done.stdout else ())  # fmt: skip
    return facts


def _extension(visit: Visit) -> None:
    """The extension as it is; where it does not work, built here, which takes a while."""
    if visit.rehearsal:
        return
    problem = _operator()
    visit.add("extension", works=problem is None, problem=problem)
    if problem is None:
        return
    began = time.monotonic()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, visit.left() - 5))
        if done.returncode:
            visit.wrong(f"the extension could not be built: {done.stderr.strip()[-500:]}")
            return
    except subprocess.TimeoutExpired:
        visit.wrong("there was no time to build the extension")
        return
    problem = _operator()
    visit.add("extension", works=problem is None, problem=problem, built_in=round(time.monotonic() - began, 1))
    if problem is not None:
        visit.wrong(f"a CUDA operator does not work: {problem}")


def _operator() -> str | None:
    """What is wrong with a CUDA C++ operator, None if nothing is."""
    try:
        done = subprocess.run([sys.executable, "-c", OPERATOR], capture_output=True, text=True, timeout=25)
    except subprocess.TimeoutExpired:
        return "it did not return within 25 s"
    if done.returncode == 0 and done.stdout.strip().endswith("right"):
        return None
    lines = (done.stderr or done.stdout or "").strip().splitlines()
    return f"exit code {done.returncode}: {lines[-1] if lines else 'no message'}"


def _caches(visit: Visit) -> None:
    """What decides whether a kernel is found in Triton's cache, and which assemblers there are."""
    if importlib.util.find_spec("triton") is None:
        visit.wrong("triton is not installed")
        return
    import triton
    from triton import knobs
    from triton.runtime.cache import triton_key

    found = {"triton": triton.__version__, "key": triton_key()[-64:], "cache": bool(os.environ.get("TRITON_CACHE_DIR"))}
    if not visit.rehearsal:
        found["ptxas"] = getattr(knobs.nvidia.ptxas, "version", None)
        if (ptxas := toolkit.program("ptxas")) is not None:
            done = subprocess.run([ptxas, "--version"], capture_output=True, text=True)
            found["toolkit_ptxas"] = done.stdout.strip().splitlines()[-1] if done.stdout else None
    visit.add("triton", **found)


def _ceilings(visit: Visit, device: Device) -> None:
    """What large copies and products reach: floors in other rows use constants, these say how far off they are."""
    visit.add("ceiling", what="copy", **_copy(device, visit.rehearsal))
    size = 64 if visit.rehearsal else 8192
    for name, kind, allowed in (("bf16", torch.bfloat16, True), ("tf32", torch.float32, True),
                                ("fp32", torch.float32, False)):  # fmt: skip
        a, b = (torch.randn(size, size, device=device.where).to(kind) for _ in range(2))
        with tf32(allowed):
            us = median_us(device, lambda a=a, b=b: a @ b)  # type: ignore[misc]
        visit.add("ceiling", what=f"product {name}", us=us, tflop_per_s=2 * size**3 / us / 1e6)


def _copy(device: Device, rehearsal: bool) -> dict[str, float]:
    """A copy far larger than the L2 cache; bytes read and written."""
    x = torch.zeros(1 << (12 if rehearsal else 30), dtype=torch.float32, device=device.where)
    y = torch.ones_like(x)
    us = median_us(device, lambda: y.copy_(x))
    return {"us": us, "tb_per_s": 2 * x.numel() * x.element_size() / us / 1e6}


def _launches(visit: Visit, device: Device) -> None:
    """Microseconds that the host spends on a launch of PyTorch's, and on a layer as a user calls it."""
    x = torch.zeros(64, device=device.where)
    count = 3 if visit.rehearsal else 300

    def host(call: Any) -> float:
        best = float("inf")
        for _ in range(3):
            device.settle()
            began = time.perf_counter()
            for _ in range(count):
                call()
            best = min(best, 1e6 * (time.perf_counter() - began) / count)
        device.settle()
        return best

    visit.add(
        "launch",
        what="torch add_",
        host_us=host(lambda: x.add_(1)),
        device_us=median_us(device, lambda: x.add_(1), True),
    )
    for name, both, forward in layer_calls(device.where):
        both()
        visit.add("launch", what=f"{name} forward and backward", host_us=host(both))
        visit.add("launch", what=f"{name} forward", host_us=host(forward))


def layer_calls(where: str) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Name, forward with backward, and forward of two small layers, as a user calls them."""
    import spafl_kernels

    found = []
    for layer, shape in ((spafl_kernels.ThresholdLinear(64, 64), (8, 64)),
                         (spafl_kernels.ThresholdConv2d(16, 16, 3), (2, 16, 8, 8))):  # fmt: skip
        layer = layer.to(where)
        data = torch.randn(*shape, device=where, requires_grad=True)

        def both(layer: Any = layer, data: torch.Tensor = data) -> None:
            layer(data).sum().backward()

        @torch.no_grad()
        def forward(layer: Any = layer, data: torch.Tensor = data) -> None:
            layer(data)

        found.append((type(layer).__name__, both, forward))
    return found

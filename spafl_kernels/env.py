"""What this installation can run, and why not the rest: ``python -m spafl_kernels.env [--json]``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import Any

import torch

from . import backend, native, settings
from .gpu import choice, cuda_ops
from .gpu.tables import Shelf, choices, engines, tiles

_PACKAGES = ("torch", "triton", "numpy", "onnx", "onnxruntime")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_backend() -> tuple[bool, str | None]:
    try:
        return native.available(), native.why_not()
    except (RuntimeError, ValueError) as error:
        return False, str(error)


def _cuda_backend(cpp: bool) -> tuple[bool, str | None]:
    if not cpp:
        return False, "it is part of the C++ extension"
    if not native.build_info().get("cuda"):
        reason = native.build_record().get("cuda_reason")
        return False, f"the extension was built without CUDA{': ' + reason if reason else ''}"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return False, "torch sees no CUDA device" if built else "this torch is a CPU build"
    return cuda_ops.available(), cuda_ops.why_not()


def _triton_backend() -> tuple[bool, str | None]:
    if importlib.util.find_spec("triton") is None:
        return False, "the triton package is not installed"
    if not torch.cuda.is_available():
        return False, "torch sees no GPU"
    if torch.version.hip is not None:
        return False, "the kernels are written for CUDA, this is a ROCm build of PyTorch"
    found = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if found < choice.LOWEST_CAPABILITY:
        return False, f"the kernels need compute capability 8.0 or newer; the best GPU here has {found[0]}.{found[1]}"
    return True, None


def _launches() -> str:
    """How Triton kernels are launched."""
    if importlib.util.find_spec("triton") is None:
        return "not at all: the triton package is not installed"
    from .gpu.triton import launch

    problem = launch.why_not()
    return "remembered" if problem is None else f"every one through Triton's own launcher, which is slow: {problem}"


def _measured(gpu: str, shelf: Shelf[Any]) -> str | None:
    """Where a table of a GPU comes from, None without one, or what is wrong with it."""
    try:
        table = shelf.best_for(gpu)
    except ValueError as error:
        return f"not usable: {error}"
    if table is None:
        return None
    whose = "" if table.device == gpu else f"{table.device}: "
    return f"{whose}commit {table.made.get('commit', 'unknown')}, {table.made.get('time', '?')}"


def report() -> dict[str, Any]:
    """Versions, devices and backends; every value can be written as JSON.

    Returns:
        ``python``, ``platform``, ``packages`` (name -> version or None), ``cpu`` (cores, threads, torch's capability,
        the instruction set of the compiled kernels and those it can run), ``gpus`` (names), ``measured``, ``tiles`` and
        ``engines`` (by GPU, where its tables come from), ``request`` and ``strict`` (what ``SPAFL_BACKEND`` and
        ``SPAFL_STRICT`` ask for), ``launches`` (of Triton kernels, in words), ``extension`` (how it was built),
        ``backends`` (name -> whether it is available, and why not).
    """
    cpp, cpp_reason = _cpu_backend()
    backends = {
        "torch": (True, None),
        "cpp": (cpp, cpp_reason),
        "cuda": _cuda_backend(cpp),
        "triton": _triton_backend(),
    }
    extension = native.build_info()
    if extension and (kept := native.build_record().get("kept")):
        extension["kept"] = kept
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "kernels": native.cpu_isa() if cpp else None,
            "kernels_possible": list(native.cpu_isas()) if cpp else [],
        },
        "gpus": gpus,
        "measured": {gpu: _measured(gpu, choices.SHELF) for gpu in gpus},
        "tiles": {gpu: _measured(gpu, tiles.SHELF) for gpu in gpus},
        "engines": {gpu: _measured(gpu, engines.SHELF) for gpu in gpus},
        "request": backend.REQUESTED,
        "strict": settings.strict(),
        "launches": _launches(),
        "extension": extension,
        "backends": {name: {"available": ok, "reason": reason} for name, (ok, reason) in backends.items()},
    }


def _text(data: dict[str, Any]) -> str:
    cpu = data["cpu"]
    lines = [f"python      {data['python']}, {data['platform']}"]
    lines += [f"{name:<11} {version or 'not installed'}" for name, version in data["packages"].items()]
    lines.append(
        f"cpu         {cpu['cores']} cores, {cpu['torch_threads']} torch threads, torch uses {cpu['torch_capability']}"
        + (f", kernels use {cpu['kernels']} (of {', '.join(cpu['kernels_possible'])})" if cpu["kernels"] else "")
    )
    lines.append(f"gpus        {', '.join(data['gpus']) or 'none'}")
    for gpu, origin in data["measured"].items():
        lines.append(f"choice      {gpu}: {origin or 'no times were measured; layers take the Triton kernels'}")
        lines.append(f"tiles       {gpu}: {data['tiles'][gpu] or 'not measured; the kernels choose them by rule'}")
        lines.append(f"simulator   {gpu}: {data['engines'][gpu] or 'not measured; device = auto takes the CPU'}")
    lines.append(f"layers      SPAFL_BACKEND={data['request']}, SPAFL_STRICT={'1' if data['strict'] else '0'}")
    lines.append(f"launches    of Triton kernels: {data['launches']}")
    build = data["extension"]
    if build:
        archs = build.get("cuda") or "none"
        lines.append(f"extension   built with torch {build.get('torch')}, CUDA architectures: {archs}")
        if "kept" in build:
            lines.append(f"            of an earlier build, kept: {build['kept']}")
    lines.append("backends")
    lines += [
        f"  {name:<9} {'yes' if state['available'] else 'no: ' + str(state['reason'])}"
        for name, state in data["backends"].items()
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m spafl_kernels.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    data = report()
    print(json.dumps(data, indent=2) if options.json else _text(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())

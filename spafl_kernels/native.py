"""Loads the compiled extension, or says why there is none. Nothing in this package needs it to import.

``SPAFL_NATIVE=0`` leaves the extension unloaded, ``1`` makes its absence an error, ``auto`` (default) uses it if there.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

from . import settings

# Number of the operator interface; raised whenever a schema in csrc/bindings.cpp changes.
SCHEMA = 6

_HERE = Path(__file__).parent
_ISA = ("scalar", "avx2", "avx512")


def _library() -> Path | None:
    found = sorted(_HERE.glob("_C*.so"))
    return found[0] if found else None


def _read_build(path: Path) -> dict[str, Any]:
    """What the library was built for, from its bytes: this works for a library that cannot be loaded."""
    match = re.search(rb"SPAFL_BUILD(\{.*?\})\0", path.read_bytes())
    return json.loads(match.group(1)) if match else {}


def build_record() -> dict[str, Any]:
    """What the last build decided: ``cpp``, ``cpp_reason``, ``cuda``, ``cuda_reason``; empty if there was none.

    ``kept``, where it is there, says why the library is that of an earlier build. A library that is here decides over a
    record that contradicts it (it came from elsewhere): its own facts are given then, without reasons.
    """
    file, path = _HERE / "_build.json", _library()
    record = json.loads(file.read_text()) if file.exists() else {}
    if path is None:
        return record
    cuda = bool(_read_build(path).get("cuda"))
    if record.get("cpp") and bool(record.get("cuda")) == cuda:
        return record
    return {"cpp": True, "cpp_reason": None, "cuda": cuda, "cuda_reason": None}


def _reason_not_built() -> str:
    record = build_record()
    reason = record.get("cpp_reason") or record.get("kept")
    if reason:
        return f"the C++ extension was not built: {reason}"
    command = "run `pip install -e . --no-build-isolation`"
    if record.get("cpp"):
        return f"the C++ extension was built, but its library spafl_kernels/_C*.so is gone: {command}"
    return f"the C++ extension was not built: {command}"


@functools.cache
def _load() -> tuple[bool, str | None]:
    wanted = settings.switch_or_auto("SPAFL_NATIVE")
    if wanted is False:
        return False, "SPAFL_NATIVE=0"
    reason = _try_load()
    if reason and wanted:
        raise RuntimeError(f"SPAFL_NATIVE=1, but {reason}")
    return reason is None, reason


def _try_load() -> str | None:
    path = _library()
    if path is None:
        return _reason_not_built()
    build = _read_build(path)
    if build.get("schema") != SCHEMA:
        return (
            f"{path.name} has operator interface {build.get('schema')} and this package needs {SCHEMA}: "
            "rebuild it with `pip install -e . --no-build-isolation`"
        )
    try:
        torch.ops.load_library(str(path))
        # Throws here, not in the middle of training, if SPAFL_CPU_ISA asks for what this machine cannot run.
        torch.ops.spafl.cpu_isa()
    except OSError as error:
        return (
            f"{path.name} was built with torch {build.get('torch')} for torch >= {build.get('torch_target')} and "
            f"torch {torch.__version__} cannot load it: {error}"
        )
    return None


def available() -> bool:
    """True if the compiled operators ``torch.ops.spafl.*`` can be used.

    Raises:
        ValueError: ``SPAFL_NATIVE`` is neither auto, on nor off.
        RuntimeError: ``SPAFL_NATIVE=1`` and there is no extension; or ``SPAFL_CPU_ISA`` is unknown or names an
            instruction set that this machine or build cannot run.
    """
    return _load()[0]


def why_not() -> str | None:
    """Why :func:`available` is false, in one line; None if it is true."""
    return _load()[1]


def cpu_isa() -> str | None:
    """Instruction set of the CPU kernels: ``scalar``, ``avx2`` or ``avx512``; None without the extension."""
    return _ISA[torch.ops.spafl.cpu_isa() // 16] if available() else None


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run; empty without the extension."""
    if not available():
        return ()
    bits = torch.ops.spafl.cpu_isa()
    return tuple(name for i, name in enumerate(_ISA) if bits >> i & 1)


def build_info() -> dict[str, Any]:
    """How the library was built: ``torch``, ``torch_target``, ``schema``, ``cuda`` (architectures; "" without CUDA).

    Empty without a library. Does not load it.
    """
    path = _library()
    return _read_build(path) if path else {}

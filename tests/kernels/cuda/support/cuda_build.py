"""Builds the CUDA sources two ways: with g++ over cpu_shim.h, to run them, and with nvcc for sm_90a, to look at the machine code."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

REPOSITORY = Path(__file__).resolve().parents[4]
SOURCES = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
SHIM = Path(__file__).with_name("cpu_shim.h")
NAMESPACE = "spafl_on_cpu"

# AddressSanitizer must be the first library of the process, and the fibers of the shim are stacks it did not make.
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered", "-Wno-maybe-uninitialized")
NVCC_FLAGS = (
    *("-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a"),
    *("-Xptxas", "-warn-spills,-warn-lmem-usage", "--Werror", "all-warnings"),
)


def sanitizer_environment() -> dict[str, str]:
    """What a process needs to load a sanitised library."""
    runtimes = [
        subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def on_cpu(sanitize: bool = False, flags: tuple[str, ...] = (), sources: tuple[Path, ...] | None = None) -> Path:
    """The library of all kernels and bindings, compiled for the CPU; kept in ``build/`` under the hash of what it was made from.

    Args:
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.
        flags: further compiler flags (seeded faults).
        sources: other CUDA sources, without the bindings.
    """
    cuda = sources or SOURCES
    bindings = [] if sources else [REPOSITORY / "csrc" / "cuda_bindings.cpp"]
    headers = [SHIM, *sorted((REPOSITORY / "csrc" / "cuda").glob("*.*h"))]
    options = ["-std=c++20", "-O1", "-g", "-fPIC", *WARNINGS, *(SANITIZE if sanitize else ()), *flags]
    key = hashlib.sha256(" ".join([torch.__version__, *options]).encode())
    for source in (*cuda, *bindings, *headers):
        key.update(source.read_bytes())
    folder = REPOSITORY / "build" / "cuda_on_cpu"
    library = folder / f"{key.hexdigest()[:20]}.so"
    if library.exists():
        return library
    work = folder / f"{library.stem}.{os.getpid()}"
    work.mkdir(parents=True)
    objects = []
    for source in (*cuda, *bindings):
        target = work / f"{source.stem}.o"
        if source.suffix == ".cu":
            language = ["-x", "c++", f"-I{REPOSITORY / 'csrc' / 'cuda'}", "-include", str(SHIM)]
        else:
            language = [f"-I{REPOSITORY / 'csrc'}", "-DSPAFL_CUDA_ON_CPU", f"-DSPAFL_NAMESPACE={NAMESPACE}"]
            language += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
            language += [word for path in include_paths() for word in ("-isystem", path)]
        _run(["g++", *options, *language, "-c", str(source), "-o", str(target)])
        objects.append(str(target))
    torch_libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-ltorch", "-lc10"]
    _run(["g++", "-shared", *options, *objects, *torch_libraries, "-o", str(work / "library.so")])
    os.replace(work / "library.so", library)
    shutil.rmtree(work)
    return library


def find_nvcc() -> str | None:
    """The CUDA compiler, or None."""
    candidate = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return str(candidate) if candidate.exists() else shutil.which("nvcc")


def cubin(source: Path, folder: Path) -> Path:
    """One source compiled for sm_90a; warnings, spills and local memory are errors."""
    nvcc = find_nvcc()
    assert nvcc
    target = folder / f"{source.stem}.cubin"
    _run([nvcc, "-cubin", *NVCC_FLAGS, f"-I{REPOSITORY / 'csrc' / 'cuda'}", str(source), "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

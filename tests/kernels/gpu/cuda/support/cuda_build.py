"""Builds the CUDA sources with g++ over cpu_shim.h, to run them, and with nvcc for sm_90a, to read the machine code."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

REPOSITORY = Path(__file__).resolve().parents[5]
SOURCES = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
SHIM = Path(__file__).with_name("cpu_shim.h")
BINDINGS = REPOSITORY / "csrc" / "cuda_bindings.cpp"
NAMESPACE = "spafl_on_cpu"
TORCH_TARGET_VERSION = "0x020b000000000000"  # torch 2.11: the oldest torch that the library loads in
Edits = Sequence[tuple[str, str, str]]

# AddressSanitizer must be the first library of the process, and the fibers of the shim are stacks it did not make.
SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered", "-Wno-maybe-uninitialized")
NVCC_FLAGS = (
    *("-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a"),
    *("-Xptxas", "-warn-spills,-warn-lmem-usage", "--Werror", "all-warnings"),
)


def sanitizer_environment() -> dict[str, str]:
    """What a process needs to load a sanitised library."""
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Test processes that run side by side build a thing once: the second waits, and finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def on_cpu(sanitize: bool = False, edits: Edits = ()) -> Path:
    """The kernels and bindings compiled for the CPU; kept in ``build/`` under the hash of what they are made of.

    Args:
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.
        edits: seeded faults, ``(file name in csrc/cuda, old text, new text)``; the old text must be there once.
    """
    with _only_one(REPOSITORY / "build" / "cuda_on_cpu"):
        return _on_cpu(sanitize, edits)


def _on_cpu(sanitize: bool, edits: Edits) -> Path:
    cuda = REPOSITORY / "csrc" / "cuda"
    texts = {path.name: path.read_text() for path in sorted(cuda.iterdir())}
    for name, old, new in edits:
        if texts[name].count(old) != 1:
            raise ValueError(f"{name} must hold this text exactly once: {old!r}")
        texts[name] = texts[name].replace(old, new)
    options = ["-std=c++20", "-O1", "-fPIC", *WARNINGS]
    checks = SANITIZE if sanitize else ()
    headers = [text for name, text in texts.items() if not name.endswith(".cu")]
    folder = REPOSITORY / "build" / "cuda_on_cpu"
    work = folder / f"work.{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name, text in texts.items():
        (work / name).write_text(text)
    shim = [*checks, f"-I{work}", "-x", "c++", "-include", str(SHIM)]
    torch_headers = [word for path in include_paths() for word in ("-isystem", path)]
    bindings = [f"-I{REPOSITORY / 'csrc'}", "-DSPAFL_CUDA_ON_CPU", f"-DSPAFL_NAMESPACE={NAMESPACE}", *torch_headers]
    bindings += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    jobs = [
        (name, [*shim, str(work / name)], [SHIM.read_text(), text, *headers, *checks])
        for name, text in texts.items()
        if name.endswith(".cu")
    ]
    interface = [torch.__version__, BINDINGS.read_text(), texts["kernels.h"]]
    jobs.append(("cuda_bindings.cpp", [*bindings, str(BINDINGS)], interface))
    objects = []
    for name, arguments, inputs in jobs:
        target = folder / f"{name}.{_hash(*options, *inputs)}.o"
        if not target.exists():
            # -fdebug-prefix-map: sanitizers name the source, not the working copy.
            rename = f"-fdebug-prefix-map={work}={cuda}"
            _run(["g++", *options, rename, *arguments, "-c", "-o", str(work / "object.o")])
            os.replace(work / "object.o", target)
        objects.append(str(target))
    library = folder / f"{_hash(*objects)}.so"
    if not library.exists():
        libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-ltorch", "-lc10"]
        _run(["g++", "-shared", *options, *checks, *objects, *libraries, "-o", str(work / "library.so")])
        os.replace(work / "library.so", library)
    shutil.rmtree(work)
    return library


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def cuda_home() -> Path | None:
    """The folder of the CUDA toolkit, or None."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return home if (home / "bin" / "nvcc").exists() else None


def find_nvcc() -> Path | None:
    """The CUDA compiler, or None."""
    return cuda_home() and cuda_home() / "bin" / "nvcc"


def compile_cuda(source: Path, target: Path, *options: str) -> None:
    """One source compiled by nvcc for sm_90a; warnings, spills and local memory are errors."""
    _run([str(find_nvcc()), *NVCC_FLAGS, *options, str(source), "-o", str(target)])


def cuda_object(source: Path) -> Path:
    """The object file of one source, as the extension links it; kept in ``build/`` under the hash of its inputs."""
    headers = [path.read_text() for path in sorted(source.parent.glob("*.*h"))]
    version = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    folder = REPOSITORY / "build" / "cuda_objects"
    target = folder / f"{source.stem}.{_hash(version, *NVCC_FLAGS, source.read_text(), *headers)}.o"
    with _only_one(folder):
        if not target.exists():
            work = folder / f"{source.stem}.work.o"
            compile_cuda(source, work, "-c", "-Xcompiler", "-fPIC")
            os.replace(work, target)
    return target


def extension(folder: Path) -> Path:
    """The real library: nvcc's objects and the bindings, for a CUDA or a CPU-only torch."""
    home = Path(os.path.realpath(cuda_home()))
    objects = [str(cuda_object(source)) for source in SOURCES]
    options = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Werror", "-DUSE_CUDA", f"-I{REPOSITORY / 'csrc'}"]
    options += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-I{home / 'include'}"]
    options += [word for path in include_paths() for word in ("-isystem", path)]
    library = folder / "_C.abi3.so"
    libraries = [f"-L{path}" for path in [*library_paths(), home / "lib64"]]
    libraries += ["-ltorch_cpu", "-ltorch", "-lc10", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    _run(["g++", "-shared", *options, str(BINDINGS), *objects, *libraries, "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

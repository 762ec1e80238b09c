"""Triton's stubs, compiled ahead: one extension module in C per list of argument types, and one for its driver.

Triton builds them with a C compiler when a kernel is first launched. They hold no device code, and belong to one
Python version. They call the CUDA driver, to which they are linked by name: a library without contents will do here.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import re
import subprocess
import sysconfig
import tempfile
from typing import Any

from triton.backends.nvidia import driver
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import build
from triton.runtime.cache import get_cache_manager

DRIVER = "libcuda.so.1"


class _Module:
    """In the place of a stub, which could not be loaded without a driver."""

    def __getattr__(self, name: str) -> None:
        return None


def empty_driver(folder: pathlib.Path) -> None:
    """A library with every name of the CUDA driver, none of which does anything.

    Raises:
        OSError, subprocess.CalledProcessError: there is no working C compiler.
    """
    header = pathlib.Path(driver.include_dirs[0], "cuda.h").read_text()
    source = folder / "driver.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in sorted(set(re.findall(r"\bcu[A-Z]\w*", header)))))
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", str(source)]
    subprocess.run([*command, "-o", str(folder / DRIVER)], check=True, capture_output=True, text=True)


def _into_the_cache(folder: str, src: str, name: str, include_dirs: list[str], **_: Any) -> _Module:
    """Triton's ``compile_module_from_src``, but that nothing is loaded."""
    cache = get_cache_manager(hashlib.sha256((src + build.platform_key()).encode()).hexdigest())
    target = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if cache.get_file(target) is None:
        with tempfile.TemporaryDirectory() as work:
            path = pathlib.Path(work, f"{name}.c")
            path.write_text(src)
            built = build._build(name, str(path), work, [folder], include_dirs, [DRIVER], [])
            cache.put(pathlib.Path(built).read_bytes(), target)
    return _Module()


@functools.cache
def begin(folder: pathlib.Path) -> None:
    """From now on this process compiles stubs instead of loading them, and can launch nothing; that of Triton's driver
    is compiled at once. ``folder`` holds the :func:`empty_driver`.

    Raises:
        OSError, subprocess.CalledProcessError: the C compiler does not find Python's headers.
    """
    stand_ins = {
        "compile_module_from_src": functools.partial(_into_the_cache, str(folder)),
        "library_dirs": lambda: [str(folder)],
    }
    for name, stand_in in stand_ins.items():
        setattr(driver, name, stand_in)
    driver.CudaUtils()


def compile_for(source: ASTSource, kernel: CompiledKernel) -> None:
    """The stub that launches a kernel; :func:`begin` comes first."""
    driver.CudaLauncher(source, kernel.metadata)

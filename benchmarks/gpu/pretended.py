"""A GPU that is not there, for the host's work alone: everything up to the driver runs as it does on a GPU.

Real: layers, checks, choice of backend, operators, autograd, launchers, Triton's own driver, its compiled kernels for
compute capability 9.0, and its C launchers, argument by argument.

Pretended, and nothing else:

* ``libcuda.so.1`` is a stand-in whose functions succeed and do nothing. A real ``cuLaunchKernelEx`` costs a few
  microseconds more, and so do memory from CUDA's allocator and the exchange of devices.
* Tensors lie in CPU memory. The operators' functions for CUDA are registered for the CPU as well, and layers take them.
  Backward passes run in the calling thread, where PyTorch hands those of CUDA tensors to a thread of the device.
* There are one device, number 0, and one stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from unittest import mock

import torch

_SOURCE = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>
static long launches;
static int count, sizes[64];
static unsigned char last[40 + 64 * 8];
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  /* shared memory of a block and of a multiprocessor, multiprocessors, lanes; the rest is read by nobody */
  *value = attribute == 97 ? 232448 : attribute == 81 ? 233472 : attribute == 16 ? 132 : attribute == 10 ? 32 : 65536;
  return 0;
}
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  static intptr_t number;
  *function = (void *)++number;
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no error"; return 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { *(uint64_t *)value = pointer; return 0; }
int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  ++launches;
  if (count > 0) {
    memset(last, 0, sizeof last);
    memcpy(last, &function, 8);
    memcpy(last + 8, config, 28); /* grid, block, dynamic shared memory */
    for (int i = 0; i < count; ++i) memcpy(last + 40 + 8 * i, parameters[i], sizes[i]);
  }
  return 0;
}
long spafl_launches(void) { return launches; }
void spafl_record(int parameters, const int *bytes) {
  count = parameters;
  memcpy(sizes, bytes, parameters * sizeof(int));
}
const unsigned char *spafl_last(void) { return last; }
"""


@functools.cache
def _library() -> ctypes.CDLL:
    """The stand-in, compiled and loaded for the rest of the process: a C library cannot be unloaded for sure."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="spafl-no-cuda-"))
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text(_SOURCE)
    named = ["-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", *named, str(source)], check=True)
    # Triton links its launchers with it and opens it by name.
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def launches() -> int:
    """Kernels that were launched in this process on the stand-in."""
    return int(_library().spafl_launches())


def record(sizes: Sequence[int]) -> None:
    """Keep what reaches the driver from now on: of kernels with parameters of these sizes in bytes, at most 64 of 8.

    No size: nothing is kept any more. A kernel with fewer parameters may not be launched in between.
    """
    _library().spafl_record(len(sizes), (ctypes.c_int * len(sizes))(*sizes))


def last(parameters: int) -> bytes:
    """The kernel, its grid, block and shared memory, and the values of its parameters, of the last launch."""
    found = _library().spafl_last
    found.restype = ctypes.c_void_p
    return ctypes.string_at(found(), 40 + 8 * parameters)


@functools.cache
def _driver() -> object:
    """Triton's driver of NVIDIA GPUs on the stand-in: one device of compute capability 9.0, one stream."""
    _library()
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device: (9, 0)
    return driver


@contextlib.contextmanager
def device() -> Iterator[None]:
    """Layers on CPU tensors run as on a GPU while the context is open; their results are memory that nobody wrote.

    Raises:
        RuntimeError: Triton has a real driver, or runs its interpreter.
    """
    import triton

    from spafl_kernels.gpu import choice, operators

    if torch.cuda.is_available() or triton.knobs.runtime.interpret:
        raise RuntimeError("a GPU is pretended only where there is none, and where Triton compiles kernels")
    previous = getattr(triton.runtime.driver, "_active", None)
    triton.runtime.driver.set_active(_driver())
    try:
        with operators.kernels_of_cuda_on_the_cpu(), mock.patch.object(choice, "on_gpu", lambda tensor: True):
            yield
    finally:
        triton.runtime.driver._active = previous

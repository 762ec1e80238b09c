"""csrc/loaded_symbol.h: a function of a library that was loaded out of the global scope, as torch loads its own."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import cuda_build
import pytest

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")

PROVIDER = """
extern "C" int spafl_test_provided() { return 42; }
"""
USER = """
#include "loaded_symbol.h"
extern "C" int spafl_test_provided() __attribute__((weak));
extern "C" void* weak() { return (void*)spafl_test_provided; }
extern "C" int call() { return reinterpret_cast<int (*)()>(loaded_symbol("spafl_test_provided"))(); }
extern "C" void* look_up(const char* name) { return loaded_symbol(name); }
"""


def compiled(folder, name, source):
    path = folder / f"{name}.cpp"
    path.write_text(source)
    target = folder / f"lib{name}.so"
    include = f"-I{cuda_build.REPOSITORY / 'csrc'}"
    subprocess.run(
        ["g++", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", include, str(path), "-o", str(target), "-ldl"],
        check=True,
    )
    return target


def test_a_function_outside_the_global_scope_is_found_where_a_weak_reference_is_null(tmp_path):
    provider, source = compiled(tmp_path, "any_name", PROVIDER), compiled(tmp_path, "user", USER)
    user = ctypes.CDLL(str(source))
    user.weak.restype = user.look_up.restype = ctypes.c_void_p
    assert user.look_up(b"spafl_test_provided") is None, "nothing that defines it is loaded yet"
    ctypes.CDLL(str(provider), mode=ctypes.RTLD_LOCAL)
    assert user.look_up(b"spafl_test_provided") is not None and user.call() == 42
    assert user.look_up(b"spafl_test_not_there") is None
    # The fault that the look-up mends: the dynamic linker does not see it, neither now nor in a library loaded later.
    later = ctypes.CDLL(str(shutil.copy(source, tmp_path / "libuser_loaded_later.so")))
    later.weak.restype = ctypes.c_void_p
    assert user.weak() is None and later.weak() is None

"""The raw kernels under AddressSanitizer and UBSan, on every instruction set, without torch."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Unoptimised, because the templates take five times as long to compile with -O1 under the sanitisers.
FLAGS = ["-std=c++17", "-O0", "-g1", "-ffp-contract=off", "-fno-sanitize-recover=all", "-fsanitize=address,undefined"]


def compile_all(sources, folder, flags, include=ROOT / "csrc"):
    """Objects of the sources, two at a time; compiler errors are raised with their text."""

    def one(source):
        target = folder / f"{source.stem}.o"
        command = [compiler(), *flags, "-Wall", "-Wno-maybe-uninitialized", f"-I{include}", "-c", str(source)]
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def compiler():
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        pytest.skip("no C++ compiler")
    return found


def link_and_run(objects, folder, flags):
    program = folder / "check"
    done = subprocess.run([compiler(), *flags, *objects, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=120)


# Compiling the vector code takes three times as long as compiling the rest.
@pytest.fixture(scope="module", params=["scalar", pytest.param("every", marks=pytest.mark.slow)])
def kernels(request, tmp_path_factory):
    """The kernels' objects: of scalar code alone, or of every instruction set."""
    folder = tmp_path_factory.mktemp("kernels")
    shutil.copytree(ROOT / "csrc" / "cpu", folder / "cpu")
    if request.param == "scalar":
        header = folder / "cpu" / "kernels.h"
        text = header.read_text()
        assert text.count("#define SPAFL_X86_VECTORS\n") == 1
        header.write_text(text.replace("#define SPAFL_X86_VECTORS\n", ""))
    return compile_all(sorted(folder.glob("cpu/*.cpp")), folder, FLAGS, folder)


def test_kernels_under_sanitizers(kernels, tmp_path):
    check = compile_all([Path(__file__).with_name("kernels_check.cpp")], tmp_path, FLAGS)
    done = link_and_run([*kernels, *check], tmp_path, FLAGS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all kernels agree\n"


def test_the_sanitizer_build_sees_a_read_past_the_end(kernels, tmp_path):
    """The check above can fail: rows too long, in a kernel of this very build, are reported."""
    source = tmp_path / "fault.cpp"
    source.write_text(
        '#include <vector>\n#include "cpu/kernels.h"\n'
        "int main() {\n"
        "  std::vector<float> w(10), tau(2), score(2);\n"
        "  std::vector<unsigned char> mask(2);\n"
        "  return (int)spafl::kernels_for<float>(spafl::Isa::scalar)\n"
        "      .threshold_rows({w.data(), tau.data(), nullptr, score.data(), mask.data(), 2, 6, 6});\n"
        "}\n"
    )
    done = link_and_run([*kernels, *compile_all([source], tmp_path, FLAGS)], tmp_path, FLAGS)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr

"""What is built, when, and what is said about it. The builds themselves run in a copy of the build files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spafl_kernels import env, native

ROOT = Path(__file__).parents[3]


@pytest.fixture
def copy(tmp_path):
    """A clean checkout of what a build reads."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text("\n")
    (tmp_path / "python" / "spafl").mkdir(parents=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=ignore)
    shutil.copytree(ROOT / "spafl_kernels", tmp_path / "spafl_kernels", ignore=ignore)
    return tmp_path


def build(folder, *command, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SPAFL_") and k != "CXX"}
    done = subprocess.run(
        [sys.executable, "setup.py", *(command or ("build_py",))], cwd=folder, env=environment | variables,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    record = folder / "spafl_kernels" / "_build.json"
    return done, json.loads(record.read_text()) if record.exists() else None


def python(folder, code, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SPAFL_")} | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment | variables, capture_output=True, text=True
    )
    return done.stdout.strip(), done.stderr


WHY = "from spafl_kernels import native; print(native.available(), native.why_not())"
WHY_CUDA = "from spafl_kernels.gpu import cuda_ops; print(cuda_ops.available(), cuda_ops.why_not())"


def test_without_a_compiler_the_python_package_is_built_and_knows_why(copy):
    done, record = build(copy, CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert record["cpp"] is False and "no C++ compiler (/no/such/compiler" in record["cpp_reason"]
    assert "installing without the C++ extension: no C++ compiler" in done.stderr
    out, _ = python(copy, WHY)
    assert out.startswith("False the C++ extension was not built: no C++ compiler")
    # And it computes.
    out, error = python(
        copy, "import torch; from spafl_kernels import ops; print(ops.relu_pool(torch.ones(1, 1, 2, 2)).item())"
    )
    assert out == "1.0", error


@pytest.mark.slow
def test_a_compiler_that_does_not_work_is_named_with_its_message(copy):
    fake = copy / "fake-c++"
    fake.write_text("#!/bin/sh\necho 'fatal error: no assembler' >&2\nexit 1\n")
    fake.chmod(0o755)
    done, record = build(copy, CXX=str(fake))
    assert done.returncode == 0 and "fatal error: no assembler" in record["cpp_reason"]


EITHER = "must be auto, on (1, true, yes, on) or off (0, false, no, off)"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"SPAFL_BUILD_CPP": "maybe"},
            f"SPAFL_BUILD_CPP {EITHER}; got 'maybe'",
        ),
        (
            {"SPAFL_BUILD_CUDA": "2"},
            f"SPAFL_BUILD_CUDA {EITHER}; got '2'",
        ),
        ({"SPAFL_BUILD_CPP": "1", "CXX": "/no/such/compiler"}, "SPAFL_BUILD_CPP=1, but no C++ compiler"),
        ({"SPAFL_BUILD_CUDA": "1", "SPAFL_BUILD_CPP": "0"}, "SPAFL_BUILD_CUDA=1, but the C++ extension is not built"),
        ({"SPAFL_CUDA_ARCHS": "hopper"}, "SPAFL_CUDA_ARCHS must list compute capabilities such as 90a;90+PTX"),
    ],
)
def test_wrong_settings_are_errors(copy, variables, message):
    done, record = build(copy, **variables)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert record is None


@pytest.mark.slow
def test_asking_for_cuda_without_a_toolkit_is_an_error(copy):
    # A PATH with the compiler but no nvcc, and a toolkit folder that is none.
    text = (copy / "setup.py").read_text().replace('"/usr/local/cuda"', '"/no/toolkit"')
    (copy / "setup.py").write_text(text)
    tools = copy / "bin"
    tools.mkdir()
    for tool in ("c++", "g++", "as", "ld", "ninja"):
        if shutil.which(tool):
            (tools / tool).symlink_to(shutil.which(tool))
    variables = {"PATH": str(tools), "CUDA_HOME": "", "CUDA_PATH": ""}
    done, _ = build(copy, SPAFL_BUILD_CUDA="1", **variables)
    assert done.returncode != 0 and "SPAFL_BUILD_CUDA=1, but no CUDA toolkit (nvcc)" in done.stderr
    done, _ = build(copy, **variables)
    assert done.returncode == 0 and "building without CUDA: no CUDA toolkit" in done.stderr


@pytest.mark.parametrize("archs", ["90a;90+PTX", "8.0, 9.0a"])
def test_architectures(archs):
    text = (ROOT / "setup.py").read_text()
    scope = {"re": __import__("re")}
    start = text.index("def gencode")
    exec(text[start : text.index("\ndef plan")], scope)
    expected = {
        "90a;90+PTX": ["arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"],
        "8.0, 9.0a": ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"],
    }
    assert scope["gencode"](archs) == [f"-gencode={e}" for e in expected[archs]]


@pytest.fixture
def library(extension, copy):
    """The built library beside a copy of the package, to be damaged."""
    (built,) = native._HERE.glob("_C*.so")
    return Path(shutil.copy(built, copy / "spafl_kernels" / built.name))


def of_another_version(library):
    data = library.read_bytes()
    schema = f'"schema": {native.SCHEMA}'.encode()
    assert data.count(schema) == 1
    library.write_bytes(data.replace(schema, schema[:-1] + b"9"))


def of_another_torch(library):
    """It asks torch for a symbol that this one does not have."""
    data = library.read_bytes()
    symbol = b"aoti_torch_get_dtype"
    assert symbol in data
    library.write_bytes(data.replace(symbol, b"aoti_torch_GONE_type"))


def test_a_library_of_another_version_is_refused_with_the_reason(library):
    of_another_version(library)
    for why in (WHY, WHY_CUDA):
        out, _ = python(library.parent.parent, why)
        assert out.startswith("False _C.abi3.so has operator interface 9 and this package needs")


def test_a_library_that_cannot_be_loaded_is_no_crash(library):
    of_another_torch(library)
    for why in (WHY, WHY_CUDA):
        out, error = python(library.parent.parent, why)
        assert out.startswith("False _C.abi3.so was built with torch") and "cannot load it" in out, out + error
    _, error = python(library.parent.parent, WHY, SPAFL_NATIVE="1")
    assert "RuntimeError: SPAFL_NATIVE=1, but _C.abi3.so was built with torch" in error


@pytest.mark.slow
def test_without_a_compiler_a_library_that_fits_stays(library):
    folder, before = library.parent.parent, library.read_bytes()
    done, record = build(folder, "build_ext", "--inplace", CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert "keeping _C.abi3.so of an earlier build, which fits: no C++ compiler (/no/such/compiler" in done.stderr
    assert library.read_bytes() == before
    assert record["cpp"] is True and record["kept"].startswith("no C++ compiler (/no/such/compiler")
    assert record["cuda"] is bool(native.build_info()["cuda"])
    out, error = python(folder, WHY + "; print(native.build_record()['kept'])")
    assert out.splitlines()[0] == "True None" and out.splitlines()[1] == record["kept"], error
    library.unlink()
    assert python(folder, WHY)[0].startswith("False the C++ extension was not built: no C++ compiler")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        pytest.param(of_another_version, "it has operator interface 9 and this package", marks=pytest.mark.slow),
        pytest.param(of_another_torch, "this torch cannot load it", marks=pytest.mark.slow),
    ],
)
def test_without_a_compiler_a_library_that_does_not_fit_is_named_as_such(library, damage, problem):
    damage(library)
    done, record = build(library.parent.parent, "build_ext", "--inplace", CXX="/no/such/compiler")
    assert done.returncode == 0 and record["cpp"] is False and "kept" not in record
    assert f"_C.abi3.so of an earlier build stays but is of no use: {problem}" in done.stderr
    assert library.exists()


@pytest.mark.slow
def test_without_nvcc_a_library_with_cuda_kernels_stays(library):
    if not native.build_info()["cuda"]:
        pytest.skip("the extension was built without CUDA")
    folder, before = library.parent.parent, library.read_bytes()
    text = (folder / "setup.py").read_text()
    (folder / "setup.py").write_text(
        text.replace('"/usr/local/cuda"', '"/no/toolkit"').replace('which("nvcc")', 'which("no-nvcc")')
    )
    done, record = build(folder, "build_ext", "--inplace", CUDA_HOME="", CUDA_PATH="")
    assert done.returncode == 0, done.stderr
    assert "keeping _C.abi3.so of an earlier build, which fits: no CUDA toolkit" in done.stderr
    assert library.read_bytes() == before and record["cuda"] is True and "SPAFL_BUILD_CUDA=0" in record["kept"]


def test_only_a_wish_removes_a_library(library):
    done, record = build(library.parent.parent, SPAFL_BUILD_CPP="0")
    assert done.returncode == 0 and "removing _C.abi3.so of an earlier build: SPAFL_BUILD_CPP=0" in done.stderr
    assert not library.exists() and record["cpp"] is False and record["cpp_reason"] == "SPAFL_BUILD_CPP=0"


@pytest.mark.slow
def test_a_build_that_fails_leaves_library_and_record_as_they_were(library):
    folder, before = library.parent.parent, library.read_bytes()
    broken = folder / "broken-c++"
    broken.write_text('#!/bin/sh\ncase "$*" in *probe.cpp*) exec c++ "$@";; esac\necho "no space left" >&2\nexit 1\n')
    broken.chmod(0o755)
    done, record = build(folder, "build_ext", "--inplace", CXX=str(broken), SPAFL_BUILD_CUDA="0")
    assert done.returncode != 0 and record is None and library.read_bytes() == before
    written = {"cpp": True, "cpp_reason": None, "cuda": False, "cuda_reason": "of the build before"}
    (folder / "spafl_kernels" / "_build.json").write_text(json.dumps(written))
    done, record = build(folder, "build_ext", "--inplace", CXX=str(broken), SPAFL_BUILD_CUDA="0")
    assert done.returncode != 0 and record == written and library.read_bytes() == before


def test_a_library_decides_over_a_record_that_contradicts_it(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_HERE", tmp_path)
    record = {"cpp": False, "cpp_reason": "no C++ compiler", "cuda": False, "cuda_reason": "no nvcc"}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    assert native.build_record() == record
    (tmp_path / "_C.abi3.so").write_bytes(b'ELF SPAFL_BUILD{"schema": 1, "cuda": "90a"}\0')
    assert native.build_record() == {"cpp": True, "cpp_reason": None, "cuda": True, "cuda_reason": None}
    record = {"cpp": True, "cpp_reason": None, "cuda": True, "cuda_reason": None, "kept": "no ninja"}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    assert native.build_record() == record
    (tmp_path / "_C.abi3.so").unlink()
    assert native._reason_not_built() == "the C++ extension was not built: no ninja"
    del record["kept"]
    (tmp_path / "_build.json").write_text(json.dumps(record))
    assert native._reason_not_built().startswith("the C++ extension was built, but its library spafl_kernels/_C*.so is")


def test_an_instruction_set_is_forced_or_refused(extension):
    show = "from spafl_kernels import native; native.available(); print(native.cpu_isa())"
    assert python(ROOT, show, SPAFL_CPU_ISA="scalar")[0] == "scalar"
    assert "SPAFL_CPU_ISA must be scalar, avx2 or avx512; got sse9" in python(ROOT, show, SPAFL_CPU_ISA="sse9")[1]


def test_environment_report(capsys):
    assert env.main([]) == 0
    text = capsys.readouterr().out
    assert "backends" in text and "torch     yes" in text
    assert env.main(["--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["backends"]["cpp"] == {"available": native.available(), "reason": native.why_not()}
    for state in data["backends"].values():
        assert state["available"] == (state["reason"] is None)

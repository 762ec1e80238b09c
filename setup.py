"""Build script of the extension ``spafl_kernels._C``; the metadata is in pyproject.toml, the rules in csrc/README.md.

Environment:
  SPAFL_BUILD_CPP=auto|0|1    auto: build if there is a working C++ compiler, else install the pure Python package.
                              0: install the pure Python package, without the library of an earlier build.
  SPAFL_BUILD_CUDA=auto|0|1   auto: build csrc/cuda if nvcc is there. A visible GPU plays no part.
  SPAFL_CUDA_ARCHS=90a;90+PTX compute capabilities, ``+PTX`` for code that later GPUs can translate.
  CXX, CUDA_HOME, MAX_JOBS    as usual.

A missing tool is a reason to build less, and never one to lose what an earlier build made: a library that fits stays,
and only SPAFL_BUILD_CPP=0 removes one. A build that starts and fails is an error; library and record stay as they were.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import setuptools
from setuptools import setup

ROOT = Path(__file__).parent
# Written by every build and read by spafl_kernels.native, because pip hides what a successful build prints.
RECORD = ROOT / "spafl_kernels" / "_build.json"
# torch 2.11: the oldest torch that the library loads in.
TORCH_TARGET_VERSION = "0x020b000000000000"
DEFAULT_ARCHS = "90a;90+PTX"


def settings():
    """spafl_kernels.settings, without the package, which needs what is only being built."""
    spec = importlib.util.spec_from_file_location("settings", ROOT / "spafl_kernels" / "settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choice(name):
    """``auto``, ``0`` or ``1``."""
    try:
        wanted = settings().switch_or_auto(name)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    return "auto" if wanted is None else "1" if wanted else "0"


def say(line):
    print(f"spafl-kernels: {line}", file=sys.stderr, flush=True)


def compiler_problem():
    """Why C++17 cannot be compiled here, or None."""
    compiler = os.environ.get("CXX", "c++")
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <optional>\n#include <vector>\nstd::optional<std::vector<int>> x;\n")
            command = [*compiler.split(), "-std=c++17", "-fPIC", "-shared", str(source), "-o", str(source) + ".so"]
            done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"no C++ compiler ({compiler}: {error.strerror})"
    if done.returncode:
        lines = (done.stderr or "no message").strip().splitlines()
        return f"the C++ compiler does not work ({' '.join(command[:2])}: {lines[0]})"
    return None


def cpp_problem():
    """Why the C++ extension cannot be built, or None."""
    if sys.platform != "linux":
        return f"the extension is built on Linux only; this is {sys.platform}"
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return f"torch cannot be imported at build time ({error}); install with --no-build-isolation"
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
        return f"the extension needs torch >= 2.11; this is {torch.__version__}"
    if not cpp_extension.is_ninja_available():
        return "ninja is missing (pip install ninja)"
    return compiler_problem()


def cuda_home():
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if folder and Path(folder, "bin", "nvcc").is_file():
            return Path(folder)
    # nvcc on PATH may be a wrapper script somewhere else; only one that sits in a toolkit is of use.
    found = shutil.which("nvcc")
    if found:
        home = Path(found).resolve().parent.parent
        if (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


def gencode(archs):
    """nvcc's options for a list such as ``80;90a;90+PTX``."""
    options = []
    for arch in archs.replace(",", ";").split(";"):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", arch.strip())
        if not match:
            raise SystemExit(
                f"error: SPAFL_CUDA_ARCHS must list compute capabilities such as 90a;90+PTX; got {arch.strip()!r}"
            )
        number = "".join(match.group(1, 2, 3))
        kinds = f"compute_{number}" if match.group(4) else f"sm_{number}"
        options.append(f"-gencode=arch=compute_{number},code={kinds}")
    return options


def earlier_library():
    """``(path, facts, problem)`` of the library that an earlier build left; path None if there is none.

    ``problem``: why it does not fit this package, None if it does.
    """
    found = sorted(RECORD.parent.glob("_C*.so"))
    if not found:
        return None, {}, None
    match = re.search(rb"SPAFL_BUILD(\{.*?\})\0", found[0].read_bytes())
    facts = json.loads(match.group(1)) if match else {}
    if facts.get("schema") != schema():
        return found[0], facts, f"it has operator interface {facts.get('schema')} and this package needs {schema()}"
    try:
        import torch  # noqa: F401
    except ImportError:
        return found[0], facts, None  # an isolated build: nothing here can try it
    # In another process: a library cannot be unloaded.
    load = "import sys, torch; torch.ops.load_library(sys.argv[1]); torch.ops.spafl.cpu_isa()"
    done = subprocess.run([sys.executable, "-c", load, str(found[0])], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return found[0], facts, f"this torch cannot load it: {lines[-1]}"
    return found[0], facts, None


def kept(path, facts, reason):
    """The record of a library that stays because ``reason`` keeps this build from making as much."""
    newest = max(p.stat().st_mtime for p in ROOT.glob("csrc/**/*") if p.is_file())
    older = "; csrc/ holds newer files than it was built from" if newest > path.stat().st_mtime else ""
    say(f"keeping {path.name} of an earlier build, which fits: {reason}{older}")
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    cuda = bool(facts.get("cuda"))
    why = None if cuda else before.get("cuda_reason")
    return {"cpp": True, "cpp_reason": None, "cuda": cuda, "cuda_reason": why, "kept": reason}


def plan():
    """``(cpp, cuda home or None, record)`` from the environment and the machine."""
    want_cpp, want_cuda = choice("SPAFL_BUILD_CPP"), choice("SPAFL_BUILD_CUDA")
    gencode(os.environ.get("SPAFL_CUDA_ARCHS", DEFAULT_ARCHS))
    record = {"cpp": False, "cpp_reason": None, "cuda": False, "cuda_reason": None}
    reason = "SPAFL_BUILD_CPP=0" if want_cpp == "0" else cpp_problem()
    if reason:
        if want_cpp == "1":
            raise SystemExit(f"error: SPAFL_BUILD_CPP=1, but {reason}")
        if want_cuda == "1":
            raise SystemExit(f"error: SPAFL_BUILD_CUDA=1, but the C++ extension is not built: {reason}")
        path, facts, problem = earlier_library() if want_cpp != "0" else (None, {}, None)
        if path and not problem:
            return False, None, kept(path, facts, reason)
        if path:
            say(f"{path.name} of an earlier build stays but is of no use: {problem}")
        say(f"installing without the C++ extension: {reason}")
        record.update(cpp_reason=reason, cuda_reason="the C++ extension was not built")
        return False, None, record
    record["cpp"] = True
    home = cuda_home()
    if want_cuda == "0":
        reason = "SPAFL_BUILD_CUDA=0"
    elif not home:
        reason = "no CUDA toolkit (nvcc) in CUDA_HOME, /usr/local/cuda or PATH"
    elif not sorted(ROOT.glob("csrc/cuda/*.cu")):
        reason = "csrc/cuda holds no kernels"
    if reason:
        if want_cuda == "1":
            raise SystemExit(f"error: SPAFL_BUILD_CUDA=1, but {reason}")
        path, facts, problem = earlier_library() if want_cuda != "0" else (None, {}, None)
        if path and facts.get("cuda") and not problem:
            hint = "it has CUDA kernels; SPAFL_BUILD_CUDA=0 builds a library without"
            return False, None, kept(path, facts, f"{reason} ({hint})")
        say(f"building without CUDA: {reason}")
        record["cuda_reason"] = reason
        return True, None, record
    record["cuda"] = True
    return True, home, record


def extension(home):
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # cuda_bindings.cpp registers its schemas in every build and its kernels under USE_CUDA.
    sources = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/*.cpp")])
    macros = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    libraries, link = [], []
    if home:
        # Without USE_CUDA the stream accessor of the stable ABI is not declared.
        macros.append("-DUSE_CUDA")
        # Static: the library must load in a torch that brings no CUDA runtime.
        libraries = [str(home / "lib64")]
        link = ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    archs = os.environ.get("SPAFL_CUDA_ARCHS", DEFAULT_ARCHS) if home else ""
    build = json.dumps({"torch": torch.__version__, "torch_target": "2.11", "schema": schema(), "cuda": archs})
    macros.append("-DSPAFL_BUILD=" + json.dumps(build.strip("{}")))

    class BuildWithNvcc(BuildExtension):
        def build_extensions(self):
            for source in sorted(ROOT.glob("csrc/cuda/*.cu")) if home else ():
                self.extensions[0].extra_objects.append(self.compile_cuda(source))
            super().build_extensions()

        def compile_cuda(self, source):
            name = re.sub(r"\W+", "_", f"{source.stem}_{archs}")
            target = Path(self.build_temp).resolve() / f"{name}.cu.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            inputs = [*ROOT.glob("csrc/cuda/*"), Path(__file__)]
            if target.exists() and target.stat().st_mtime > max(p.stat().st_mtime for p in inputs):
                return str(target)
            command = [
                str(home / "bin" / "nvcc"), "-c", str(source), "-o", str(target), "-O3", "-std=c++17", "-lineinfo",
                f"-I{ROOT / 'csrc'}", "-Xcompiler", "-fPIC", *gencode(archs),
                # Spills and local arrays fail the build: ptxas's warnings alone leave exit status 0.
                "-Xptxas", "-warn-spills,-warn-lmem-usage", "--Werror", "all-warnings",
            ]  # fmt: skip
            say(f"nvcc {source.relative_to(ROOT)}")
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(
                    f"{done.stdout}{done.stderr}\nerror: nvcc could not compile {source.relative_to(ROOT)} for "
                    f"{archs} (SPAFL_CUDA_ARCHS); SPAFL_BUILD_CUDA=0 builds without CUDA"
                )
            return str(target)

    module = CppExtension(
        "spafl_kernels._C",
        sources,
        py_limited_api=True,
        include_dirs=[str(ROOT / "csrc"), *([str(home / "include")] if home else [])],
        library_dirs=libraries,
        # No contraction: the sums and updates have the same bits on every instruction set; the convolution asks for
        # fused multiply-adds by name. GCC 12 warns about its own AVX-512 headers.
        extra_compile_args=["-O3", "-std=c++17", "-ffp-contract=off", "-Wall", "-Wno-maybe-uninitialized", *macros],
        extra_link_args=link,
    )
    module.extra_objects = []
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildWithNvcc}}


def schema():
    """The operator interface that spafl_kernels/native.py expects."""
    text = (ROOT / "spafl_kernels" / "native.py").read_text()
    return int(re.search(r"^SCHEMA = (\d+)$", text, re.MULTILINE).group(1))


if int(setuptools.__version__.split(".")[0]) < 77:
    # A new virtual environment of Python 3.11 brings 65, which stops at the licence field without saying what to do.
    raise SystemExit(f"error: setuptools >= 77 is needed, this is {setuptools.__version__}: pip install -U setuptools")
BUILDING = {"build_ext", "build_py", "build", "install", "develop", "editable_wheel", "bdist_wheel", "dist_info"}


def remove_libraries():
    """A library of an earlier build would be loaded although this build leaves it out."""
    for library in RECORD.parent.glob("_C*.so"):
        say(f"removing {library.name} of an earlier build: SPAFL_BUILD_CPP=0")
        library.unlink()


def main():
    if not BUILDING & set(sys.argv):
        setup()
        return
    cpp, home, record = plan()
    arguments = extension(home) if cpp else {}
    if "dist_info" in sys.argv:
        setup(**arguments)
        return
    if choice("SPAFL_BUILD_CPP") == "0":
        remove_libraries()
    former = RECORD.read_bytes() if RECORD.exists() else None
    # Before anything is built, so that a wheel takes the record along.
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    try:
        setup(**arguments)
    except BaseException:
        # The library is still the one of before, and so must be what is said of it.
        if former is None:
            RECORD.unlink()
        else:
            RECORD.write_bytes(former)
        raise


main()

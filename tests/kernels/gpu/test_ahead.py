"""Kernels compiled ahead: recorded here, found in another checkout by another process, and never taken for others."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from benchmarks.gpu.ahead import pack, spec, store, unpack
from benchmarks.gpu.ahead.spec import Spec

ROOT = pathlib.Path(__file__).resolve().parents[3]
SCRIPT = pathlib.PurePath("tests", "kernels", "gpu", "support", "rehearsal.py")


def process(root, *arguments):
    """The rehearsal script of a checkout, in that checkout alone."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "SPAFL"))}
    command = [sys.executable, str(root / SCRIPT), *map(str, arguments)]
    environment["PYTHONPATH"] = str(root)
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def checkout(root):
    """A copy of what the rehearsal needs of the checkout."""
    leave = shutil.ignore_patterns("*.so", "__pycache__", "results", "*.json")
    for part in ("benchmarks", "spafl_kernels", "tests/kernels/gpu/support"):
        shutil.copytree(ROOT / part, root / part, ignore=leave)


def packed(root, kernels):
    """Kernels and an extension where a checkout carries them."""
    library = root.parent / "_C.abi3.so"
    library.write_bytes(b"packed")
    pack.archive(root / unpack.PACKED / unpack.KERNELS, kernels)
    pack.archive(root / unpack.PACKED / unpack.EXTENSION, [(library, library.name)])


# One test, so that what it compiles is compiled once however tests are spread over processes.
@pytest.mark.slow
@pytest.mark.compile_only
def test_another_checkout_loads_what_was_compiled_here_and_nothing_else(tmp_path):
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere" / "checkout"
    done = process(ROOT, "compile", cache)
    assert done.returncode == 0, done.stderr[-3000:]
    specs = spec.read(tmp_path / "specs.jsonl")
    assert int(done.stdout) == len(specs) >= 2
    checkout(elsewhere)
    packed(elsewhere, pack.kernels(cache, specs))
    shutil.rmtree(cache)

    unpacked = unpack.unpack(elsewhere)
    done = process(elsewhere, "load", unpacked.cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [len(specs), 0]
    assert done.stderr.startswith(f"{len(specs)} kernels compiled ahead for cuda 90")

    # A kernel with another source is not taken for the packed one.
    path = elsewhere / "spafl_kernels" / "gpu" / "triton" / "forward.py"
    line = "    client = tl.program_id(1).to(tl.int64)\n"
    before = path.read_text()
    assert line in before
    path.write_text(before.replace(line, f"{line}    client += 0\n", 1))
    done = process(elsewhere, "load", unpacked.cache)
    assert done.returncode != 0 and "a kernel is compiled" in done.stderr


def test_a_kernel_that_is_not_in_the_cache_is_not_packed_over(tmp_path):
    one = Spec("spafl_kernels.gpu.triton.narrowest", "narrowest", {}, (), (), {})
    with pytest.raises(ValueError, match="1 of 1 kernels are not in"):
        pack.kernels(tmp_path, [one])


def test_a_new_pack_replaces_the_extension_and_the_same_pack_does_not(tmp_path):
    root = tmp_path / "checkout"
    library = root / "spafl_kernels" / "_C.abi3.so"
    library.parent.mkdir(parents=True)
    manifest = tmp_path / store.MANIFEST
    manifest.write_text("{}")
    packed(root, [(manifest, manifest.name)])
    assert unpack.unpack(root).extension and library.read_bytes() == b"packed"
    library.write_bytes(b"built here")
    assert not unpack.unpack(root).extension and library.read_bytes() == b"built here"
    (root / unpack.PACKED / "COMMIT").write_text("abc")
    assert unpack.unpack(root).extension and library.read_bytes() == b"packed"


def test_a_process_that_only_inherits_the_environment_names_kernels_alike(tmp_path, monkeypatch):
    """Triton asks for the cache of its driver's stubs before it names a kernel."""
    for name in ("TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER", "TRITON_STORE_BINARY_ONLY", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    with store.naming():
        monkeypatch.setattr(store, "_begin", lambda: None)
        store.use(tmp_path)
    code = (
        "from triton.runtime import cache; made = cache.get_cache_manager('00' * 32); made.put(b'', 'stub.so'); "
        "print(type(made).__name__, cache.triton_key())"
    )
    log = tmp_path / "log"
    environment = {**os.environ, store.LOG: str(log)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["Store", store.portable_key()], done.stderr
    assert store.counts(log).compiled == ["stub"]  # a stub that had to be built is seen


def test_other_versions_of_triton_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "use", lambda cache: None)
    assert "no kernels were compiled ahead" in store.install(tmp_path)
    manifest = {"triton": store.VERSION, "key": store.portable_key(), "target": "cuda 90", "kernels": 3}
    (tmp_path / store.MANIFEST).write_text(json.dumps(manifest))
    assert store.install(tmp_path) == "3 kernels compiled ahead for cuda 90"
    (tmp_path / store.MANIFEST).write_text(json.dumps({**manifest, "key": "other"}))
    assert "other sources" in store.install(tmp_path)
    monkeypatch.setattr(store.triton, "__version__", "3.7.0")
    assert "Triton 3.7.0" in store.install(tmp_path)


def test_a_kernel_that_lost_a_file_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(store.knobs.cache, "dir", str(tmp_path))
    made = store.Store("KEY")
    group = {name: made.put(b"1", name) for name in ("k.json", "k.cubin", "k.source")}
    made.put_group("k.json", group)
    assert set(store.Store("KEY").get_group("k.json")) == {"k.json", "k.cubin"}
    os.unlink(group["k.cubin"])
    assert store.Store("KEY").get_group("k.json") is None


def test_what_is_not_a_kernel_is_named_with_its_line(tmp_path):
    path = tmp_path / "specs.jsonl"
    good = Spec("module", "name", {"x": "*fp32"}, (((0,), (1, 2)),), (), {})
    path.write_text(f'{good.text}\n{{"module": 1}}\n')
    with pytest.raises(ValueError, match=r"specs\.jsonl, line 2: not a kernel specification"):
        spec.read(path)


def test_nothing_is_packed_above_the_limit(tmp_path):
    (tmp_path / "kernels.tar.xz").write_bytes(b"0" * 700)
    assert pack.sizes(tmp_path, 300, limit=1000)[-1].endswith("in all")
    with pytest.raises(pack.TooLarge, match="more than"):
        pack.sizes(tmp_path, 301, limit=1000)


def test_wheels_are_those_of_the_development_environment():
    found = pack.pinned((ROOT / "requirements-dev.txt").read_text())
    assert [name.split("==")[0] for name in found] == list(pack.PACKAGES)
    with pytest.raises(ValueError, match="does not pin annotated-types"):
        pack.pinned("pydantic==1\npydantic_core==1\ntomli_w==1\ntyping-inspection==1\n")


def test_a_checkout_without_a_pack_is_left_alone(tmp_path):
    assert unpack.unpack(tmp_path) is None and not list(tmp_path.iterdir())

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
SCRIPT = pathlib.PurePath("tests", "kernels", "triton", "support", "rehearsal.py")


def process(root, *arguments):
    """The rehearsal script of a checkout, in that checkout alone."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "SPAFL"))}
    command = [sys.executable, str(root / SCRIPT), *map(str, arguments)]
    environment["PYTHONPATH"] = str(root)
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def ahead(tmp_path_factory):
    """A cache that was compiled here, and its kernels."""
    folder = tmp_path_factory.mktemp("ahead")
    done = process(ROOT, "compile", folder / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    specs = spec.read(folder / "specs.jsonl")
    assert int(done.stdout) == len(specs) >= 2
    return folder / "cache", specs


@pytest.fixture(scope="module")
def elsewhere(ahead, tmp_path_factory):
    """A copy of the checkout at another path, with the packed kernels; the cache they came from has moved."""
    cache, specs = ahead
    root = tmp_path_factory.mktemp("elsewhere") / "checkout"
    leave = shutil.ignore_patterns("*.so", "__pycache__", "results", "*.json")
    for part in ("benchmarks", "spafl_kernels", "tests/kernels/triton/support"):
        shutil.copytree(ROOT / part, root / part, ignore=leave)
    pack.archive(root / unpack.PACKED / unpack.KERNELS, pack.kernels(cache, specs))
    shutil.move(cache, cache.with_name("moved"))
    yield root
    shutil.move(cache.with_name("moved"), cache)


@pytest.mark.compile_only
def test_another_checkout_loads_what_was_compiled_here(ahead, elsewhere):
    unpacked = unpack.unpack(elsewhere)
    done = process(elsewhere, "load", unpacked.cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [len(ahead[1]), 0]
    assert done.stderr.startswith(f"{len(ahead[1])} kernels compiled ahead for cuda 90")


@pytest.mark.compile_only
def test_a_kernel_with_another_source_is_not_taken_for_the_packed_one(elsewhere):
    unpacked = unpack.unpack(elsewhere)
    path = elsewhere / "spafl_kernels" / "triton" / "forward.py"
    before = path.read_text()
    line = "    client = tl.program_id(1).to(tl.int64)\n"
    assert line in before
    path.write_text(before.replace(line, f"{line}    client += 0\n", 1))
    try:
        done = process(elsewhere, "load", unpacked.cache)
    finally:
        path.write_text(before)
    assert done.returncode != 0 and "a kernel is compiled" in done.stderr


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

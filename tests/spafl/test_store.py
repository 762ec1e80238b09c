"""The client store: rows in memory and in a file hold the same, and only what was kept."""

import pytest
import torch

from spafl.simulation import store as store_module
from spafl.simulation.loop import run
from spafl.simulation.store import ClientStore, free_memory


def tensors():
    return {
        "weight": torch.arange(6, dtype=torch.float32).view(2, 3),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "density": torch.tensor([0.5, 1.0], dtype=torch.float64),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False, True]),
    }


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    made = ClientStore.create(tmp_path / "rows", tensors(), 5, request.param)
    yield made
    made.close()


def test_rows_start_as_given_and_keep_what_is_kept(store):
    for row in range(5):
        taken = store.take(None, row)
        assert all(torch.equal(taken[name], tensor) and taken[name].dtype == tensor.dtype
                   for name, tensor in tensors().items())  # fmt: skip
        taken["weight"].add_(row)
        taken["flag"].fill_(True)
        store.keep(row)
    for row in range(5):
        loaded = store.load(row)
        assert torch.equal(loaded["weight"], tensors()["weight"] + row)
        assert loaded["flag"].all() and torch.equal(loaded["density"], tensors()["density"])
    assert all(torch.equal(store.load(None)[name], tensor) for name, tensor in tensors().items())


def test_a_loaded_copy_changes_nothing_until_it_is_saved(store):
    store.take(None, 2)["scalar"].fill_(1)
    store.keep(2)
    store.load(2)["scalar"].fill_(99)
    assert store.load(2)["scalar"] == 1
    store.buffer["scalar"].fill_(3)
    store.save(4)
    assert store.load(4)["scalar"] == 3 and store.load(2)["scalar"] == 1


def test_the_row_a_turn_reads_stays_as_it_is_until_the_end_and_after(store):
    store.take(None, 0)["weight"].fill_(1)
    store.keep(0)
    for value in (5, 6):  # the first turn was cut short: the second begins from the same tensors
        taken = store.take(0, 1)
        assert (taken["weight"] == 1).all()
        taken["weight"].fill_(value)
    store.keep(1)
    assert (store.load(1)["weight"] == 6).all() and (store.load(0)["weight"] == 1).all()


def test_another_view_of_the_file_sees_what_was_kept(store):
    other = ClientStore(store.file, tensors(), 5)
    store.take(None, 3)["weight"].fill_(-1)
    store.keep(3)
    assert (other.load(3)["weight"] == -1).all()


def test_a_copy_of_what_was_taken_copies_a_row_and_not_all(store):
    """``copy.deepcopy`` of a model copies whole storages: workers took gigabytes for a check of their engine."""
    assert all(t.untyped_storage().nbytes() == store.row_bytes for t in store.take(None, 3).values())
    assert all(t.untyped_storage().nbytes() == store.row_bytes for t in store.load(None).values())


def test_tensors_are_aligned_for_vector_loads(store):
    assert all(t.data_ptr() % 64 == 0 for k in range(5) for t in store.take(None, k).values() if t.numel())


@pytest.mark.parametrize("free, in_memory", [(10**9, True), (0, False)])
def test_auto_takes_memory_where_there_is_plenty(tmp_path, monkeypatch, free, in_memory):
    monkeypatch.setattr(store_module, "free_memory", lambda: free)
    store = ClientStore.create(tmp_path / "rows", tensors(), 3)
    assert store.file.in_memory == in_memory == (not (tmp_path / "rows").exists())


def test_auto_counts_the_rows_that_will_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "free_memory", lambda: 4 * 2 * 4096)
    assert ClientStore.create(tmp_path / "two", tensors(), 6, used=2).file.in_memory
    assert not ClientStore.create(tmp_path / "three", tensors(), 6, used=3).file.in_memory


def test_free_memory_minds_the_control_group(monkeypatch):
    files = {"/proc/meminfo": ["MemTotal: 9 kB", "MemAvailable:    1000 kB"]}
    monkeypatch.setattr(store_module, "_lines", lambda path: files.get(path, []))
    assert free_memory() == 1_024_000
    files |= {"/sys/fs/cgroup/memory.max": ["5000"], "/sys/fs/cgroup/memory.current": ["1000"]}
    assert free_memory() == 4000
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert free_memory() == 1_024_000
    files.clear()
    assert free_memory() == 0


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_runs_do_not_depend_on_where_rows_live(small_config, tmp_path, workers):
    results = []
    for kind in ("memory", "file"):
        config = small_config(rounds=2, simulation={"store": kind, "workers": workers})
        results.append(run(config, tmp_path / kind)["final"]["evaluation"])
    assert results[0] == results[1]

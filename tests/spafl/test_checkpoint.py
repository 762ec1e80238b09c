"""Checkpoints are whole: whatever is not as it was saved is refused by name, and the newest good one is used."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from spafl.cost import Cost
from spafl.errors import UserError, WriteError
from spafl.simulation import checkpoint as module
from spafl.simulation.announcements import AnnouncementLog
from spafl.simulation.checkpoint import Checkpoints, State, load_latest, saved_rounds
from spafl.simulation.rows import ClientRows

INITIAL = {"weight": torch.zeros(2, 3), "momentum.weight": torch.zeros(2, 3), "flag": torch.tensor(False)}
CLIENTS = 5


class Run:
    """Rounds without training: round r adds r + 1 to the weights of clients r and r + 1."""

    def __init__(self, folder, configuration="this run", every=1, keep=2):
        self.checkpoints = Checkpoints(folder, configuration, every, keep)
        self.rows = ClientRows(folder.parent / "rows", INITIAL, CLIENTS, "memory")
        self.log = AnnouncementLog(heard=[0] * CLIENTS)
        self.server = {"threshold": torch.zeros(4), "count": torch.tensor(0)}

    def round(self, r):
        trained = {r % CLIENTS, (r + 1) % CLIENTS}
        for k in sorted(trained):
            self.rows.load(k)["weight"].add_(r + 1)
            self.rows.save(k)
            self.log.mark_heard(k)
        self.log.announce(r, bytes([r]) * 7)
        self.server = {"threshold": torch.full((4,), float(r)), "count": torch.tensor(r)}
        state = State(r, Cost(steps=r, executed_macs=None), self.log)
        self.checkpoints.save(state, self.server, self.rows, trained)


@pytest.fixture
def folder(tmp_path):
    run = Run(tmp_path / "checkpoints")
    for r in range(3):
        run.round(r)
    return tmp_path / "checkpoints"


def rows_of(found):
    rows = ClientRows(found.path.parent / "other", INITIAL, CLIENTS, "memory")
    found.restore(rows)
    return [rows.load(k)["weight"][0, 0].item() if rows.touched(k) else None for k in range(CLIENTS)]


def test_everything_comes_back(folder):
    found, refused = Checkpoints(folder, "this run").load()
    assert refused == [] and found.path.name == "round-000002"
    assert found.state.cost == Cost(steps=2, executed_macs=None)
    assert found.state.log.heard == [0, 1, 2, 2, 0] and found.state.log.made == 3
    assert [(a.round, a.frame) for a in found.state.log.missed(0)] == [(r, bytes([r]) * 7) for r in range(3)]
    assert list(found.server) == ["threshold", "count"]
    assert torch.equal(found.server["threshold"], torch.full((4,), 2.0)) and found.server["count"] == 2
    assert rows_of(found) == [1, 3, 5, 3, None]


def test_unchanged_clients_are_links_with_the_digest_of_before(folder, monkeypatch):
    older, newer = (folder / f"round-{r:06d}" / "clients" for r in (1, 2))
    same = [name.name for name in newer.iterdir() if (older / name.name).exists() and name.samefile(older / name.name)]
    assert sorted(same) == ["00000.safetensors", "00001.safetensors"]
    hashed = []
    monkeypatch.setattr(module, "digest", lambda data, real=module.digest: hashed.append(len(data)) or real(data))
    found = Checkpoints(folder, "this run")
    checkpoint, _ = found.load()
    rows = ClientRows(folder.parent / "again", INITIAL, CLIENTS, "memory")
    checkpoint.restore(rows)
    del hashed[:]
    found.save(State(3, Cost(), checkpoint.state.log), checkpoint.server, rows, {4})
    # Server, state, log and manifest; client 4 has no row.
    assert len(hashed) == 4
    assert Checkpoints(folder, "this run").load()[0].state.round == 3


def flip(path, at=-3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()  # the file may be shared with another checkpoint
    path.write_bytes(data)


def without_momentum(path):
    tensors = load_file(path)
    del tensors["momentum.weight"]
    path.unlink()
    save_file(tensors, path)


def of_another_run(path):
    shutil.rmtree(path)
    other = Run(path.parent.parent / "others", "another run")
    for r in range(3):
        other.round(r)
    shutil.copytree(path.parent.parent / "others" / path.name, path)


def one_of_another_run(path):
    server = path / "server.safetensors"
    tensors = load_file(server)
    server.unlink()
    save_file({**tensors, "threshold": tensors["threshold"] + 1}, server)


def older_format(path):
    (path / "manifest.json").unlink()
    (path / "state.json").write_text(json.dumps({"format": 2, "round": 2}))


def swapped(path):
    a, b = (path / "clients" / f"0000{k}.safetensors" for k in (2, 3))
    a.rename(path / "x"), b.rename(a), (path / "x").rename(b)


DAMAGE = {
    "client deleted": (lambda p: (p / "clients/00002.safetensors").unlink(), "lacks clients/00002.safetensors"),
    "clients deleted": (lambda p: shutil.rmtree(p / "clients"), "lacks clients/00000.safetensors"),
    "client bit": (lambda p: flip(p / "clients/00003.safetensors"), "clients/00003.safetensors is corrupt"),
    "server bit": (lambda p: flip(p / "server.safetensors"), "server.safetensors is corrupt"),
    "log bit": (lambda p: flip(p / "log.safetensors"), "log.safetensors is corrupt"),
    "state digit": (lambda p: flip(p / "state.json", 10), "state.json is corrupt"),
    "manifest digit": (lambda p: flip(p / "manifest.json"), "manifest.json is corrupt"),
    "cut": (lambda p: (p / "server.safetensors").write_bytes(b"cut"), "server.safetensors is corrupt: it has 3 bytes"),
    "another run": (of_another_run, "belongs to a run of another configuration"),
    "another run's tensors": (one_of_another_run, "server.safetensors is corrupt"),
    "swapped": (swapped, "clients/00002.safetensors is corrupt"),
    "momentum": (lambda p: without_momentum(p / "clients/00002.safetensors"), "00002.safetensors is corrupt"),
    "foreign": (lambda p: (p / "clients/.DS_Store").write_text(""), "does not belong to it: clients/.DS_Store"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "lacks manifest.json"),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("")), "manifest.json cannot be read: Not a directory"),
    "not json": (lambda p: (p / "manifest.json").write_text("[1]"), "manifest.json is corrupt"),
    "older format": (older_format, "has format 2, of an earlier version of this program, which reads format 3"),
}


@pytest.mark.parametrize("damage, reason", DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_as_saved_is_refused_and_the_one_before_is_used(folder, damage, reason):
    damage(folder / "round-000002")
    found, refused = Checkpoints(folder, "this run").load()
    assert len(refused) == 1 and "round-000002" in refused[0] and reason in refused[0] and "\n" not in refused[0]
    assert found.state.round == 1 and rows_of(found) == [1, 3, 2, None, None]
    shutil.rmtree(folder / "round-000001")
    with pytest.raises(UserError, match="there is no other to use"):
        Checkpoints(folder, "this run").load()


def test_a_round_number_that_is_not_the_folders_is_refused(folder):
    (folder / "round-000002").rename(folder / "round-000007")
    found, refused = Checkpoints(folder, "this run").load()
    assert "round-000007 is of round 2" in refused[0] and found.state.round == 1


def test_every_flipped_byte_is_noticed(folder):
    """Of the files that are read as a whole; a manifest's spaces included."""
    for name in ("manifest.json", "state.json", "clients/00003.safetensors"):
        path = folder / "round-000002" / name
        good = path.read_bytes()
        for at in range(0, len(good), 7):
            flip(path, at)
            assert load_latest(folder).state.round == 1, (name, at)
            path.write_bytes(good)
        assert load_latest(folder).state.round == 2


def test_a_checkpoint_beyond_the_metrics_is_not_used(folder):
    found, refused = Checkpoints(folder, "this run").load(finished=1)
    assert found.state.round == 1 and "the metrics end with round 2" in refused[0]


def test_a_damaged_newer_one_is_gone_once_its_round_is_repeated(folder):
    flip(folder / "round-000002" / "server.safetensors")
    run = Run(folder)
    found, _ = run.checkpoints.load()
    found.restore(run.rows)
    run.log = found.state.log
    run.round(2)
    found, refused = Checkpoints(folder, "this run").load()
    assert refused == [] and found.state.round == 2 and rows_of(found) == [1, 3, 5, 3, None]


def test_what_is_left_is_what_an_uninterrupted_run_would_have(tmp_path):
    run = Run(tmp_path / "checkpoints", every=4, keep=2)
    for r in (3, 5, 7, 9):  # 5 and 9: a run that was stopped or extended there
        run.round(r)
    assert saved_rounds(tmp_path / "checkpoints") == [7, 9]
    run.round(11)
    assert saved_rounds(tmp_path / "checkpoints") == [7, 11]


def test_a_file_that_cannot_be_linked_is_written_anew(folder):
    run = Run(folder)
    found, _ = run.checkpoints.load()
    found.restore(run.rows)
    run.log = found.state.log
    (folder / "round-000002" / "clients" / "00001.safetensors").unlink()
    run.round(3)
    found, refused = Checkpoints(folder, "this run").load()
    assert refused == [] and rows_of(found) == [1, 3, 5, 7, 4]


def test_a_failed_save_leaves_what_was_there(folder, monkeypatch):
    run = Run(folder)
    found, _ = run.checkpoints.load()
    found.restore(run.rows)
    run.log = found.state.log

    def full(path, data):
        raise WriteError(f"{path} could not be written: No space left on device")

    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(WriteError, match="No space left"):
        run.round(3)
    assert sorted(p.name for p in folder.iterdir()) == ["round-000001", "round-000002"]
    assert Checkpoints(folder, "this run").load()[0].state.round == 2

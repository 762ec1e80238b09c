"""Checkpoints: the whole state of a run between two rounds, from which it continues bit for bit.

``checkpoints/round-000012/`` holds

* ``state.json``: what a run carries from round to round apart from tensors;
* ``server.safetensors``: the server's tensors;
* ``log.safetensors``: announcements that clients have yet to hear, if there were any;
* ``clients/00007.safetensors``: one per client that has trained. A client that has not trained since the checkpoint
  before is a hard link to its file there;
* ``manifest.json``: size and digest of all of these, the round, the version of this package and a digest of the
  configuration. A checkpoint is used only if all of it is as the manifest says.

A checkpoint appears by one rename, so it is whole or absent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from spafl_kernels import __version__

from ..cost import Cost
from ..errors import UserError
from .announcements import Announcement, AnnouncementLog
from .files import digest, digest_of_file, sync, write_file, writing
from .rows import ClientRows

_NAME = re.compile(r"round-(\d{6,})$")
FORMAT = 3

MANIFEST, STATE, SERVER, LOG = "manifest.json", "state.json", "server.safetensors", "log.safetensors"


class Damaged(ValueError):
    """A checkpoint is not what was saved; the text says what is wrong with which of its files."""


@dataclass(frozen=True)
class State:
    """What a run carries from round to round, apart from the tensors of server and clients."""

    round: int
    """Last finished round."""
    cost: Cost
    """Of all rounds so far."""
    log: AnnouncementLog


def _client_name(client: int) -> str:
    return f"clients/{client:05d}.safetensors"


def _path(folder: Path, round: int) -> Path:
    return folder / f"round-{round:06d}"


def saved_rounds(folder: Path) -> list[int]:
    """Rounds after which there is a checkpoint, ascending; whether it is a good one is not looked at."""
    if not folder.is_dir():
        return []
    matches = (_NAME.match(entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        configuration: digest of the settings that decide a run's results (:func:`.same_run.run_digest`).
        version: of the package that wrote it.
        files: size and digest of each file, by its path in the checkpoint.
    """

    round: int
    configuration: str
    version: str
    files: Mapping[str, tuple[int, str]]

    def to_json(self) -> str:
        """As written; the digest covers the rest."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({"digest": digest(_canonical(content)), "content": content})

    @staticmethod
    def read(path: Path) -> Manifest:
        """The manifest in a checkpoint's folder.

        Raises:
            Damaged: there is none, it is not as written, or of another format.
        """
        try:
            whole = json.loads((path / MANIFEST).read_bytes())
            content = dict(whole["content"])
            if whole["digest"] != digest(_canonical(content)):
                raise Damaged(f"{MANIFEST} is corrupt: its content is not what was saved")
            written = content.pop("format")
            if written != FORMAT:
                raise Damaged(f"has format {written}; this program reads format {FORMAT}")
            files = {name: (int(size), str(known)) for name, (size, known) in content.pop("files").items()}
            return Manifest(**content, files=files)
        except FileNotFoundError:
            raise Damaged(_without_manifest(path)) from None
        except OSError as error:
            raise Damaged(f"{MANIFEST} cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, Damaged):
                raise
            raise Damaged(f"{MANIFEST} is corrupt: {error}") from None


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _without_manifest(path: Path) -> str:
    """Why there is no manifest: formats 1 and 2 had none."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        written = json.loads((path / STATE).read_bytes()).get("format")
        if isinstance(written, int) and written < FORMAT:
            return f"has format {written}, of an earlier version of this program, which reads format {FORMAT}"
    return f"lacks {MANIFEST}"


def _check_files(path: Path, files: Mapping[str, tuple[int, str]], wanted: set[str]) -> None:
    """Compare a checkpoint's folder with its manifest; contents of the files in ``wanted`` only."""
    there = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_symlink() or not p.is_dir()} - {MANIFEST}
    for name in sorted(there - files.keys()):
        raise Damaged(f"holds a file that does not belong to it: {name}")
    for name in sorted(files.keys() - there):
        raise Damaged(f"lacks {name}")
    for name in sorted(wanted):
        size, known = files[name]
        try:
            got = (path / name).stat().st_size
            if got != size:
                raise Damaged(f"{name} is corrupt: it has {got} bytes, {size} were saved")
            if digest_of_file(path / name) != known:
                raise Damaged(f"{name} is corrupt: its content is not what was saved")
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified; client files are read by :meth:`client` and :meth:`restore`."""

    path: Path
    manifest: Manifest
    state: State
    server: dict[str, Tensor]

    @staticmethod
    def open(path: Path, configuration: str | None = None, client: int | None = None) -> Checkpoint:
        """Verify a checkpoint and read it.

        Args:
            path: ``round-000012``.
            configuration: what its manifest has to say; None: anything.
            client: verify the content of this client's file alone; None: of all.

        Raises:
            Damaged: something is not as it was saved.
        """
        manifest = Manifest.read(path)
        if _path(path.parent, manifest.round) != path:
            raise Damaged(f"is of round {manifest.round}, not of the round in its name")
        if configuration is not None and manifest.configuration != configuration:
            raise Damaged("belongs to a run of another configuration")
        files = manifest.files
        wanted = set(files) if client is None else {STATE, SERVER, LOG, _client_name(client)} & files.keys()
        _check_files(path, files, wanted)
        try:
            value = json.loads((path / STATE).read_bytes())
            state = _state(value, _read(path / LOG) if LOG in files else {})
            tensors = _read(path / SERVER)
            # The file has an order of its own, and messages are in that of the server's tensors.
            server = {name: tensors[name] for name in value["server"]}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise Damaged(f"cannot be read: {error}") from None
        return Checkpoint(path, manifest, state, server)

    def restore(self, store: ClientRows) -> None:
        """Fill the rows of all clients that have trained.

        Raises:
            UserError: a client's tensors are not those that a row holds.
        """
        for file in sorted((self.path / "clients").iterdir()):
            client = int(file.stem)
            row, tensors = store.load(client), _read(file)
            if {n: (t.shape, t.dtype) for n, t in row.items()} != {n: (t.shape, t.dtype) for n, t in tensors.items()}:
                raise UserError(f"checkpoint file {file} does not hold the tensors of a client of this run")
            for name, tensor in tensors.items():
                row[name].copy_(tensor)
            store.save(client)

    def client(self, client: int) -> dict[str, Tensor] | None:
        """One client's tensors, or None if it has not trained."""
        name = _client_name(client)
        return _read(self.path / name) if name in self.manifest.files else None


def _read(file: Path) -> dict[str, Tensor]:
    return load(file.read_bytes())


def _log_tensors(log: AnnouncementLog) -> dict[str, Tensor]:
    return {
        "heard": torch.tensor(log.heard, dtype=torch.int32),
        "rounds": torch.tensor([a.round for a in log.pending], dtype=torch.int64),
        "sizes": torch.tensor([len(a.frame) for a in log.pending], dtype=torch.int64),
        "frames": torch.frombuffer(bytearray(b"".join(a.frame for a in log.pending)), dtype=torch.uint8),
    }


def _state(value: dict[str, Any], log: dict[str, Tensor]) -> State:
    made, clients = value["announcements"], value["clients"]
    if not log:
        return State(value["round"], Cost(**value["cost"]), AnnouncementLog(made, [made] * clients))
    frames, at, pending = log["frames"].numpy().tobytes(), 0, []
    for round, size in zip(log["rounds"].tolist(), log["sizes"].tolist(), strict=True):
        pending.append(Announcement(round, frames[at : at + size]))
        at += size
    return State(value["round"], Cost(**value["cost"]), AnnouncementLog(made, log["heard"].tolist(), pending))


@dataclass
class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: ``checkpoints/`` of the run.
        configuration: see :class:`Manifest`.
        every, keep: the settings ``checkpoint_every`` and ``keep_checkpoints``.

    Attributes:
        newest: the one that was saved or loaded last; unchanged clients are linked from there.
    """

    folder: Path
    configuration: str
    every: int = 1
    keep: int = 1
    newest: tuple[Path, Manifest] | None = None

    def load(self, finished: int | None = None) -> tuple[Checkpoint | None, list[str]]:
        """The newest good checkpoint (None: there are no checkpoints), and why newer ones are not used.

        Args:
            finished: last round whose metrics are there: a newer checkpoint cannot be continued. None: any.

        Raises:
            UserError: there are checkpoints, but none that can be used.
        """
        found, refused = _newest_good(self.folder, self.configuration, finished=finished)
        self.newest = (found.path, found.manifest) if found else None
        return found, refused

    def save(
        self,
        state: State,
        server: Mapping[str, Tensor],
        store: ClientRows | None = None,
        dirty: set[int] | None = None,
    ) -> None:
        """Write the checkpoint of ``state.round``.

        Older ones are removed as far as a run without interruptions would not have them now, newer ones because they
        are of rounds that are being repeated.

        Args:
            dirty: clients that have trained since the checkpoint before; None: any may have.

        Raises:
            WriteError: the disk is full, say. The checkpoints there were are still there.
        """
        target = _path(self.folder, state.round)
        work = self.folder / f".{target.name}.tmp"
        try:
            manifest = self._write(work, state, server, store, dirty)
            with writing(target):
                if target.exists():
                    _remove(target)
                os.replace(work, target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        sync(self.folder)
        self.newest = target, manifest
        self.tidy(state.round)

    def _write(
        self, work: Path, state: State, server: Mapping[str, Tensor], store: ClientRows | None, dirty: set[int] | None
    ) -> Manifest:
        with writing(work):
            shutil.rmtree(work, ignore_errors=True)
            (work / "clients").mkdir(parents=True)
        files: dict[str, tuple[int, str]] = {}

        def put(name: str, data: bytes) -> None:
            files[name] = len(data), digest(data)
            write_file(work / name, data)

        linked: set[str] = set()
        for client in range(store.clients if store else 0):
            assert store is not None
            if not store.touched(client):
                continue
            name = _client_name(client)
            if dirty is not None and client not in dirty and (entry := self._link(name, work)):
                files[name] = entry
                linked.add(name)
            else:
                put(name, save(store.load(client)))
        put(SERVER, save({name: tensor.detach().cpu().contiguous() for name, tensor in server.items()}))
        log = state.log
        value = {"round": state.round, "cost": asdict(state.cost), "announcements": log.made, "clients": len(log.heard)}
        value["server"] = list(server)
        put(STATE, json.dumps(value).encode())
        if log.pending:
            put(LOG, save(_log_tensors(log)))
        manifest = Manifest(state.round, self.configuration, __version__, files)
        write_file(work / MANIFEST, manifest.to_json().encode())
        for name in (*(files.keys() - linked), MANIFEST, "clients", "."):
            sync(work / name)
        return manifest

    def _link(self, name: str, work: Path) -> tuple[int, str] | None:
        """Link a file of the newest checkpoint; its entry in the manifest, or None if it cannot be done."""
        if self.newest is None or name not in self.newest[1].files:
            return None
        try:
            os.link(self.newest[0] / name, work / name)
        except OSError:  # a file system without hard links, or somebody removed the file: it is written anew
            return None
        return self.newest[1].files[name]

    def tidy(self, round: int) -> None:
        """Keep what a run without interruptions has when it has saved ``round``, and nothing else."""
        saved = saved_rounds(self.folder)
        due = [r for r in saved if r < round and (r + 1) % self.every == 0]
        kept = {round, *due[max(0, len(due) - self.keep + 1) :]}
        with writing(self.folder):
            for other in saved:
                if other not in kept:
                    _remove(_path(self.folder, other))
            for left in self.folder.glob(".round-*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint: its name goes first, so that no half of one is ever found."""
    gone = path.with_name(f".{path.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def load_latest(folder: Path, configuration: str | None = None, client: int | None = None) -> Checkpoint | None:
    """The newest good checkpoint in ``checkpoints/`` of a run, or None if there are none.

    Args:
        configuration, client: see :meth:`Checkpoint.open`.

    Raises:
        UserError: there are checkpoints, but none is good.
    """
    return _newest_good(folder, configuration, client)[0]


def _end(finished: int) -> str:
    return f"with round {finished + 1}" if finished >= 0 else "before the first round"


def _newest_good(
    folder: Path, configuration: str | None, client: int | None = None, finished: int | None = None
) -> tuple[Checkpoint | None, list[str]]:
    refused: list[str] = []
    for round in reversed(saved_rounds(folder)):
        path = _path(folder, round)
        try:
            if finished is not None and round > finished:
                raise Damaged(f"cannot be continued: the metrics end {_end(finished)}")
            return Checkpoint.open(path, configuration, client), refused
        except Damaged as error:
            refused.append(f"checkpoint {path} {error}")
    if refused:
        raise UserError(f"{refused[0]}; there is no other to use (without {folder}, --resume starts anew)")
    return None, refused

"""Checkpoints: the whole state of a run between two rounds, from which it continues bit for bit.

``checkpoints/round-000012/`` holds ``state.json``, ``server.safetensors`` and one ``clients/00007.safetensors`` per
client that has been touched. A client that did not change since the checkpoint
before is a hard link to its file there. A checkpoint appears by one rename, so it is whole or absent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..cost import Cost
from ..errors import UserError
from ..wire import decode
from .announcements import Announcement, AnnouncementLog
from .rows import ClientRows

_NAME = re.compile(r"round-(\d{6})$")
FORMAT = 2


@dataclass(frozen=True)
class State:
    """What a run carries from round to round, apart from tensors."""

    round: int
    """Last finished round."""
    cost: Cost
    """Of all rounds so far."""
    best: dict[str, float]
    log: AnnouncementLog


def _as_json(state: State) -> dict[str, Any]:
    log = asdict(state.log)
    log["pending"] = [{"round": a.round, "frame": a.frame.hex()} for a in state.log.pending]
    return {"format": FORMAT, "round": state.round, "cost": asdict(state.cost), "best": state.best, "log": log}


def _from_json(value: dict[str, Any]) -> State:
    log = dict(value["log"])
    pending = [Announcement(item["round"], bytes.fromhex(item["frame"])) for item in log.pop("pending")]
    for announcement in pending:
        decode(announcement.frame, announcement.round)  # now, and not in the middle of a round
    return State(value["round"], Cost(**value["cost"]), value["best"], AnnouncementLog(**log, pending=pending))


def _path(folder: Path, round: int) -> Path:
    return folder / f"round-{round:06d}"


def saved_rounds(folder: Path) -> list[int]:
    """Rounds after which there is a checkpoint, ascending."""
    if not folder.is_dir():
        return []
    matches = (_NAME.match(entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def save(
    folder: Path,
    state: State,
    server: dict[str, Tensor],
    store: ClientRows | None,
    dirty: set[int],
    keep: int,
) -> None:
    """Write the checkpoint of ``state.round``.

    Args:
        folder: ``checkpoints/`` of the run.
        dirty: clients whose rows changed since the checkpoint before.
        keep: older checkpoints beyond this many are removed.
    """
    folder.mkdir(exist_ok=True)
    before = saved_rounds(folder)
    target = _path(folder, state.round)
    work = folder / f".{target.name}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    (work / "clients").mkdir(parents=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in server.items()}, work / "server.safetensors"
    )
    (work / "state.json").write_text(json.dumps(_as_json(state)))
    previous = _path(folder, before[-1]) / "clients" if before else None
    written = [work / "server.safetensors", work / "state.json"]
    for client in range(store.clients if store else 0):
        assert store is not None
        if not store.touched(client):
            continue
        name = f"{client:05d}.safetensors"
        if previous is not None and client not in dirty and (previous / name).exists():
            _link(previous / name, work / "clients" / name)
        else:
            save_file(store.load(client), work / "clients" / name)
            written.append(work / "clients" / name)
    for file in written:
        _sync(file)
    if target.exists():
        shutil.rmtree(target)
    os.replace(work, target)
    _sync(folder)
    for round in saved_rounds(folder)[:-keep]:
        shutil.rmtree(_path(folder, round))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Checkpoint:
    """A checkpoint read back; client files are read by :meth:`restore`."""

    path: Path
    state: State
    server: dict[str, Tensor]

    def restore(self, store: ClientRows) -> None:
        """Fill the rows of all clients the checkpoint holds."""
        for file in sorted((self.path / "clients").iterdir()):
            client = int(file.stem)
            row = store.load(client)
            for name, tensor in _load(file).items():
                row[name].copy_(tensor)
            store.save(client)

    def client(self, client: int) -> dict[str, Tensor] | None:
        """One client's tensors, or None if it was never touched."""
        file = self.path / "clients" / f"{client:05d}.safetensors"
        return _load(file) if file.exists() else None


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # the library raises several kinds, for a file it cannot read
        raise UserError(f"checkpoint file {file} is corrupt: {error}") from None


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None if there is none.

    Raises:
        UserError: it is corrupt, or of another format version.
    """
    rounds = saved_rounds(folder)
    if not rounds:
        return None
    path = _path(folder, rounds[-1])
    try:
        value: dict[str, Any] = json.loads((path / "state.json").read_text())
        if value["format"] != FORMAT:
            raise UserError(f"checkpoint {path} has format {value['format']}; this program reads {FORMAT}")
        state = _from_json(value)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"checkpoint {path} is corrupt: {error}") from None
    return Checkpoint(path, state, _load(path / "server.safetensors"))

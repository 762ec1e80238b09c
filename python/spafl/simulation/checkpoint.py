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
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from .store import ClientStore

_NAME = re.compile(r"round-(\d{6})$")
FORMAT = 1


@dataclass
class Announcement:
    """An announcement that some clients have yet to receive."""

    round: int
    frame: bytes


@dataclass
class Progress:
    """What the round loop carries from round to round, apart from tensors."""

    round: int = -1
    """Last finished round."""
    cost: dict[str, float] = field(default_factory=dict)
    """Cumulative costs."""
    announced_until: int = 0
    """Number of announcements made so far."""
    received: list[int] = field(default_factory=list)
    """How many of them each client has received."""
    best: dict[str, float] = field(default_factory=dict)


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
    progress: Progress,
    server: dict[str, Tensor],
    pending: Iterable[Announcement],
    store: ClientStore | None,
    dirty: set[int],
    keep: int,
) -> None:
    """Write the checkpoint of ``progress.round``.

    Args:
        folder: ``checkpoints/`` of the run.
        pending: announcements that not all clients have received, oldest first.
        dirty: clients whose rows changed since the checkpoint before.
        keep: older checkpoints beyond this many are removed.
    """
    folder.mkdir(exist_ok=True)
    before = saved_rounds(folder)
    target = _path(folder, progress.round)
    work = folder / f".{target.name}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    (work / "clients").mkdir(parents=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in server.items()}, work / "server.safetensors"
    )
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "pending": [{"round": a.round, "frame": a.frame.hex()} for a in pending],
    }
    (work / "state.json").write_text(json.dumps(state))
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
    progress: Progress
    server: dict[str, Tensor]
    pending: list[Announcement]

    def restore(self, store: ClientStore) -> None:
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
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise UserError(f"checkpoint {path} has format {state['format']}; this program reads {FORMAT}")
        progress = Progress(**state["progress"])
        pending = [Announcement(item["round"], bytes.fromhex(item["frame"])) for item in state["pending"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"checkpoint {path} is corrupt: {error}") from None
    return Checkpoint(path, progress, _load(path / "server.safetensors"), pending)

"""A client's private state on its own disk: one file, written whole or not at all, verified when it is read.

Three files beside it only serve ``spafl export``: ``config.toml`` is the run's, ``client-K.json`` says what its samples
look like, ``client-K.tested`` is the newest message it was tested with. Nothing of a run depends on them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError

FORMAT = "1"
_REPLY = "reply"  # the last upload, among the tensors; their names have a prefix
_OWN = "own."
_PAUSE = 0.1  # seconds between two looks whether another process is done


@dataclass
class ClientState:
    """What a client keeps between its turns.

    Attributes:
        tensors: by the names of ``Problem.client_state``.
        heard: how many announcements it has received.
        trained: the round it trained in last, -1 before the first.
        task: digest of the message it trained on then.
        reply: what it answered: a client that is asked again does not train again.
        instance: drawn when the state was made. Two clients of one number have different ones; one that was restarted
            has the same.
        unmerged: rounds it has trained in since the last one of which it knows that its upload was merged.
    """

    tensors: dict[str, Tensor]
    heard: int = 0
    trained: int = -1
    task: str = ""
    reply: bytes = b""
    instance: str = field(default_factory=lambda: uuid.uuid4().hex)
    unmerged: tuple[int, ...] = ()


def digest(raw: bytes) -> str:
    """128 bits of a message, as text."""
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def _digest(state: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.blake2b(repr(sorted(state.items())).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


class ClientDisk:
    """The file of one client of one run.

    Args:
        folder: of all clients' files on this machine.
        run: name of the run, as the server drew it.
        client: its number.
    """

    def __init__(self, folder: Path, run: str, client: int) -> None:
        self.path = folder / run / f"client-{client:05d}.safetensors"

    @contextmanager
    def turn(self, patience: float = 0.0) -> Iterator[None]:
        """Keep other processes from taking this client's turn at the same time.

        Args:
            patience: seconds to wait for another process: one whose node was killed may still be at work.

        Raises:
            UserError: the folder cannot be written, or another process has this client's turn.
        """
        lock = self.path.with_suffix(".lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        except OSError as error:
            raise UserError(f"client state {self.path.parent} cannot be written: {error.strerror}") from None
        with file:
            end = time.monotonic() + patience
            while not _locked(file.fileno()):
                if time.monotonic() >= end:
                    raise UserError(f"client state {self.path} is in use by another process")
                time.sleep(_PAUSE)
            yield

    def load(self, initial: Mapping[str, Tensor]) -> ClientState:
        """The state as it was saved, or a new one with the tensors of ``initial``.

        Raises:
            UserError: the file is damaged, of another format, or holds other tensors than ``initial``.
        """
        if not self.path.exists():
            return ClientState({name: tensor.detach().clone() for name, tensor in initial.items()})
        try:
            with safe_open(self.path, "pt") as file:
                told = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"client state {self.path} cannot be read: {error}") from None
        if told.get("format") != FORMAT:
            raise UserError(
                f"client state {self.path} has format {told.get('format')}; this program reads {FORMAT} only"
            )
        if told.pop("digest", None) != _digest(told, tensors):
            raise UserError(f"client state {self.path} is damaged: its digest does not match")
        reply = tensors.pop(_REPLY)
        # Where a tensor begins decides the last bits of what is computed with it: in memory of its own, as elsewhere.
        own = {name.removeprefix(_OWN): tensor.clone() for name, tensor in tensors.items()}
        form = {name: (tensor.shape, tensor.dtype) for name, tensor in initial.items()}
        if {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()} != form:
            raise UserError(f"client state {self.path} belongs to another model or method")
        return ClientState(
            own, int(told["heard"]), int(told["trained"]), told["task"], reply.numpy().tobytes(), told["instance"],
            tuple(json.loads(told.get("unmerged", "[]"))),
        )  # fmt: skip

    def save(self, state: ClientState) -> None:
        """Write the state; a kill at any moment leaves the old file or the new one.

        Raises:
            UserError: it cannot be written (disk full, say); the old file is left as it is.
        """
        tensors = {_OWN + name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}
        tensors[_REPLY] = torch.frombuffer(bytearray(state.reply), dtype=torch.uint8) if state.reply else (
            torch.empty(0, dtype=torch.uint8)
        )  # fmt: skip
        told = {
            "format": FORMAT,
            "heard": str(state.heard),
            "trained": str(state.trained),
            "task": state.task,
            "unmerged": json.dumps(state.unmerged),
            "instance": state.instance,
        }
        told["digest"] = _digest(told, tensors)
        self._write(self.path, save(tensors, told))

    def describe(self, config: str, samples: str) -> None:
        """Write down which run this is (TOML) and what the client's samples look like (JSON).

        Raises:
            UserError: it cannot be written.
        """
        for path, text in ((self.path.parent / "config.toml", config), (self.path.with_suffix(".json"), samples)):
            if not path.exists() or path.read_text() != text:
                self._write(path, text.encode())

    def keep_test(self, raw: bytes) -> None:
        """Keep the parcel that the client was tested with last.

        Raises:
            UserError: it cannot be written.
        """
        self._write(self.path.with_suffix(".tested"), raw)

    def last_test(self) -> bytes | None:
        """The parcel that the client was tested with last, or None before the first test."""
        path = self.path.with_suffix(".tested")
        return path.read_bytes() if path.exists() else None

    def _write(self, path: Path, raw: bytes) -> None:
        # Clients of one machine share a folder, and one file in it.
        part = self.path.with_suffix(f"{path.suffix}.part")
        try:
            with part.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        except OSError as error:
            with suppress(OSError):
                part.unlink()  # where the disk is full, half a file makes it fuller
            raise UserError(f"client state {path} cannot be written: {error.strerror}") from None


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""Where clients' tensors live between their turns: rows of one length, shared by all workers, in memory or in a file.

Which client is in which row is not known here (:mod:`.rows`): a turn reads one row and writes another.

* In memory, a turn works in the row it writes: one copy. 431,080 weights and their momentum are 3.4 MB.
* In a file, the row is read into a buffer and written back afterwards, so memory does not grow with the number of
  clients. Plain reads and writes, because mapping a file is slower: on ext4 the page faults of a row of 3.4 MB took
  1.4 ms on one machine and 16 ms on another, reading and writing it 0.3 ms and 1 ms.

Both are an open file that worker processes inherit; the one in memory has no name and is gone with the last of them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .files import writing

StoreKind = Literal["auto", "memory", "file"]

_ALIGN = 64  # widest vector load
_PAGE = 4096

# "auto" keeps rows in memory up to this share of what is free: the rest is for the workers and the page cache.
_SHARE = 0.25


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def free_memory() -> int:
    """Bytes this process may still use: what the machine has available, or less if a control group limits it."""
    free = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        free.append(int(limit[0]) - int(used[0]))
    return max(0, min(free, default=0))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@dataclass(frozen=True)
class StoreFile:
    """An open file with the rows; worker processes inherit the descriptor under the same number."""

    descriptor: int
    path: Path | None
    """Where it is; None: in memory."""

    @property
    def in_memory(self) -> bool:
        """Whether it is mapped rather than read and written."""
        return self.path is None

    def close(self) -> None:
        """Close this process's descriptor."""
        os.close(self.descriptor)


@dataclass(frozen=True)
class _Field:
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def of(self, row: Mapping[torch.dtype, Tensor]) -> Tensor:
        """This field of a row, given as its bytes seen as each dtype."""
        return row[self.dtype].as_strided(self.shape, self.strides, self.offset // self.dtype.itemsize)


def _layout(tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Field], int]:
    """Where each tensor lies in a row, and the row's bytes."""
    fields: dict[str, _Field] = {}
    offset = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        strides = torch.empty(tensor.shape, device="meta").stride()
        fields[name] = _Field(offset, tuple(tensor.shape), strides, tensor.dtype)
        offset += _round_up(nbytes, _ALIGN)
    return fields, _round_up(offset, _PAGE)


class ClientStore:
    """Rows of named tensors, and a buffer for one of them.

    Args:
        file: made by :meth:`create`.
        initial: the tensors of a client that has not been touched yet; their names, shapes and dtypes are the layout.
        rows: how many there are.

    Attributes:
        buffer: views of the buffer by name; always the same objects, holding the row of the last :meth:`load`.
    """

    def __init__(self, file: StoreFile, initial: Mapping[str, Tensor], rows: int) -> None:
        self._fields, self.row_bytes = _layout(initial)
        self.rows, self.file = rows, file
        self._mapped: mmap.mmap | None = None
        if file.in_memory and self.row_bytes:
            self._mapped = mmap.mmap(file.descriptor, self.row_bytes * rows)
        self._buffer = torch.zeros(self.row_bytes, dtype=torch.uint8)
        self._bytes = self._buffer.numpy().data
        typed = self._as_each_dtype(self._buffer)
        self.buffer = {name: field.of(typed) for name, field in self._fields.items()}
        for name, tensor in initial.items():
            self.buffer[name].copy_(tensor.detach())
        self._initial = self._buffer.clone()

    def _as_each_dtype(self, row: Tensor) -> dict[torch.dtype, Tensor]:
        return {dtype: row.view(dtype) for dtype in {field.dtype for field in self._fields.values()}}

    def _row(self, number: int) -> Tensor:
        """A row in memory, as bytes.

        Of a storage of its own: a view of all rows would be copied with all of them by ``copy.deepcopy`` of a model.
        """
        assert self._mapped is not None
        return torch.frombuffer(self._mapped, dtype=torch.uint8, count=self.row_bytes, offset=number * self.row_bytes)

    @classmethod
    def create(
        cls, path: Path, initial: Mapping[str, Tensor], rows: int, kind: StoreKind = "auto", used: int | None = None
    ) -> ClientStore:
        """Make an empty store; a row takes memory or disk space once it is written.

        Args:
            path: where the file is made, if it is one.
            initial, rows: see the class.
            kind: ``"auto"`` takes memory if the rows need at most a quarter of what is free, and can be had.
            used: how many of the rows will be written; by default all.
        """
        row = _layout(initial)[1]
        in_memory = kind == "memory" or (
            kind == "auto"
            and hasattr(os, "memfd_create")
            and row * (rows if used is None else used) <= _SHARE * free_memory()
        )
        if in_memory:
            file = StoreFile(os.memfd_create("clients"), None)
            os.ftruncate(file.descriptor, row * rows)
        else:
            with writing(path):
                file = StoreFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), path)
        return cls(file, initial, rows)

    def load(self, row: int | None) -> dict[str, Tensor]:
        """Copy a row (None: the initial tensors) into the buffer and return the views of it.

        It is read, not mapped: what a process only looks at does not count as its memory.
        """
        if row is None:
            self._buffer.copy_(self._initial)
        elif os.preadv(self.file.descriptor, [self._bytes], row * self.row_bytes) != self.row_bytes:
            raise OSError("the client store is truncated")
        return self.buffer

    def save(self, row: int) -> None:
        """Copy the buffer to a row.

        Raises:
            WriteError: the disk is full, say.
        """
        done, start = 0, row * self.row_bytes
        with writing(self.file.path or Path("the client store in memory")):
            while done < self.row_bytes:  # a disk that fills up takes a part first, and says why at the next attempt
                done += os.pwritev(self.file.descriptor, [self._bytes[done:]], start + done)

    def take(self, source: int | None, target: int) -> dict[str, Tensor]:
        """The tensors of row ``source`` (None: the initial ones), to be changed until :meth:`keep`.

        In memory they are views of row ``target``, else of the buffer; ``source`` is another row and stays as it is.
        """
        if self._mapped is None:
            return self.load(source)
        row = self._row(target)
        row.copy_(self._initial if source is None else self._row(source))
        typed = self._as_each_dtype(row)
        return {name: field.of(typed) for name, field in self._fields.items()}

    def keep(self, target: int) -> None:
        """The tensors of :meth:`take` are in row ``target`` from now on."""
        if self._mapped is None:
            self.save(target)

    def close(self) -> None:
        """Close the file; rows in memory are gone when every process has closed it."""
        self.file.close()

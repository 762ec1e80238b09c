"""Where clients' tensors live: one memory-mapped file, a row per client, shared by all workers.

A client's turn costs no copy on a CPU: the resident model's parameters are pointed into the client's row. Pages of a
row are handed back to the page cache afterwards, so a worker's memory does not grow with the number of clients.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_ALIGN = 64  # widest vector load
_PAGE = mmap.PAGESIZE
_FLAG_BYTES = _ALIGN  # first bytes of a row: 1 once the row holds a client


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class _Field:
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class ClientStore:
    """Rows of named tensors in a file.

    Args:
        path: the file; created (sparse) by :meth:`create`, opened by every worker.
        initial: the tensors of a client that has not been touched yet; their names, shapes and dtypes are the layout.
        clients: number of rows.
    """

    def __init__(self, path: Path, initial: Mapping[str, Tensor], clients: int) -> None:
        self._initial = {name: tensor.detach().cpu() for name, tensor in initial.items()}
        self._fields: dict[str, _Field] = {}
        offset = _FLAG_BYTES
        for name, tensor in self._initial.items():
            self._fields[name] = _Field(offset, tuple(tensor.shape), tensor.dtype)
            offset += _round_up(tensor.numel() * tensor.element_size(), _ALIGN)
        self.row_bytes = _round_up(offset, _PAGE)
        self.clients = clients
        self._path = path
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.row_bytes * clients)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def create(cls, path: Path, initial: Mapping[str, Tensor], clients: int) -> ClientStore:
        """Make an empty store; rows take disk space once they are written."""
        with path.open("wb") as file:
            file.truncate(cls._size(initial, clients))
        return cls(path, initial, clients)

    @staticmethod
    def _size(initial: Mapping[str, Tensor], clients: int) -> int:
        sizes = (_round_up(t.numel() * t.element_size(), _ALIGN) for t in initial.values())
        return _round_up(_FLAG_BYTES + sum(sizes), _PAGE) * clients

    def _row(self, client: int) -> Tensor:
        return self._bytes[client * self.row_bytes : (client + 1) * self.row_bytes]

    def touched(self, client: int) -> bool:
        """Whether this client's row differs, or may differ, from the initial tensors."""
        return bool(self._row(client)[0])

    def open(self, client: int) -> dict[str, Tensor]:
        """A client's tensors, as views into the file: writing to them changes the client."""
        row = self._row(client)
        views = {}
        for name, field in self._fields.items():
            size = torch.Size(field.shape).numel() * field.dtype.itemsize
            views[name] = row[field.offset : field.offset + size].view(field.dtype).view(field.shape)
        if not row[0]:
            for name, view in views.items():
                view.copy_(self._initial[name])
            row[0] = 1
        return views

    def release(self, client: int) -> None:
        """Let the system drop a client's pages from this process; the file keeps them."""
        self._map.madvise(mmap.MADV_DONTNEED, client * self.row_bytes, self.row_bytes)

    def delete(self) -> None:
        """Remove the file. Views that are still open stay valid until they are gone."""
        if self._path.exists():
            os.unlink(self._path)

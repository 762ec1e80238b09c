"""Writing the files of a run: whole or not at all, on disk when said to be, and one line where it cannot be done."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from ..errors import WriteError

_CHUNK = 1 << 24


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a :class:`~spafl.errors.WriteError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} could not be written: {error.strerror or error}") from None


def write_file(path: Path, data: bytes) -> None:
    """Write a new file; it is on disk after :func:`sync`."""
    with writing(path), path.open("wb") as file:
        file.write(data)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on disk."""
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def write_together(files: Mapping[Path, str | bytes], remove: Iterable[Path] = ()) -> None:
    """Write files that take their names one after the other once all of them are on disk.

    Where a disk is full, nothing has changed.

    Args:
        files: text or bytes by path.
        remove: files that are removed before the first takes its name: the new ones make them wrong.
    """
    try:
        for path, content in files.items():
            with writing(path), _temporary(path).open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for path in remove:
            with writing(path):
                path.unlink(missing_ok=True)
        for path in files:
            with writing(path):
                os.replace(_temporary(path), path)
    except WriteError:
        for path in files:
            with suppress(OSError):
                _temporary(path).unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in files}:
        sync(folder)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    write_together({path: text})


def digest(data: bytes | memoryview) -> str:
    """Digest against damage, not against forgery: XXH3 with 128 bits, about 16 GB/s."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_of_file(path: Path) -> str:
    """:func:`digest` of a file's content, read in pieces."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()

"""What all file readers share: where the files are, and whether they are the published ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from .dataset import DataError


@dataclass(frozen=True)
class Source:
    """One published form of a data set.

    ``files`` are looked for in ``folders`` (relative to the root, first folder that has any of them wins, and must
    have all: parts of two data sets must never mix). ``url`` is where they are published.
    """

    files: tuple[str, ...]
    folders: tuple[str, ...]
    url: str

    def folder(self, root: Path) -> Path | None:
        """The first folder with any of the files; None without."""
        for folder in self.folders:
            if any((root / folder / file).is_file() for file in self.files):
                return root / folder
        return None


def check_root(name: str, root: Path | None, hint: str) -> Path:
    """``root`` if it is a folder; DataError otherwise. ``hint`` says what to put there."""
    if root is None:
        raise DataError(f"{name} needs a data root (the folder with its files): {hint}")
    if not root.is_dir():
        raise DataError(f"data root {root} is not a folder; {name} needs {hint}")
    return root


def one_line(error: Exception) -> str:
    """The text of ``error`` on one line, shortened: it may quote what a damaged or hostile file contains."""
    text = " ".join(str(error).split())
    return "".join(c for c in text if c.isprintable())[:200] or type(error).__name__


def missing(name: str, path: Path, hint: str) -> DataError:
    return DataError(f"{name}: {path} is missing: {hint}")


def read(path: Path, md5: str | None, url: str) -> bytes:
    """The bytes of ``path``, whose MD5 must be ``md5`` unless that is None.

    Raises:
        DataError: the file cannot be read, or is not the published one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; published at {url}") from error
    if md5 is not None:
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise DataError(f"{path}: MD5 {found} of {len(content)} bytes, published {md5}; fetch it again from {url}")
    return content

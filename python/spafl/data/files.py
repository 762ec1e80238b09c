"""What all file readers share: where the files are, how they are read, and whether they are the published ones.

Nothing a file says makes a reader allocate or unpack more than a stated limit, verified or not.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..errors import one_line
from .dataset import DataError

MAX_BYTES = 1 << 29  # unpacked, of any one file; the largest published one, CIFAR-100's archive, has 186 million
MAX_GZIP_MEMBERS = 100_000  # a file may be many gzip files in a row, and empty ones take time without making bytes

SYSTEM = (Path("/usr/share/datasets"),)  # where Debian's packages dataset-* put their files
OVERRIDE = "data.verify_checksums = false (verify_checksums=False) takes them as they are"

_CHUNK = 1 << 16


@dataclass(frozen=True)
class Source:
    """One published form of a data set.

    Attributes:
        files: looked for in ``folders`` (relative to a place); the first folder that has any of them wins, and must
            have all: parts of two data sets must never mix.
        urls: of what is to be fetched into ``folders[0]``.
        package: a Debian package that holds it.
    """

    files: tuple[str, ...]
    folders: tuple[str, ...]
    urls: tuple[str, ...]
    package: str | None = None

    def folder(self, place: Path) -> Path | None:
        """The first folder with any of the files; None without."""
        for folder in self.folders:
            if any((place / folder / file).is_file() for file in self.files):
                return place / folder
        return None

    def command(self, place: Path) -> str:
        """The one command that gets the files: the package where the system has packages, else into ``place``."""
        if self.package and shutil.which("apt-get"):
            return f"apt-get install {self.package}"
        folder, names = self.urls[0].rpartition("/")[0], [url.rpartition("/")[2] for url in self.urls]
        if len(names) == 1:
            return f"curl -fL --create-dirs -o {shlex.quote(str(place / names[0]))} {folder}/{names[0]}"
        target = shlex.quote(str(place / self.folders[0] / "#1"))
        return f"curl -fL --create-dirs -o {target} '{folder}/{{{','.join(names)}}}'"


def places(root: Path | None) -> list[Path]:
    """The folders that are searched for data files, in order: ``root``, ``$SPAFL_DATA``, ``./data``, the system's.

    Raises:
        DataError: ``root`` or ``$SPAFL_DATA`` is given and is no folder.
    """
    asked = [("data root", root)]
    if os.environ.get("SPAFL_DATA"):
        asked.append(("SPAFL_DATA", Path(os.environ["SPAFL_DATA"]).expanduser()))
    found: list[Path] = []
    for name, place in asked:
        if place is None:
            continue
        try:
            is_folder = place.is_dir()
        except (OSError, ValueError) as error:  # too long, or with a NUL
            raise DataError(f"{name} {str(place)!r} is not a usable path: {one_line(error)}") from None
        if not is_folder:
            raise DataError(f"{name} {place} is not a folder")
        found.append(place)
    return found + [place for place in (Path("data"), *SYSTEM) if place.is_dir()]


def missing(name: str, source: Source, root: Path | None, what: Path | None = None) -> DataError:
    """The answer where a data set, or ``what`` of it, is not there: the command that gets it."""
    searched = ", ".join(map(str, places(root))) or "any folder"
    problem = f"{what} is missing" if what else f"no {source.files[0]} in {searched}"
    return DataError(f"{name}: {problem}; get it with: {source.command(root or Path('data'))}")


def impostor(head: bytes) -> str | None:
    """What ``head``, the first bytes of a file, shows it to be instead of data; None if nothing is known."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<!--", b"<?xml")):
        return "a web page (HTML), not data: the download was answered with a page"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not data: run git lfs pull"
    return None


class Content:
    """A file's bytes, unpacked if it is a ``.gz``, read front to back and never more of them than asked for.

    Args:
        path: the file.

    Raises:
        DataError: it cannot be read, is a web page, is not gzip although it is called so, or goes on past
            :data:`MAX_BYTES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        """Bytes read so far, unpacked."""
        self.md5 = hashlib.md5(usedforsecurity=False)
        """Of the bytes read so far."""
        try:
            self._file = path.open("rb")
            head = self._file.read(512)
            self._file.seek(0)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        what = impostor(head)
        if what:
            self._file.close()
            raise DataError(f"{path}: {what}")
        self._kind = ".tar.gz" if path.name.endswith(".tar.gz") else "gzip file"
        self._pieces = self._unpacked() if path.suffix == ".gz" else self._plain()
        self._left = b""

    def __enter__(self) -> Content:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def take(self, n: int) -> bytes:
        """The next ``n`` bytes, fewer only at the end."""
        return b"".join(self._next(n))

    def take_array(self, n: int) -> bytearray:
        """As :meth:`take`, in memory that can be written to and that grows with what is there."""
        buffer = bytearray()
        for piece in self._next(n):
            buffer += piece
        return buffer

    def skip(self, n: int) -> int:
        """Pass over the next ``n`` bytes; how many there were."""
        return sum(len(piece) for piece in self._next(n))

    def _next(self, n: int) -> Iterator[bytes]:
        while n > 0:
            piece = self._left or next(self._pieces, b"")
            if not piece:
                return
            piece, self._left = piece[:n], piece[n:]
            if self.position + len(piece) > MAX_BYTES:
                raise DataError(f"{self.path}: goes on past the {MAX_BYTES} bytes that are read of one file")
            n -= len(piece)
            self.position += len(piece)
            self.md5.update(piece)
            yield piece

    def _read(self) -> bytes:
        try:
            return self._file.read(_CHUNK)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _plain(self) -> Iterator[bytes]:
        while piece := self._read():
            yield piece

    def _unpacked(self) -> Iterator[bytes]:
        """Pieces of at most a chunk, whatever a packed byte expands to; the checksum of each member is verified."""
        rest = self._read()
        for _ in range(MAX_GZIP_MEMBERS):
            unpack = zlib.decompressobj(wbits=31)
            while not unpack.eof:
                try:
                    piece = unpack.decompress(rest, _CHUNK)
                except zlib.error as error:
                    raise DataError(f"{self.path}: not a complete {self._kind}: {one_line(error)}") from error
                if piece:
                    yield piece
                elif not rest and not unpack.eof:
                    raise DataError(f"{self.path}: not a complete {self._kind}: it ends too early")
                if not unpack.eof:
                    rest = unpack.unconsumed_tail or self._read()
            rest = unpack.unused_data.lstrip(b"\0")  # zeros are padding
            while not rest:
                more = self._read()
                if not more:
                    return
                rest = more.lstrip(b"\0")
        raise DataError(f"{self.path}: consists of more than {MAX_GZIP_MEMBERS} gzip files")


def check_published(path: str, content_md5: str, length: int, published: str, url: str) -> None:
    """Raise DataError unless the MD5 of a file's unpacked bytes is the published one."""
    if content_md5 != published:
        raise DataError(
            f"{path}: MD5 {content_md5} of {length} bytes, published {published}; fetch it again from {url}, or "
            f"{OVERRIDE}"
        )


def read_whole(path: Path, limit: int = MAX_BYTES) -> bytes:
    """All bytes of a file, unpacked if it is a ``.gz``; DataError if there are more than ``limit``."""
    with Content(path) as content:
        raw = content.take(limit)
        if content.skip(1):
            raise DataError(f"{path}: more than {limit} bytes")
        return raw

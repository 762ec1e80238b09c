"""What was measured on GPUs, as data: one JSON file per device and subject, next to the module that reads it.

:mod:`~spafl_kernels.gpu.tables.choices`: how a layer runs.
:mod:`~spafl_kernels.gpu.tables.tiles`: with which tile sizes.
:mod:`~spafl_kernels.gpu.tables.engines`: whether a simulation runs there at all.
:mod:`~spafl_kernels.gpu.tables.classes`: which layers share times.
The environment variable ``SPAFL_TABLES`` names another folder to read from.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch

from ... import settings

FOLDER = pathlib.Path(__file__).parent


class Measured(Protocol):
    """What every table has: its device, how it was made, and entries that can be written as JSON."""

    @property
    def device(self) -> str: ...

    @property
    def made(self) -> Mapping[str, str]: ...

    def to_json(self) -> dict[str, Any]: ...


T = TypeVar("T", bound=Measured)


def file_name(device: str, subject: str) -> str:
    """Name of a device's file: its name in lower case, other characters than letters and digits as dashes."""
    words = "".join(c if c.isalnum() else " " for c in device.lower()).split()
    return f"{'-'.join(words)}.{subject}.json"


class Shelf(Generic[T]):
    """The tables of one subject, one per device.

    Args:
        subject: part of the file names.
        what: what a table is called in an error.
        format: number that a file must name as its format.
        parse: makes a table of device, ``made`` and entries; raises :class:`ValueError` with what is wrong.
        instead: the device whose table stands in for those of devices that have none; by default nothing does.
    """

    def __init__(
        self, subject: str, what: str, format: int, parse: Callable[[str, dict[str, str], dict[str, Any]], T],
        instead: str | None = None,
    ) -> None:  # fmt: skip
        self.subject, self.what, self.format, self._parse, self._instead = subject, what, format, parse, instead
        self._given: list[T] = []
        self.for_device, self.for_index = functools.cache(self._for_device), functools.cache(self._for_index)

    def load(self, path: pathlib.Path) -> T:
        """The table of a file.

        Raises:
            ValueError: the file does not hold one; the message names it and says what is wrong.
        """
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        try:
            found = data.get("format") if isinstance(data, dict) else data
            if not isinstance(data, dict) or found != self.format:
                raise ValueError(f"format must be {self.format}; got {found!r}")
            if not isinstance(data.get("device"), str) or not isinstance(data.get("entries"), dict):
                raise ValueError("it needs a device and entries")
            return self._parse(data["device"], data.get("made", {}), data["entries"])
        except ValueError as error:
            raise ValueError(f"{path} is not {self.what}: {error}") from None

    def contents(self, table: T) -> dict[str, Any]:
        """What the file of a table holds."""
        return {"format": self.format, "device": table.device, "made": dict(table.made), "entries": table.to_json()}

    def write(self, table: T, folder: pathlib.Path) -> pathlib.Path:
        """Write the file of a table; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_name(table.device, self.subject)
        path.write_text(json.dumps(self.contents(table), indent=1) + "\n")
        return path

    def _for_device(self, name: str) -> T | None:
        """The table of a device by its name, or None. Read once."""
        path = pathlib.Path(settings.text("SPAFL_TABLES") or FOLDER) / file_name(name, self.subject)
        return self.load(path) if path.is_file() else None

    def _for_index(self, index: int) -> T | None:
        """The table of the CUDA device with this index, that which stands in for it, or None."""
        return self.best_for(torch.cuda.get_device_name(index)) if torch.cuda.is_available() else None

    def best_for(self, name: str) -> T | None:
        """The table of a device, or that which stands in for it, whose ``device`` says so; None if there is neither."""
        table = self.for_device(name)
        if table is None and self._instead is not None and (other := self.for_device(self._instead)) is not None:
            return self._parse(f"{other.device}, which stands in for {name}", dict(other.made), other.to_json())
        return table

    def forget(self) -> None:
        """Read files anew from now on."""
        self.for_device.cache_clear()
        self.for_index.cache_clear()

    @contextlib.contextmanager
    def using(self, table: T) -> Iterator[None]:
        """Take this table, whatever the device, while the context is open."""
        self._given.append(table)
        try:
            yield
        finally:
            self._given.pop()

    def of(self, index: int) -> T | None:
        """The table for tensors of a CUDA device, by its index; negative: of no such device."""
        if self._given:
            return self._given[-1]
        return self.for_index(index) if index >= 0 else None

    def given(self) -> T | None:
        """The table of the innermost :meth:`using`, or None."""
        return self._given[-1] if self._given else None

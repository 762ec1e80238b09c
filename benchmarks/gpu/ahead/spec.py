"""One kernel and what it is compiled for, as JSON: made where the kernel is launched, read where it is compiled."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

HOPPER = GPUTarget("cuda", 90, 32)
# Options that say where something lies on this machine, or follow from the target.
LOCAL = ("extern_libs", "arch")


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """A kernel by module and name, and its specialisation.

    ``signature``: type of every argument by name. ``constants`` and ``attributes``: values of compile-time arguments
    and facts about the others, as pairs of a path (position of the argument, then places inside tuples) and a value; a
    number type of Triton is ``{"dtype": name}``, a tuple a list. ``options``: those of the compiler that differ
    from its defaults.
    """

    module: str
    name: str
    signature: Mapping[str, Any]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], Any], ...]
    options: Mapping[str, Any]

    @property
    def text(self) -> str:
        """One line of JSON; equal specs have equal text."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_text(line: str) -> Spec:
        """Raises :class:`ValueError` for a line that is not a spec."""
        try:
            f = json.loads(line)
            constants, attributes = (
                tuple((tuple(path), value) for path, value in f[name]) for name in ("constants", "attributes")
            )
            signature = _tuples(f["signature"])
            return Spec(f["module"], f["name"], signature, constants, attributes, f["options"])
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"not a kernel specification ({error}): {line[:80]}") from None

    @staticmethod
    def of(source: ASTSource, options: Mapping[str, Any], target: GPUTarget) -> Spec:
        """That of a source and the options it is compiled with.

        Raises:
            ValueError: a compile-time argument that cannot be written down.
        """
        spec = Spec(
            source.fn.__module__,
            source.fn.__name__,
            dict(source.signature),
            tuple((path, _written(value)) for path, value in source.constants.items()),
            tuple((path, value) for path, value in source.attrs.items()),
            _changed(options, target),
        )
        again = Spec.from_text(spec.text)
        written = again.source()
        # The hash does not know the order of arguments, which launching stubs follow.
        if written.hash() != source.hash() or list(written.signature) != list(source.signature):
            raise ValueError(f"{spec.name}: what was written down is another kernel: {spec.text}")
        return again

    def source(self) -> ASTSource:
        """What Triton compiles. Imports the module of the kernel."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        constants = {path: _read(value) for path, value in self.constants}
        return ASTSource(kernel, dict(self.signature), constants, dict(self.attributes))


def _written(value: Any) -> Any:
    if isinstance(value, tl.dtype):
        return {"dtype": value.name}
    if isinstance(value, tuple):
        return [_written(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a compile-time argument of type {type(value).__name__} cannot be written down: {value!r}")


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_read(entry) for entry in value)
    return tl.dtype(value["dtype"]) if isinstance(value, dict) else value


def _tuples(value: Any) -> Any:
    """Lists of JSON as the tuples they were; mappings keep their kind."""
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def _changed(options: Mapping[str, Any], target: GPUTarget) -> dict[str, Any]:
    """Options that differ from the defaults. ``options`` may hold other entries, as a kernel's metadata does."""
    stock = make_backend(target).parse_options({}).__dict__
    return {k: options[k] for k, v in stock.items() if k in options and k not in LOCAL and _tuples(options[k]) != v}


def write(specs: Iterable[Spec], path: pathlib.Path) -> None:
    """One line each, sorted, so that the same kernels give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in sorted({spec.text for spec in specs})))


def read(path: pathlib.Path) -> list[Spec]:
    """Raises :class:`ValueError` with file and line for what is not a spec."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(Spec.from_text(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return found

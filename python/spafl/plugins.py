"""What a user brings along, by import path: ``module:name``, found, imported and called with their errors explained.

The current folder is on the path. Whatever goes wrong is one sentence that names file and line of the user's code.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from .checked import mistaken, short
from .errors import UserError


@dataclass(frozen=True)
class Code:
    """Which modules may be imported because a configuration names them."""

    everything: bool = True
    modules: frozenset[str] = frozenset()

    def allows(self, path: str) -> bool:
        return self.everything or module_of(path) in self.modules

    @staticmethod
    def only(modules: Iterable[str]) -> Code:
        """These modules, or those of these import paths, alone."""
        return Code(False, frozenset(map(module_of, modules)))


SETTINGS = ("model.name", "data.name", "partition.scheme", "algorithm.name")
"""Where a configuration can name code, beside the entries of ``callbacks``, on which no result depends."""


def named(raw: Mapping[str, Any]) -> dict[str, str]:
    """The import paths in nested tables, by the setting that names each; nothing is imported."""
    found = {}
    for setting in SETTINGS:
        section, _, key = setting.partition(".")
        table = raw.get(section)
        name = table.get(key) if isinstance(table, Mapping) else None
        if isinstance(name, str) and is_path(name):
            found[setting] = name
    callbacks = raw.get("callbacks")
    for at, entry in enumerate(callbacks if isinstance(callbacks, list | tuple) else ()):
        name = entry.get("name") if isinstance(entry, Mapping) else entry
        if isinstance(name, str) and is_path(name):
            found[f"callbacks.{at}.name"] = name
    return found


def path_of(where: str, value: Any) -> str:
    """The import path of a class or function that is given itself, from Python.

    Raises:
        UserError: it cannot be found again by its name (it is local to a function, say).
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not callable(value) or not module or not name:
        raise UserError(f"{where}: a name, or a class or function, is needed; got {short(value)}")
    path = f"{module}:{name}"
    if "<" in name or find(where, path) is not value:
        raise UserError(f"{where}: {place(value)} cannot be found again as {path!r}; define it at the top of a module")
    return path


def is_path(name: str) -> bool:
    """Whether a name in a configuration means code to import rather than something registered."""
    return ":" in name


def module_of(path: str) -> str:
    """The module an import path names."""
    return path.partition(":")[0]


def find(where: str, path: str) -> Any:
    """The object at an import path.

    Args:
        where: the setting that names it, for messages.
        path: ``package.module:name``, or ``package.module:name.attribute``.

    Raises:
        UserError: not such a path, a module that is missing or fails, or one without that name.
    """
    module_name, _, attributes = path.partition(":")
    parts = [*module_name.split("."), *attributes.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise UserError(f"{where}: an import path has the form module:name; got {short(path)}")
    module = _import(where, module_name)
    found: Any = module
    for name in attributes.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            near = difflib.get_close_matches(name, [n for n in dir(found) if not n.startswith("_")], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: {_place(module)} has no {name!r}{hint}") from None
    return found


def _import(where: str, name: str) -> Any:
    if name == "__main__" and _is_console(sys.modules["__main__"]):
        raise UserError(
            f"{where}: classes of a notebook or script (__main__) exist only in its own process; "
            "put the code into a file and name it by its module"
        )
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise UserError(
                f"{where}: module {name!r} cannot be imported: there is no module {error.name!r} in {here}, nor on "
                "Python's path (PYTHONPATH)"
            ) from None
        raise UserError(f"{where}: module {name!r} cannot be imported: {explain(error)}") from None
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise UserError(f"{where}: module {name!r} cannot be imported: {explain(error)}") from None


def _is_console(main: Any) -> bool:
    """Whether ``__main__`` is this package's command rather than a user's script or notebook."""
    spec = getattr(main, "__spec__", None)
    name = spec.name if spec is not None else Path(getattr(main, "__file__", None) or "").stem
    return name.split(".")[0] == "spafl"


def _place(found: Any) -> str:
    """An object's name, with file and line where there are any."""
    name = getattr(found, "__qualname__", None) or getattr(found, "__name__", None) or type(found).__name__
    try:
        file = inspect.getsourcefile(found)
        line = inspect.getsourcelines(found)[1] if not inspect.ismodule(found) else 0
    except (TypeError, OSError):
        return str(name)
    return f"{name} ({file}:{line})" if line else f"{name} ({file})"


def place(found: Any) -> str:
    """As messages name a user's object: ``Net (mynet.py:3)``; an instance by its class."""
    return _place(found if inspect.isroutine(found) or inspect.isclass(found) else type(found))


def explain(error: BaseException) -> str:
    """An exception of a user's code on one line, with the last file and line that are the user's."""
    text = " ".join(str(error)[:1000].split())
    text = f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    own = Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename, own)]
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text


def _is_library(file: str, own: Path) -> bool:
    parts = Path(file).parts
    return (
        file.startswith("<frozen")
        or "site-packages" in parts
        or Path(file).is_relative_to(own)
        or any(file.startswith(prefix) for prefix in _STANDARD)
    )


_STANDARD = {str(Path(inspect.getsourcefile(module) or "").parent) + "/" for module in (inspect, importlib)}


def call(where: str, function: Callable[..., Any], given: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Call a user's ``function`` with its options and with what it takes of what is ``given``.

    Args:
        where: the setting that names it, for messages.
        given: by parameter name; a parameter that has none of these names must be an option or have a default.
        options: the user's own, checked against the signature: unknown, missing and mistaken ones are refused.

    Raises:
        UserError: options that do not fit, or whatever the function raised.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise UserError(f"{where}: {place(function)} cannot be called") from None
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    arguments = {name: value for name, value in given.items() if name in named}
    for name, value in check_options(where, function, options, named, open_ended, given).items():
        arguments[name] = value
    missing = [n for n, p in named.items() if p.default is p.empty and n not in arguments]
    missing += [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if missing:
        raise UserError(
            f"{where}: {place(function)} needs {missing[0]!r}, which is neither an option nor one of what it is given: "
            f"{', '.join(given)}"
        )
    try:
        return function(**arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {place(function)} failed: {explain(error)}") from None


def check_options(
    where: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    named: Mapping[str, inspect.Parameter],
    open_ended: bool,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The options a user's function gets: as they are, or, where it has one ``options`` parameter of a pydantic model,
    as that model."""
    hints = _hints(function)
    model = hints.get("options")
    section = where.rpartition(".")[0] + ".options"
    if "options" in named and isinstance(model, type) and issubclass(model, BaseModel):
        try:
            return {"options": model.model_validate(dict(options))}
        except ValidationError as caught:
            error = caught.errors()[0]
            path = ".".join([section, *map(str, error["loc"])])
            raise UserError(f"{path}: {error['msg']}; got {short(error['input'])} for {place(model)}") from None
    for name, value in options.items():
        if name in given or (name not in named and not open_ended):
            takes = [n for n in named if n not in given]
            near = difflib.get_close_matches(name, takes, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            known = f"its options: {', '.join(takes)}" if takes else "it has none"
            raise UserError(f"{section}: {place(function)} has no option {name!r}{hint}; {known}")
        kind = hints.get(name)
        if kind is None and name in named and type(named[name].default) in (bool, int, float, str):
            kind = type(named[name].default)
        if problem := mistaken(kind, value) or _unfit(kind, value):
            raise UserError(f"{section}.{name}: {problem}, as {place(function)} says; got {short(value)}")
    return dict(options)


def _unfit(kind: Any, value: Any) -> str | None:
    """Why ``value`` is not of a hinted kind; None if it is, or if the hint cannot be checked."""
    if kind is None:
        return None
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as caught:
        message = caught.errors()[0]["msg"]
        return message[0].lower() + message[1:]
    except PydanticUserError:  # a class that pydantic does not know
        return None
    return None


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    import typing

    target: Any = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    try:
        return typing.get_type_hints(target)
    except Exception:  # hints may name what is imported for type checkers only
        return {}

"""Modules of kernels import PyTorch, compiling them does not need it: where it is missing, names that do nothing."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import types
from collections.abc import Sequence
from typing import Any


class _Anything(type):
    """Its classes have every attribute, take every argument and leave what they decorate as it is."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (), {})
        setattr(cls, name, made)
        return made

    def __call__(cls, *args: Any, **named: Any) -> Any:
        return args[0] if len(args) == 1 and isinstance(args[0], types.FunctionType) else cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, item: Any) -> Any:
        return cls


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.partition(".")[0] != "torch":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        root = _Anything(spec.name, (), {})

        class Module(types.ModuleType):
            def __getattr__(self, name: str) -> Any:
                return getattr(root, name)

        return Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def without_torch() -> bool:
    """Make the modules of kernels importable; False, and nothing is done, where PyTorch is there.

    The package of the library is a bare folder then: only the modules that kernels need are imported.
    """
    if "torch" in sys.modules or importlib.util.find_spec("torch") is not None:
        return False
    sys.meta_path.append(_Finder())
    bare = types.ModuleType("spafl_kernels")
    bare.__path__ = [str(pathlib.Path(__file__).resolve().parents[3] / "spafl_kernels")]
    sys.modules["spafl_kernels"] = bare
    return True

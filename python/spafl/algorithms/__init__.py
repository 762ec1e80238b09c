"""Federated algorithms, one file each, and the registry that finds them by name."""

from __future__ import annotations

import difflib
import importlib

from .base import Algorithm, BaseOptions, ServerState, Training, Upload
from .client import Client, Evaluation, LocalTraining, Samples
from .fedavg import FedAvg
from .local import Local
from .spafl import SpaFL

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "BaseOptions",
    "Client",
    "Evaluation",
    "LocalTraining",
    "Samples",
    "ServerState",
    "Training",
    "Upload",
    "find_algorithm",
    "register_algorithm",
]

ALGORITHMS: dict[str, type[Algorithm]] = {"spafl": SpaFL, "fedavg": FedAvg, "local": Local}


def register_algorithm(name: str, algorithm: type[Algorithm]) -> None:
    """Make ``algorithm.name = "name"`` available to runs of this process."""
    if name in ALGORITHMS:
        raise ValueError(f"an algorithm named {name!r} exists already")
    ALGORITHMS[name] = algorithm


def find_algorithm(name: str) -> type[Algorithm]:
    """The algorithm of a registered name, or of an import path ``package.module:Class``.

    Raises:
        ValueError: unknown name (the nearest known one is named), or a path that does not lead to an Algorithm.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"algorithm {name!r} cannot be imported: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Algorithm)):
            raise ValueError(f"algorithm {name!r} is not a subclass of spafl.algorithms.Algorithm")
        return found
    near = difflib.get_close_matches(name, ALGORITHMS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown algorithm {name!r}; known: {', '.join(ALGORITHMS)}{hint}")

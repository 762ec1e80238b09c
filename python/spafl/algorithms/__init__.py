"""Federated algorithms, one file each, and the registry that finds them by name."""

from __future__ import annotations

import difflib
import inspect

from ..checked import short
from ..errors import UserError
from ..plugins import find, is_path, place
from .base import Algorithm, BaseOptions, ServerState, Training, Upload
from .client import Client, Evaluation, LocalTraining, Samples
from .ditto import Ditto
from .fedavg import FedAvg
from .feddst import FedDST
from .fedp3 import FedP3
from .fedper import FedPer
from .fedpm import FedPM
from .fedprox import FedProx
from .fedspa import FedSpa
from .fjord import FjORD
from .heterofl import HeteroFL
from .local import Local
from .objective import Loss, Objective
from .scaffold import Scaffold
from .spafl import SpaFL

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "BaseOptions",
    "Client",
    "Evaluation",
    "LocalTraining",
    "Loss",
    "Objective",
    "Samples",
    "ServerState",
    "Training",
    "Upload",
    "find_algorithm",
    "register_algorithm",
]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "spafl": SpaFL,
    "fedavg": FedAvg,
    "local": Local,
    "fedprox": FedProx,
    "ditto": Ditto,
    "fedper": FedPer,
    "scaffold": Scaffold,
    "fedpm": FedPM,
    "heterofl": HeteroFL,
    "fjord": FjORD,
    "feddst": FedDST,
    "fedspa": FedSpa,
    "fedp3": FedP3,
}


def register_algorithm(name: str, algorithm: type[Algorithm]) -> None:
    """Make ``algorithm.name = "name"`` available to runs of this process."""
    if name in ALGORITHMS:
        raise ValueError(f"an algorithm named {name!r} exists already")
    ALGORITHMS[name] = algorithm


def find_algorithm(name: str) -> type[Algorithm]:
    """The algorithm of a registered name, or of an import path ``package.module:Class``.

    Raises:
        ValueError: unknown name (the nearest known one is named).
        UserError: a path that does not lead to an Algorithm, with file and line of the user's code.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if is_path(name):
        found = find("algorithm.name", name)
        if not (isinstance(found, type) and issubclass(found, Algorithm)):
            raise UserError(f"algorithm.name: {place(found)} is not a subclass of spafl.algorithms.Algorithm")
        if not issubclass(found.Options, BaseOptions):
            raise UserError(f"algorithm.name: Options of {place(found)} must derive from spafl.algorithms.BaseOptions")
        if inspect.isabstract(found):
            lacking = ", ".join(sorted(found.__abstractmethods__))
            raise UserError(f"algorithm.name: {place(found)} does not define {lacking}")
        return found
    near = difflib.get_close_matches(name, ALGORITHMS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown algorithm {short(name)}; known: {', '.join(ALGORITHMS)}{hint}")

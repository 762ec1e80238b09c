"""Callbacks by name. Their modules are imported when a run asks for them: they need packages of their own."""

from __future__ import annotations

from collections.abc import Callable

from .base import Callback

CALLBACKS: dict[str, str | Callable[..., Callback]] = {
    "csv": "spafl.callbacks.csv_files:CSV",
    "tensorboard": "spafl.callbacks.tensorboard:TensorBoard",
    "wandb": "spafl.callbacks.wandb:WandB",
}


def register_callback(name: str, make: Callable[..., Callback]) -> None:
    """Make ``[[callbacks]] name = "name"`` mean ``make(**options)`` for the rest of the process.

    Raises:
        ValueError: the name is taken.
    """
    if name in CALLBACKS:
        raise ValueError(f"a callback named {name!r} exists already")
    CALLBACKS[name] = make

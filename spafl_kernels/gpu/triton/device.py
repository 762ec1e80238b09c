"""Launches go to the device of the tensors, which need not be the current one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def device_of(t: Tensor) -> contextlib.AbstractContextManager[None]:
    """While open, the device of ``t`` is the current one. Nothing is asked or set where there is one GPU or none."""
    return torch.cuda.device_of(t) if torch.cuda.device_count() > 1 else contextlib.nullcontext()


def on_device_of_first(launcher: Callable[_P, _R]) -> Callable[_P, _R]:
    """The launcher, run on the device of its first argument: Triton launches on the current device and its stream."""

    @functools.wraps(launcher)
    def launch(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = args[0] if args else next(iter(kwargs.values()))
        assert isinstance(first, Tensor)
        with device_of(first):
            return launcher(*args, **kwargs)

    return launch

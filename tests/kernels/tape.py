"""A stand-in for CUDA graphs on a CPU: operators are noted with the tensors they work on, and run again at a replay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")


class _Notes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.undo: list[tuple[Tensor, Tensor]] = []
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(word in str(func) for word in WAITS):
            raise RuntimeError(f"{func} waits for the device")
        # Not by the schema: batch_norm writes its running statistics without saying so.
        for t in tree_flatten((args, kwargs))[0]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.known.add(t.untyped_storage().data_ptr())
                self.undo.append((t, t.clone()))
        out = func(*args, **kwargs)
        self.known |= {t.untyped_storage().data_ptr() for t in tree_flatten(out)[0] if isinstance(t, Tensor)}
        self.calls.append((func, args, kwargs, out))
        return out


class _Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in WAITS):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Tape:
    """A :data:`spafl_kernels.gpu.graphs.Recorder`: numbers that an operator was given are those of the recording."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.watches = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        with _Waits() as seen:
            found: list[str] = []
            try:
                yield found
            finally:
                found += seen.found if self.watches else []

    def __call__(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        generator = torch.get_rng_state()
        notes = _Notes()
        try:
            with notes:
                result = body()
        finally:  # recording runs nothing
            with torch.no_grad():
                for tensor, value in reversed(notes.undo):
                    tensor.data.copy_(value)
            torch.set_rng_state(generator)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for func, args, kwargs, out in notes.calls:
                    _again(func, args, kwargs, out)

        return replay, result


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    writes = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
    args, kwargs = tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs))
    new = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, Tensor)]
    for mine, now in zip(writes, new, strict=True):
        if mine.data_ptr() != now.data_ptr():
            mine.detach().copy_(now)

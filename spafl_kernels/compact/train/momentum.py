"""Momentum buffers that are the trainer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

__all__ = ["OwnMomentum"]


class OwnMomentum(Mapping[str, Tensor]):
    """Full-size buffers by parameter name, completed when somebody looks at them, which most callers never do.

    Args:
        tensors: the buffers.
        complete: writes the state of the finished training into them; called at most once.
    """

    def __init__(self, tensors: dict[str, Tensor], complete: Callable[[], None]) -> None:
        self._tensors = tensors
        self._complete: Callable[[], None] | None = complete
        self._expired = False

    def expire(self) -> None:
        """The buffers are needed for another training."""
        self._complete, self._expired = None, True

    def __getitem__(self, name: str) -> Tensor:
        if self._expired:
            raise RuntimeError("the trainer's own momentum was overwritten by its next begin(); read it before")
        if self._complete is not None:
            complete, self._complete = self._complete, None
            complete()
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

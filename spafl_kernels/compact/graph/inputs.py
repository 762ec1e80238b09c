"""What a model is called with: which of the arguments are tensors, and all others as they are.

Tensors are the inputs of a program, in the order in which they stand. Numbers, strings and the like are a part of the
trace, as what ``forward`` says itself is: with others, the model is read anew.
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...training import Given, Unsupported

__all__ = ["ONE", "Form", "Input", "inputs_of", "usual_form"]

# Classes of tensors of which nothing but their numbers is to be known.
PLAIN: set[type] = {Tensor, nn.Parameter}
_VALUES = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Input:
    """A tensor among the arguments.

    Args:
        shape: of one sample, without the batch, if that is dimension 0 (``batched``); else the whole shape.
        strides: of the whole tensor, where its numbers do not lie one after another: what it is made into lies the same
            way mostly, and random numbers are drawn in that order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool = True
    strides: tuple[int, ...] | None = None

    def zeros(self, batch: int, device: torch.device) -> Tensor:
        shape = (batch, *self.shape) if self.batched else self.shape
        if self.strides is None:
            return torch.zeros(shape, dtype=self.dtype, device=device)
        size = 1 + sum((n - 1) * stride for n, stride in zip(shape, self.strides))
        return torch.zeros(max(size, 0), dtype=self.dtype, device=device).as_strided(shape, self.strides)

    def like(self, t: Tensor) -> Input:
        """The same for a tensor of another type."""
        return replace(self, dtype=t.dtype)


@dataclass(frozen=True)
class _Value:
    """An argument that is no tensor; those that read alike are the same."""

    kind: type
    text: str
    value: Any = field(compare=False)


class _Place(enum.Enum):
    """Where a tensor is; the same in every process."""

    TENSOR = enum.auto()


_TENSOR = _Place.TENSOR


@dataclass(frozen=True)
class Form:
    """How a model is called; ``args`` and ``kwargs`` with tensors left out."""

    args: Hashable
    kwargs: Hashable

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Form, list[Tensor]]:
        """The form of a call, and its tensors; raises Unsupported for arguments of which nothing is known."""
        if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
            return ONE, [_plain(args[0])]
        tensors: list[Tensor] = []
        return cls(_form(args, tensors), _form(kwargs, tensors)), tensors

    def call(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``args`` and ``kwargs`` with these tensors."""
        order = iter(tensors)
        return _filled(self.args, order), _filled(self.kwargs, order)

    def given(self, tensors: Sequence[Any]) -> Given:
        """A trainer's batch with these tensors, whose model is called by place alone, or by name alone."""
        args, kwargs = self.call(tensors)
        return kwargs or args

    def names(self, forward: Callable[..., Any]) -> list[str]:
        """A name for every tensor."""
        kinds, found = inspect.Parameter, []
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        places = [p.name for p in parameters if p.kind not in (kinds.VAR_KEYWORD, kinds.KEYWORD_ONLY)]

        def walk(node: Any, name: str) -> None:
            if node is _TENSOR:
                found.append(name)
            elif not isinstance(node, _Value):
                for key, part in zip(node[1], node[2]):
                    walk(part, f"{name}_{key}" if name else str(key))

        for k, part in enumerate(self.args[2]):  # type: ignore[index]
            walk(part, places[k] if k < len(places) else f"{places[-1] if places else 'input'}_{k}")
        walk(self.kwargs, "")
        names: list[str] = []
        for name in found:
            name = re.sub(r"\W|^(?=\d)", "_", name)
            names.append(name if name not in names and name != "self" else f"{name}_{len(names)}")
        return names


def _form(value: Any, tensors: list[Tensor]) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        tensors.append(_plain(value))
        return _TENSOR
    if kind is dict:
        return dict, tuple(value), tuple([_form(v, tensors) for v in value.values()])
    if kind in (tuple, list):
        return kind, range(len(value)), tuple([_form(v, tensors) for v in value])
    if kind in _VALUES:
        return _Value(kind, repr(value), value)
    raise Unsupported(f"it was called with a {kind.__name__}; tensors, numbers, strings and lists of such are known")


def _plain(t: Tensor) -> Tensor:
    """A tensor of a class of its own may do anything when a function is called with it, or have no numbers at all."""
    if type(t) not in PLAIN:
        raise Unsupported(f"it was called with a {type(t).__name__}, a tensor of a class of its own")
    return t


def _filled(node: Any, tensors: Iterator[Any]) -> Any:
    if node is _TENSOR:
        return next(tensors)
    if isinstance(node, _Value):
        return node.value
    kind, keys, parts = node
    values = [_filled(part, tensors) for part in parts]
    return dict(zip(keys, values)) if kind is dict else kind(values)


_NOTHING = (dict, (), ())
ONE = Form((tuple, range(1), (_TENSOR,)), _NOTHING)


def usual_form(forward: Callable[..., Any]) -> Form:
    """How a model is called that takes one tensor; further arguments have their defaults. Raises Unsupported."""
    kinds = inspect.Parameter
    everything = list(inspect.signature(forward).parameters.values())[1:]
    named = [p for p in everything if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    required = [p for p in named if p.default is kinds.empty] or named[:1]
    if len(required) != 1:
        raise Unsupported(f"forward takes {len(required)} inputs; one is needed")
    if required[0].kind is kinds.KEYWORD_ONLY:
        return Form((tuple, range(0), ()), (dict, (required[0].name,), (_TENSOR,)))
    return ONE


def inputs_of(tensors: Sequence[Tensor]) -> tuple[tuple[Input, ...], int]:
    """What is known of the tensors of a call, and its batch: dimension 0 of the first that has one.

    A tensor is taken to be by sample if its dimension 0 is as large. That is a guess, with which the model may fail
    (see :func:`~spafl_kernels.compact.graph.follow.follow_inputs`); it is a part of what a program is kept for.
    """
    batch = next((len(t) for t in tensors if t.dim()), None)
    if batch is None:
        raise Unsupported("it was called without a tensor that has a dimension")
    return tuple([_input(t, batch) for t in tensors]), batch


def _input(t: Tensor, batch: int) -> Input:
    shape = tuple(t.shape)
    by_sample = len(shape) > 0 and shape[0] == batch
    return Input(shape[1:] if by_sample else shape, t.dtype, by_sample, _strides(t))


def _strides(t: Tensor) -> tuple[int, ...] | None:
    """None where they are those of a new tensor, but for gaps between samples."""
    if t.layout is not torch.strided or not t.dim():
        return None
    strides, expected = t.stride(), 1
    for k in range(t.dim() - 1, 0, -1):
        if strides[k] != expected:
            return strides
        expected *= t.shape[k]
    return strides if strides[0] < expected and len(t) > 1 else None

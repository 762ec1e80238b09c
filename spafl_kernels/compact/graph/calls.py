"""Calls of functions and methods with all their arguments by name, or not recognised at all.

A kind of operation lists every argument it has. A call with another argument, one given twice, or a tensor where a
number belongs is *not* recognised: it runs as it stands, at full width.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

__all__ = ["Bound", "Call", "Signature", "is_literal", "target_of", "writes_in_place", "written_at_"]

_REQUIRED = object()


def target_of(node: fx.Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


class Signature:
    """Names of all arguments a call may have, in their places.

    Args:
        text: the names, with spaces between them; the first is the tensor.
        defaults: of those that need not be given.
    """

    def __init__(self, text: str, **defaults: Any) -> None:
        self.arguments = {name: defaults.get(name, _REQUIRED) for name in text.split()}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Every argument that was given or has a default; None if they do not fit."""
        names = list(self.arguments)
        if len(args) > len(names):
            return None
        given = dict(zip(names, args))
        if kwargs.keys() & given.keys() or not kwargs.keys() <= set(names):
            return None
        values = {**self.arguments, **given, **kwargs}
        if any(v is _REQUIRED for v in values.values()) or values.get("out") is not None:
            return None
        return values


@dataclass
class Call:
    """A call whose arguments are known by name.

    Args:
        node: the node.
        target: the function, or the name of the method.
        values: the arguments; empty where the kind has no signature for ``target``.
        elsewhere: those in the second pattern of the trace, if they are others.
    """

    node: fx.Node
    target: Any
    values: dict[str, Any]
    elsewhere: dict[str, Any] | None = None

    @classmethod
    def of(cls, node: fx.Node, signature: Signature | None) -> Call | None:
        """None if the arguments do not fit."""
        if signature is None:
            return cls(node, target_of(node), {}, {} if "otherwise" in node.meta else None)
        values = signature.bind(node.args, node.kwargs)
        elsewhere = None
        if values is not None and "otherwise" in node.meta:
            elsewhere = signature.bind(*node.meta["otherwise"])
            values = None if elsewhere is None else values
        return None if values is None else cls(node, target_of(node), values, elsewhere)

    def literals(self, *tensors: str) -> dict[str, Any] | None:
        """All arguments but ``tensors`` (and whether to work in place); None if another node is among them."""
        rest = {k: v for k, v in self.values.items() if k not in (*tensors, "inplace", "out")}
        return rest if is_literal(list(rest.values())) else None


def bound(function: Callable[..., Any], rest: dict[str, Any]) -> Callable[..., Any]:
    """``function`` with all arguments of a call but its first."""
    return Bound(function, rest) if rest else function


class Bound:
    """A function with all its arguments but the first."""

    def __init__(self, function: Callable[..., Any], rest: dict[str, Any]) -> None:
        self.function, self.rest = function, rest

    def __call__(self, x: Any) -> Any:
        return self.function(x, **self.rest)


def is_literal(value: Any) -> bool:
    """Whether no other node is in it."""
    if isinstance(value, (tuple, list)):
        return all(map(is_literal, value))
    return not isinstance(value, fx.Node)


def written_at_(x: Any, index: Any, value: Any) -> Any:
    """``x[index] = value``, which gives back what it has written to, as PyTorch's own writes do."""
    x[index] = value
    return x


_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.iconcat,
}  # fmt: skip


def writes_in_place(node: fx.Node, module: Any) -> bool:
    """Whether a node may write to its first argument and give it back."""
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    target: Any = node.target
    if target in _IN_PLACE_OPERATORS:
        return True
    name = getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    for args, kwargs in ((node.args, node.kwargs), node.meta.get("otherwise", ((), {}))):
        if kwargs.get("inplace"):
            return True
        try:
            parameters = list(inspect.signature(target).parameters)
        except (TypeError, ValueError):  # a builtin, which has no such argument
            continue
        if "inplace" in parameters and len(args) > (at := parameters.index("inplace")) and args[at]:
            return True
    return False

"""Calls of functions and methods with all their arguments by name, or not recognised at all.

An operation that the engine computes in its own way is listed here with every argument it has. A call with another
argument, one given twice, or a tensor where a number belongs is *not* recognised: it runs as it stands, at full width.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

__all__ = ["Bound", "bind", "bound", "is_literal", "target_of", "writes_in_place"]

_REQUIRED = object()


def target_of(node: fx.Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


def _arguments(text: str, **defaults: Any) -> dict[str, Any]:
    return {name: defaults.get(name, _REQUIRED) for name in text.split()}


_POOL = _arguments(
    "input kernel_size stride padding dilation ceil_mode return_indices",
    stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False,
)  # fmt: skip
_AVERAGE = _arguments(
    "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None,
)  # fmt: skip
_SIGNATURES: dict[str, dict[str, Any]] = {
    "relu": _arguments("input inplace", inplace=False),
    "relu6": _arguments("input inplace", inplace=False),
    "silu": _arguments("input inplace", inplace=False),
    "hardswish": _arguments("input inplace", inplace=False),
    "mish": _arguments("input inplace", inplace=False),
    "tanh": _arguments("input"),
    "softsign": _arguments("input"),
    "gelu": _arguments("input approximate", approximate="none"),
    "leaky_relu": _arguments("input negative_slope inplace", negative_slope=0.01, inplace=False),
    "elu": _arguments("input alpha inplace", alpha=1.0, inplace=False),
    "max_pool2d": _POOL,
    "avg_pool2d": _AVERAGE,
    "adaptive_avg_pool2d": _arguments("input output_size"),
    "adaptive_max_pool2d": _arguments("input output_size return_indices", return_indices=False),
    "mean": _arguments("input dim keepdim dtype out", dim=None, keepdim=False, dtype=None, out=None),
    "flatten": _arguments("input start_dim end_dim", start_dim=0, end_dim=-1),
    "contiguous": _arguments("input memory_format", memory_format=None),
    "clone": _arguments("input memory_format", memory_format=None),
    "dropout": _arguments("input p training inplace", p=0.5, training=True, inplace=False),
    "add": _arguments("input other alpha out", alpha=1, out=None),
    "cat": _arguments("tensors dim out", dim=0, out=None),
    "chunk": _arguments("input chunks dim", dim=0),
    "size": _arguments("input dim", dim=None),
}

_WORDS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", F.relu_: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish", F.mish: "mish", F.tanh: "tanh", torch.tanh: "tanh",
    "tanh": "tanh", F.softsign: "softsign", F.gelu: "gelu", F.leaky_relu: "leaky_relu", F.elu: "elu",
    F.max_pool2d: "max_pool2d", torch.max_pool2d: "max_pool2d", F.avg_pool2d: "avg_pool2d",
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d", F.adaptive_max_pool2d: "adaptive_max_pool2d",
    "mean": "mean", torch.mean: "mean", "flatten": "flatten", torch.flatten: "flatten", "contiguous": "contiguous",
    "clone": "clone", torch.clone: "clone", F.dropout: "dropout", operator.add: "add", operator.iadd: "add",
    torch.add: "add", "add": "add", "add_": "add", torch.cat: "cat", torch.concat: "cat", torch.concatenate: "cat",
    "chunk": "chunk", torch.chunk: "chunk", "size": "size",
}  # fmt: skip
# In positions, what some functions do not take although others of their word do.
_WITHOUT: dict[Any, set[str]] = {torch.max_pool2d: {"return_indices"}, torch.relu: {"inplace"}}


def bind(node: fx.Node, otherwise: bool = False) -> tuple[str, dict[str, Any]] | None:
    """The word of a call, and every argument it has or takes by default; None if the call is not recognised.

    ``otherwise``: in the second pattern of the trace.
    """
    target = target_of(node)
    word = _WORDS.get(target) if isinstance(target, (str, Callable)) else None  # type: ignore[arg-type]
    if word is None:
        return None
    args, kwargs = node.meta["otherwise"] if otherwise and "otherwise" in node.meta else (node.args, node.kwargs)
    signature = _SIGNATURES[word]
    names = [n for n in signature if n not in _WITHOUT.get(target, ())]
    if len(args) > len(names):
        return None
    given = dict(zip(names, args))
    if kwargs.keys() & given.keys() or not kwargs.keys() <= set(names):
        return None
    given |= kwargs
    values = {n: given.get(n, signature[n]) for n in signature}
    if any(v is _REQUIRED for v in values.values()) or values.get("out") is not None:
        return None
    return word, values


def bound(word: str, values: dict[str, Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with all arguments of a call but its first and whether it works in place."""
    rest = {k: v for k, v in values.items() if k not in ("input", "inplace", "return_indices", "out")}
    if not rest:
        return function
    return Bound(word, function, rest)


class Bound:
    """A function with all its arguments but the first."""

    def __init__(self, word: str, function: Callable[..., Any], rest: dict[str, Any]) -> None:
        self.word, self.function, self.rest = word, function, rest

    def __call__(self, x: Any) -> Any:
        return self.function(x, **self.rest)


def is_literal(value: Any) -> bool:
    """Whether no other node is in it."""
    if isinstance(value, (tuple, list)):
        return all(map(is_literal, value))
    return not isinstance(value, fx.Node)


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

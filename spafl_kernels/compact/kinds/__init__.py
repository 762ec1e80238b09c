"""The kinds of operation that the engine knows, one class each; a file that is put here is found.

What no kind recognises is an operation of the user's: a :class:`~.whole.Whole`, which runs as it stands, at full width.
There is no other default. Two kinds that claim one module or function are an error, when they are loaded.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from ...computed import plain_kind
from ...layers import ThresholdLayer
from ...training import Unsupported
from ..graph.calls import Call, Signature, target_of
from .base import Op, kinds_of
from .ends import Input, Output
from .whole import Constant, Whole

if TYPE_CHECKING:
    from ..graph.flow import Flow

__all__ = ["KINDS", "recognise"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

KINDS: tuple[type[Op], ...] = tuple(k for k in kinds_of(Op) if not inspect.isabstract(k) and hasattr(k, "kind"))  # type: ignore[type-abstract]

_MODULES: dict[type, type[Op]] = {}
_CALLS: dict[Any, tuple[type[Op], Signature | None]] = {}
for _kind in KINDS:
    for _key in (*vars(_kind).get("modules", ()), *vars(_kind).get("calls", ())):
        if _key in _MODULES or _key in _CALLS:
            raise TypeError(f"{_kind.__name__} claims {_key}, which another kind has")
        if isinstance(_key, type):
            _MODULES[_key] = _kind
        else:
            _CALLS[_key] = _kind, _kind.calls[_key]

# Their results depend on how a tensor lies in memory, which is not the engine's to keep.
_OF_MEMORY = {
    "as_strided",
    "stride",
    "storage_offset",
    "is_contiguous",
    "data_ptr",
    "untyped_storage",
    "storage",
    "set_",
}


def recognise(node: fx.Node, flow: Flow) -> Op:
    """The operation that a node is, as far as that is known without its sources."""
    if node.op == "get_attr":
        return Constant.of_attribute(node, flow)
    if node.op == "call_module":
        return _of_module(node, flow)
    if node.op in ("placeholder", "output"):
        return Input(node) if node.op == "placeholder" else Output(node)
    target = target_of(node)
    if (target if isinstance(target, str) else getattr(target, "__name__", "")) in _OF_MEMORY:
        raise Unsupported(f"{node.name} asks how a tensor lies in memory")
    kind, signature = _CALLS.get(target, (None, None)) if isinstance(target, (str, Callable)) else (None, None)  # type: ignore[arg-type]
    call = None if kind is None else Call.of(node, signature)
    if kind is None or call is None or (call.elsewhere is not None and not kind.by_mode):
        return Whole(node)
    return kind.of_call(call, flow) or Whole(node)


def _of_module(node: fx.Node, flow: Flow) -> Op:
    m: Any = flow.model.get_submodule(str(node.target))
    name, grad = flow.names[id(m)], any(p.requires_grad for p in m.parameters())
    whole = Whole(node, module=m, grad=grad, reason=flow.whole.get(name, ""))
    given = (*node.args, *node.kwargs.values())
    one = len(given) == 1 and isinstance(given[0], fx.Node) and "otherwise" not in node.meta
    if isinstance(m, ThresholdLayer) and type(m) not in _MODULES:
        raise Unsupported(f"layer {name!r} is a {type(m).__name__}; only the plain threshold layers are known")
    kind = _MODULES.get(type(m)) or _MODULES.get(plain_kind(m))  # type: ignore[arg-type]
    if kind is None or not one or name in flow.whole:
        return whole
    op = kind.of_module(node, m, flow)
    if op is None:
        return whole
    op.module, op.grad = m, grad or op.grad
    return op

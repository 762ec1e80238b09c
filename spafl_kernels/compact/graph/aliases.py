"""Writes in place, turned into values of their own.

What is written to may have other names (a view, ``nn.Identity``, ``flatten``, a dropout that does nothing), and whoever
reads one of them later sees what was written. Where the other name is the whole tensor, its later readers are given the
result instead; where it is a part or another shape of it, the model is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ...training import Unsupported
from .calls import target_of, writes_in_place

__all__ = ["give_writes_a_value"]

# These may or may not copy, depending on sizes, strides or the mode; dropout too.
_MAYBE = {"contiguous", "reshape", "flatten", "to"}


def give_writes_a_value(graph: fx.Graph, places: Mapping[str, tuple[Any, ...]], model: nn.Module) -> set[str]:
    """Change ``graph`` so that no reader depends on a write; the names of nodes that still write to their argument.

    Args:
        graph: of one trace.
        places: memory of every tensor, see :class:`~spafl_kernels.compact.graph.trace.Shapes`.
        model: for its modules.

    Raises:
        Unsupported: a write reaches the input, a parameter or a buffer, or memory that is read under another shape.
    """
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    groups = _groups(nodes, places, model)
    writers: set[str] = set()
    for node in nodes:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if "out" in node.kwargs and not isinstance(node.target, type):
            raise Unsupported(f"{node.name} writes to a tensor that is given as out")
        if target_of(node) is operator.setitem or (node.op == "call_method" and node.target == "__setitem__"):
            raise Unsupported(f"in-place operation at {node.name}")
        if not writes_in_place(node, module) or node.name not in places:
            continue
        first = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(first, fx.Node) or first.name not in places:
            raise Unsupported(f"in-place operation at {node.name}")
        writers.add(node.name)
        group = next(group for group in groups if first in group)
        unsure = any(order[n] < order[node] and _may_be_its_argument(n, model) for n in group)
        for other in group:
            if other.op in ("placeholder", "get_attr"):
                raise Unsupported(f"in-place operation at {node.name} on {other.target!r}")
            if other is node or order[other] > order[node]:
                continue
            late = [user for user in other.users if order[user] > order[node]]
            if not late:
                continue
            if unsure or not places.get(other.name) == places[first.name] == places[node.name]:
                raise Unsupported(f"in-place operation at {node.name} on memory of {other.name}, which is read later")
            for user in late:
                user.replace_input_with(other, node)
                if "otherwise" in user.meta:
                    user.meta["otherwise"] = tuple(_swapped(part, other, node) for part in user.meta["otherwise"])
    return writers


def _swapped(arguments: Any, old: fx.Node, new: fx.Node) -> Any:
    return fx.node.map_arg(arguments, lambda n: new if n is old else n)


def _groups(nodes: list[fx.Node], places: Mapping[str, tuple[Any, ...]], model: nn.Module) -> list[list[fx.Node]]:
    """Nodes that have memory in common, or may have."""
    parent = {node: node for node in nodes}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    by_storage: dict[Any, fx.Node] = {}
    for node in nodes:
        if node.name not in places:
            continue
        storage = places[node.name][0]
        parent[root(node)] = root(by_storage.setdefault(storage, node))
        if _may_be_its_argument(node, model):
            for source in node.all_input_nodes[:1]:
                parent[root(node)] = root(source)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        found.setdefault(root(node), []).append(node)
    return list(found.values())


def _may_be_its_argument(node: fx.Node, model: nn.Module) -> bool:
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if writes_in_place(node, module):
        return False
    if module is not None:
        return "Dropout" in type(module).__name__
    target = target_of(node)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name in _MAYBE or "dropout" in name

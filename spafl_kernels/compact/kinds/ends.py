"""Where a graph begins and ends, and questions for sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...training import Unsupported
from ..graph.calls import Call, Signature
from ..graph.inputs import ONE
from ..small import Value
from .base import Op, Sign
from .whole import as_it_stands

if TYPE_CHECKING:
    from ..graph.flow import Flow
    from ..run.program import Values
    from ..run.scope import Run, Scope
    from ..small import Small

__all__ = ["Inner", "Input", "Output", "Shape"]


@dataclass(eq=False)
class Input(Op):
    kind = "input"
    silent = True

    def follow(self, flow: Flow) -> None:
        """The program puts it in its place."""

    def build(self, scope: Scope, i: int) -> Run:
        raise AssertionError("an input is not computed")

    def export(self, small: Small) -> Value:
        return Value(small.graph.placeholder("x" if small.flow.trace.form == ONE else str(self.node.target)), None)


@dataclass(eq=False)
class Output(Op):
    """What ``forward`` returns, at full width."""

    kind = "output"
    silent = True

    def follow(self, flow: Flow) -> None:
        if not self.sources:
            raise Unsupported("forward returns nothing that depends on its input")
        flow.outputs, flow.output = self.node.args[0], self.sources[0]

    def build(self, scope: Scope, i: int) -> Run:
        raise AssertionError("an output is not computed")

    def export(self, small: Small) -> Value:
        raise AssertionError("an output is not a value")


@dataclass(eq=False)
class Inner(Op):
    """A node inside an operation that is several; see :meth:`Op.in_graph`."""

    kind = "inner"
    silent = True

    def follow(self, flow: Flow) -> None:
        """Nobody else reads it."""

    def build(self, scope: Scope, i: int) -> Run:
        raise AssertionError("a part of an operation is not computed alone")

    def export(self, small: Small) -> Value:
        return Value(as_it_stands(self, small), None)


@dataclass(eq=False)
class Shape(Op):
    """``x.shape``, ``x.size()``, as they are at full width; ``x.dtype``, ``x.device``, ``x.ndim``."""

    kind = "shape"
    calls: ClassVar[Mapping[Any, Any]] = {getattr: None, "size": Signature("input dim", dim=None)}

    dim: int | None = None
    name_of: str = "shape"

    @property
    def sign(self) -> Sign:
        return Sign.UNREAD

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        if call.target is getattr:
            (what,) = call.node.args[1:] if len(call.node.args) == 2 else ("",)
            known = what in ("shape", "dtype", "device", "ndim")
            return cls(call.node, name_of=str(what)) if known else None
        dim = call.values["dim"]
        return cls(call.node, dim=dim) if dim is None or isinstance(dim, int) else None

    def follow(self, flow: Flow) -> None:
        """It has no channels."""

    def build(self, scope: Scope, i: int) -> Run:
        source, dim, what = scope.op(self.sources[0]), self.dim, self.name_of
        j, layout = scope.index[source.name], source.layout
        if what != "shape":

            def asked(env: Values, training: bool) -> None:
                env.kept[i] = getattr(env.kept[j], what)

            return asked

        def run(env: Values, training: bool) -> None:
            shape: Any = list(env.kept[j].shape)
            if layout is not None:
                shape[layout.dim] = layout.width
            env.kept[i] = torch.Size(shape) if dim is None else shape[dim]

        return run

    def export(self, small: Small) -> Value:
        return Value(as_it_stands(self, small), None)

"""What a kind of operation is, and how the kinds find the operations that are theirs.

A kind is a class; an operation of a traced model is an object of it. Everything the engine knows of the kind is here:
which calls are of it (:meth:`Op.of_module`, :meth:`Op.of_call`, :meth:`Op.in_graph`), what becomes of channels
(:meth:`Op.follow`), how it runs on the channels that are kept (:meth:`Op.build`), and what it is in an exported model
(:meth:`Op.export`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from enum import Enum, IntFlag
from typing import TYPE_CHECKING, Any, ClassVar

from ..graph.layout import Layout

if TYPE_CHECKING:
    from torch import nn

    from ..graph.calls import Call, Signature
    from ..graph.flow import Flow
    from ..run.scope import Run, Scope
    from ..small import Small, Value

__all__ = ["Const", "Op", "Sign", "Stop", "kinds_of"]


class Stop(Exception):
    """Channels cannot be followed through an operation; the text says why. Empty: there are none to follow."""


class Const(IntFlag):
    """What the dropped channels of a tensor may be; ``|`` joins.

    ``SAME``: a number per channel. ``SAMPLE``: one per channel and sample. ``PLACE``: one per channel and position.
    What varies along both is no constant, and is not followed.
    """

    ZERO = 0
    SAME = 1
    SAMPLE = 3
    PLACE = 5
    VARIES = 7


class Sign(Enum):
    """What an operation does to a channel that is not positive, as far as a proof needs to know.

    ``BLOCKS``: its gradient is 0. ``KEEPS``: it stays not positive, and a gradient only comes from where it is so.
    ``UNREAD``: its numbers are not looked at. ``LOSES``: nothing is known.
    """

    BLOCKS = "blocks"
    KEEPS = "keeps"
    UNREAD = "unread"
    LOSES = "loses"


@dataclass(eq=False)
class Op(ABC):
    """One node of the trace.

    Args:
        node: the ``fx.Node``.
        module: what is called, if that is a module.
        sources: names of the nodes it reads.
        layout: of the result; None at full width.
        const: what the dropped channels of the result may be.
        grad: the result depends on a parameter that is not frozen.
        shape: of the result at batch 2; None if it is not a tensor.
        macs: per sample, forward only, as the trace has the operation.
        order: see :class:`~spafl_kernels.compact.graph.trace.Shapes`; random numbers are drawn in it.
    """

    node: Any  # fx.Node, whose arguments are typed too widely to be of help
    _: KW_ONLY
    module: Any = None
    sources: tuple[str, ...] = ()
    layout: Layout | None = None
    const: Const = Const.ZERO
    grad: bool = False
    shape: tuple[int, ...] | None = None
    macs: int = 0
    order: tuple[int, ...] | None = None

    kind: ClassVar[str]
    # What the kind recognises; see kinds/__init__.py.
    modules: ClassVar[tuple[type, ...]] = ()
    calls: ClassVar[Mapping[Any, Signature | None]] = {}
    # It can read kept channels alone, and its work falls with them.
    reads_channels: ClassVar[bool] = False
    # Whoever reads the result can read kept channels as well as if it read the source.
    passes_channels: ClassVar[bool] = False
    # The result has memory of its own that no backward pass reads.
    fresh: ClassVar[bool] = False
    # It is no call of a program.
    silent: ClassVar[bool] = False
    # A call may have other arguments in the second pattern of the trace.
    by_mode: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return self.node.name

    def in_order(self, x: Any) -> Any:
        """``x``, which has all dimensions of the result, with its numbers in memory as the model itself has them."""
        if self.order is None:
            return x.contiguous()
        back = [self.order.index(d) for d in range(len(self.order))]
        return x.permute(self.order).contiguous().permute(back)

    @property
    def sign(self) -> Sign:
        return Sign.LOSES

    # -- which operations are of the kind --------------------------------------------------------------------------

    @classmethod
    def of_module(cls, node: Any, m: nn.Module, flow: Flow) -> Op | None:
        """The operation, if a module of ``modules`` that is called with one tensor is of this kind."""
        return None

    @classmethod
    def of_call(cls, call: Call, flow: Flow) -> Op | None:
        """The operation, if a call of ``calls`` whose arguments fit the signature is of this kind."""
        return None

    @classmethod
    def in_graph(cls, flow: Flow) -> Iterator[tuple[Op, tuple[str, ...]]]:
        """Operations that are several nodes: what stands for the last of them, and the names of the others."""
        return iter(())

    # -- what becomes of channels ----------------------------------------------------------------------------------

    @abstractmethod
    def follow(self, flow: Flow) -> None:
        """Set ``layout`` and ``const`` from those of the sources; raises :class:`Stop` where that cannot be."""

    def refine(self, flow: Flow) -> Op:
        """What the operation is, now that the sources are followed; before :meth:`follow`."""
        return self

    # -- how it runs -----------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, scope: Scope, i: int) -> Run:
        """The call of a program that makes value ``i``."""

    @abstractmethod
    def export(self, small: Small) -> Value:
        """Put the operation into the graph of an exported model."""


def kinds_of(kind: type[Op]) -> Iterator[type[Op]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from kinds_of(sub)

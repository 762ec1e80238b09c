"""What was read of a model, by kind of batch: the trainer and the module for anybody's loop ask here alone.

A batch of a new kind has the model read. What was read is verified before it is used, read anew when the model is not
what it was, and refused for as long as that which speaks against it stands. Of everything the last few are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..executed import uncounted
from ..training import Unsupported
from .graph.flow import Flow
from .graph.follow import follow_thresholds
from .graph.inputs import Form, Input, usual_form
from .graph.trace import Patterns, Trace, Untraceable, check_traceable
from .graph.watch import Modes, Watch
from .plan.rows import Rows
from .verify import Verify, check_verify

__all__ = ["FOLLOWED", "KINDS_READ", "MOST", "Batch", "Captured", "Captures", "Recent", "Verdict"]

FOLLOWED = "all channels can be traced"  # why a model runs compact
MOST = 8  # kinds of batches
# A model is read at most so often in so many calls: what changes at every call would never be done.
KINDS_READ, AMONG_CALLS = 2 * MOST, 16 * MOST

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Recent(dict[K, T]):
    """A dictionary of at most ``most`` entries: that which was put there first makes room."""

    most = MOST

    def __setitem__(self, key: K, value: T) -> None:
        super().__setitem__(key, value)
        while len(self) > self.most:
            del self[next(iter(self))]


class Batch(NamedTuple):
    """A kind of batch: all that what was read depends on, but for the model itself.

    Args:
        form: how the model is called.
        inputs: the tensors that it is called with.
        training: the mode of the model; of no meaning where both modes are read.
        gradients: whether they are asked for; the same.
        variant: what the caller says that the model computes, see :attr:`~spafl_kernels.training.Trainer.form`.
    """

    form: Form
    inputs: tuple[Input, ...]
    training: bool = True
    gradients: bool = True
    variant: Hashable = None


class Verdict(NamedTuple):
    """What verification found; it holds good for every copy of the model, in whatever process.

    Args:
        read: what had been read of the model, as text.
        found: what an engine does otherwise than the masked model; None: nothing.
    """

    read: str
    found: str | None


@dataclass
class Captured(Generic[T]):
    """What was read for one kind of batch.

    ``verified``: it has been, or need not be. ``samples``: in the last batch that was asked about. ``made``: what those
    who ask have made of it.
    """

    flow: Flow
    verified: bool
    samples: int
    made: dict[Any, T] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Rows:
        return Rows(self.flow)

    def changed(self, pattern: int = 0) -> str | None:
        """Why this does not hold good any more; see :meth:`~spafl_kernels.compact.graph.watch.Watch.changed`."""
        return self.flow.trace.watch.changed(pattern)


class Captures(Generic[T]):
    """What was read of ``model``.

    Args:
        model: only read.
        patterns: which modes are read together: ``"training"``, those of a training and its evaluations, for an engine
            that steps the parameters itself; ``"now"``, those that the model has.
        verify: ``"first"``, ``"always"`` or ``"never"``, see :class:`~spafl_kernels.compact.CompactTrainer`.
        differs: what an engine does otherwise than the masked model with such tensors, in words; None: nothing.
        bounded: read no more than :data:`KINDS_READ` kinds in :data:`AMONG_CALLS` calls. What runs then depends on the
            calls before, so not where any process must make the same choice.
        trace: one that has been made already.
        verdicts: of a copy of ``model``; what they are about is not verified once more, unless under ``"always"``.

    Attributes:
        verdicts: those given and those found here, by kind of batch.
    """

    def __init__(
        self,
        model: nn.Module,
        patterns: Patterns,
        verify: Verify,
        differs: Callable[[Flow, Sequence[Tensor]], str | None],
        bounded: bool = False,
        trace: Trace | None = None,
        verdicts: Mapping[Batch, Verdict] | None = None,
    ) -> None:
        self.model, self.patterns, self.bounded = model, patterns, bounded
        self.verify, self._differs = check_verify(verify), differs
        self.verdicts: Recent[Batch, Verdict] = Recent(verdicts or {})
        self._known: Recent[Batch, Captured[T]] = Recent()
        self._before: Recent[Batch, Captured[T]] = Recent()  # for a model that goes to and fro between two states
        self._refused: Recent[Batch, tuple[Watch, str]] = Recent()
        self._traces: Recent[tuple[Form, bool, bool, Hashable], Trace] = Recent()
        self._calls = 0
        self._read_at: deque[int] = deque(maxlen=KINDS_READ)  # the calls at which a kind was read
        if trace is not None:
            training = patterns == "training" or model.training
            self._traces[trace.form, training, trace.gradients[0], None] = trace

    def __iter__(self) -> Iterator[tuple[Batch, Captured[T]]]:
        """The kinds of batches that are known, and what was read for them."""
        return iter(self._known.items())

    def __len__(self) -> int:
        """Entries of the largest of all that is kept."""
        return max(len(self._known), len(self._before), len(self._refused), len(self._traces))

    def read_early(self, training: bool) -> None:
        """Read what can be read before the first batch, as far as a signature tells how the model will be called.

        Raises:
            Unsupported: no batch whatever can run compact as the model is.
        """
        try:
            form = usual_form(type(self.model).forward)
        except Unsupported:
            return
        if not self._traces:
            self._trace(Batch(form, (), training), None, 0)
        elif (trace := next(iter(self._traces.values()))).trains:
            _check_hooks(trace)

    def refusal(self, batch: Batch, pattern: int = 0) -> str | None:
        """Why batches of this kind run masked, as far as that is known of the model as it is."""
        watch, reason = self._refused.get(batch, (None, ""))
        return reason if watch is not None and watch.changed(pattern) is None else None

    def get(self, batch: Batch) -> Captured[T] | None:
        """What was read last for this kind, whether it holds good or not."""
        return self._known.get(batch)

    def of(self, batch: Batch, tensors: Sequence[Tensor], modes: Modes | None = None, pattern: int = 0) -> Captured[T]:
        """What holds good for a batch of this kind and the model as it is.

        Args:
            batch: the kind.
            tensors: those of the batch.
            modes: under ``"training"``, the flags that the modules have in the training.
            pattern: which of the patterns the modules have now.

        Raises:
            Unsupported: it must run masked.
        """
        self._calls += 1
        samples = next(len(t) for i, t in zip(batch.inputs, tensors) if i.batched)
        if (captured := self._still_good(batch, pattern)) is not None:
            captured.samples = samples
            return captured
        if (reason := self.refusal(batch, pattern)) is not None:
            raise Unsupported(reason)
        if self.bounded and len(self._read_at) == KINDS_READ and self._calls - self._read_at[0] < AMONG_CALLS:
            raise Unsupported(f"the model or its arguments have changed {KINDS_READ} times in {AMONG_CALLS} calls")
        watch: Watch | None = None
        with torch.inference_mode(False), uncounted():  # to read a model it is run with made-up samples
            try:
                trace = self._trace(batch, modes, pattern)
                watch = trace.watch
                flow = follow_thresholds(self.model, batch.inputs, trace, samples)
            except Unsupported as error:
                if (watch := error.watch if isinstance(error, Untraceable) else watch) is not None:
                    self._refused[batch] = watch, str(error)
                raise  # without a watch, the reason is as soon found again
            finally:
                if watch is not None:
                    self._read_at.append(self._calls)
        self._known[batch] = captured = Captured(flow, self.verify == "never", samples)
        return captured

    def _still_good(self, batch: Batch, pattern: int) -> Captured[T] | None:
        """What was read last for this kind, or before that, if the model is so now."""
        for kept in (self._known, self._before):
            captured = kept.get(batch)
            if captured is not None and captured.changed(pattern) is None:
                break
        else:
            captured = None
        if (last := self._known.get(batch)) is not None and captured is not last:
            if self.patterns == "training":
                last.made.clear()  # as large as the model
            self._before[batch] = last
            del self._known[batch]
            if captured is not None:
                self._known[batch] = captured
        return captured

    def check(self, batch: Batch, captured: Captured[T], tensors: Sequence[Tensor], again: bool = False) -> None:
        """Verify what was read, unless that has been done.

        Args:
            batch, captured: the kind, and what was read for it.
            tensors: those of a batch; of an empty one nothing can be learnt.
            again: under ``"always"``, once more.

        Raises:
            Unsupported: it is not what the masked model computes, and is refused from now on.
        """
        if captured.verified and not (again and self.verify == "always"):
            return
        trace, learnt = captured.flow.trace, True
        read, verdict = trace.text(), self.verdicts.get(batch)
        if verdict is None or verdict.read != read or self.verify == "always":
            with torch.inference_mode(False):
                verdict = Verdict(read, self._differs(captured.flow, tensors))
            if learnt := all(len(t) for i, t in zip(batch.inputs, tensors) if i.batched):
                self.verdicts[batch] = verdict
        if verdict.found is not None:
            self._known.pop(batch, None)
            self._refused[batch] = trace.watch, verdict.found
            raise Unsupported(verdict.found)
        captured.verified = learnt

    def _trace(self, batch: Batch, modes: Modes | None, pattern: int) -> Trace:
        key = batch.form, batch.training, batch.gradients, batch.variant
        trace = self._traces.get(key)
        if trace is None or trace.watch.changed(pattern) is not None:
            self._traces.pop(key, None)
            trace = check_traceable(self.model, self.patterns, batch.gradients, modes, batch.form)
            self._traces[key] = trace
        if trace.trains:
            _check_hooks(trace)
        return trace


def _check_hooks(trace: Trace) -> None:
    """Of an engine that steps the parameters itself, autograd does not see these."""
    if (name := trace.watch.hooked()) is not None:
        raise Untraceable(f"parameter {name!r} has a gradient hook", trace.watch)

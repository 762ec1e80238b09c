"""The persistent engine: weights and momentum stay compact across steps, and only a mask that changes costs a rebuild.

This is the life of a training: what the caller may do, which engine runs, who may write the model's tensors. The
compact copy itself is in :mod:`.train.session`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..executed import Executed
from ..training import (
    Extra,
    Given,
    Loss,
    MaskedTrainer,
    Options,
    SGDOptions,
    Trainer,
    TrainResult,
    Unsupported,
    arguments_of,
    samples_of,
)
from .captures import FOLLOWED, KINDS_READ, Batch, Captured, Captures, Verdict
from .explain import in_words, nothing_skipped
from .graph.flow import Flow
from .graph.inputs import ONE, Form, inputs_of
from .graph.trace import Trace, random_state, set_random_state
from .graph.watch import modes_of, set_modes
from .run.memory import pages
from .train.momentum import OwnMomentum
from .train.outside import read_outside
from .train.session import Session, settings_of
from .train.whole import WholeSession
from .verify import Verify, differs_in_training

__all__ = ["CompactTrainer"]

AnySession = Session | WholeSession
Judge = Callable[[Flow, int], str | None]  # why batches of a size had better run masked; None: they had not

HAS_EXTRA = "the training has an extra gradient term, which is written for full-size parameters"
NOT_LINEAR = (
    "Adam moves pruned filters by their moments' quotient, which is no linear map, so steps that were left out "
    "cannot be made up for"
)


NO_KIND = Batch(ONE, ())  # of batches with something in them of which nothing is known
AGAIN = 64  # masked steps after which the judge is asked again


class _Call(NamedTuple):
    """A batch: its kind, the tensors that it has, and how many samples."""

    kind: Batch
    tensors: Sequence[Tensor]
    samples: int


class _NoGain(Unsupported):
    """The compact engine can run this training, and had better not."""


class CompactTrainer(Trainer):
    """Equal to :class:`~spafl_kernels.training.MaskedTrainer`, on compact weights and activations.

    A model without threshold layers is trained too, by the same operations at full width.

    The channels are followed when the first batch shows the input shape; if that fails a masked trainer takes over, as
    long as the reason stands (``engine`` and ``reason`` say so), or the step raises in strict mode. What the model was
    read to be is compared with what it is before every step; what has changed is read anew.

    Args:
        model, loss: see :class:`~spafl_kernels.training.Trainer`.
        strict: raise :class:`~spafl_kernels.training.Unsupported` instead of falling back.
        multiple: convolutions keep a multiple of this many filters.
        compiled: use the compiled operators where the extension is there; otherwise plain PyTorch.
        patience: filters that were pruned are computed on, with zero weights, until that has cost about this many
            steps; then a new plan drops them. 0: a new plan whenever a mask changes.
        verify: ``"first"``: a captured model is compared with the masked one, on a float64 copy, before it is used;
            ``"always"``: that, and again at the first batch of every training; ``"never"``.
        trace: of ``model``, where one has been made already.
        judge: asked about the model as it is at the first batch and the first step of a training, and after every 64
            steps that run masked because it said so: ``judge(flow, batch)`` is a sentence why they had better, or None
            (:class:`~spafl_kernels.compact.plan.estimate.Judge`). By default nobody is asked.
        verdicts: what :meth:`verdicts_on` found of a copy of ``model``, in another process perhaps.

    Raises:
        Unsupported: the model cannot be traced.
    """

    engine = "compact"

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        strict: bool = False,
        multiple: int = 8,
        compiled: bool = True,
        patience: float = 0.5,
        verify: Verify = "first",
        trace: Trace | None = None,
        judge: Judge | None = None,
        verdicts: Mapping[Batch, Verdict] | None = None,
    ) -> None:
        super().__init__(model, loss)
        if not patience >= 0:
            raise ValueError(f"patience must not be negative; got {patience!r}")
        self._captures: Captures[AnySession] = Captures(
            model, "training", verify, self._differs, trace=trace, verdicts=verdicts
        )
        self._captures.read_early(training=True)
        self.strict, self.multiple, self.compiled, self.patience = strict, multiple, compiled, patience
        self.reason = FOLLOWED
        self._scratch: dict[str, Tensor] = {}
        self._lent: OwnMomentum | None = None
        self._session: AnySession | None = None
        self._fallback: MaskedTrainer | None = None
        self._executed = Executed()
        self._judge = judge
        self._batch = 0  # samples in the last batch
        self._seen: tuple[Any, Batch] = (), NO_KIND  # what the kind of the last tensor depends on, and it
        self._masked: MaskedTrainer | None = None
        self._loss_that_reads: tuple[Loss | None, str] = None, ""  # parameters, and the sentence about it
        self._loss_seen: Loss | None = None  # which does not

    # -- interface -------------------------------------------------------------------------------------------------

    def begin(
        self,
        options: Options,
        momentum: Mapping[str, Tensor] | None = None,
        densities: Mapping[str, float] | None = None,
        extra: Extra | None = None,
    ) -> None:
        start = self._start(options, momentum, densities)
        try:
            self._check_parameters()
        except RuntimeError:
            self._open = False
            raise
        # Buffers may be those that the last training has lent: read before they expire.
        self._options, self._given, self._density = options, dict(momentum or {}), start
        self._trained = self._trainable()
        self._extra = extra
        if self._lent is not None:
            self._lent.expire()
        self._session, self._fallback = None, None
        self._captured: Captured[AnySession] | None = None
        self._kind: Batch | None = None
        self._met: set[Batch] = set()  # kinds of batches in this training
        self._fresh = not self._given
        self._steps = self._macs = self._rebuilds = 0
        self._executed.reset()
        self._checked = self._stepped = False
        self._wait, self._no_gain = 0, False  # masked steps until the judge is asked again, and whether it said so
        self._changed_at, self._resting = -AGAIN, False  # the step at which the model had changed, and whether too soon
        self._states: list[Captured[AnySession]] = []  # the last two that the model was in
        self._opened_by_evaluation = False
        self.model.train()

    def verdicts_on(self, x: Given) -> dict[Batch, Verdict]:
        """Verify on a batch of a training to come, between trainings, whether compact would be expected to gain or not.

        Returns:
            What was found here so far, for trainers of copies of this model; nothing of a model that cannot be read.
        """
        self.begin(SGDOptions(lr=0.0))
        try:
            kind, tensors, _ = self._call_of(x)
            if kind is not NO_KIND:
                with contextlib.suppress(Unsupported):  # as a trainer of a copy will find, or is told by the verdict
                    captured = self._captures.of(kind, tensors, modes_of(self.model))
                    self._captures.check(kind, captured, tensors)
        finally:
            self.finish()
        return dict(self._captures.verdicts)

    def step(self, x: Given, y: Any) -> Tensor:
        self._check_open()
        call = self._call_of(x)
        session = self._ready(call)
        if session is None:
            assert self._fallback is not None
            self._wait, self._fallback.form = max(self._wait - 1, 0), self.form
            return self._fallback.step(x, y)
        undo = None if self._loss_seen is self.loss else _Undo(self.model, self._density)
        session.refresh()
        program, leaves = session.program, session.leaves
        # Threshold layers that run as they are may skip, which the program's count does not know.
        counts = bool(session.flow.apart) and not call.tensors[0].is_cuda
        with self._executed.counting() if counts else contextlib.nullcontext():
            out = program(call.tensors, True)
            loss = self._loss_of(out, y)
            if (name := read_outside(loss, out, session.copied)) is not None:
                return self._without(name, undo, x, y)
            self._loss_seen = self.loss
            objective, penalty = loss, session.penalty()
            if penalty is not None:
                objective = loss + penalty
            grads: list[Tensor | None] = [None] * len(leaves)
            if objective.requires_grad:  # not so when the whole last layer is pruned
                grads = list(torch.autograd.grad(objective, leaves, allow_unused=True))
        with torch.no_grad():
            session.advance(grads)
        self._steps += 1
        self._macs += program.macs * call.samples + program.macs_fixed
        return loss.detach()

    @torch.inference_mode(False)
    @torch.no_grad()
    def evaluate(self, x: Given, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_open()
        call = self._call_of(x)
        # Modules that run as they are (dropout, attention) read their own flag.
        self._modes = modes_of(self.model)
        self.model.eval()
        session = self._ready(call, training=False)
        if session is None:
            assert self._fallback is not None
            self._fallback.hits = self.hits
            return self._fallback.evaluate(x, y)
        session.refresh()
        out = session.program(call.tensors, False)
        self.model.train()
        return self._loss_and_hits(out, y)

    @torch.no_grad()
    def finish(self) -> TrainResult:
        if self._result is not None:
            return self._result
        self._check_open()
        # Whatever happens, this training is over: nothing compact may be written into a changed model.
        self._open = False
        session, fallback = self._session, self._fallback
        if fallback is not None:
            result = fallback.finish()
            if not isinstance(self._options, SGDOptions):
                self._given = dict(result.momentum)
            self._density.update(result.densities)
            self._steps, self._macs = self._steps + result.steps, self._macs + result.macs
        elif session is not None:
            self._store(session)
        self._result = TrainResult(
            densities=dict(self._density),
            macs=self._macs + self._executed.total(),
            steps=self._steps,
            rebuilds=self._rebuilds,
            momentum=self._finished_momentum(session),
        )
        return self._result

    def explain(self, measure: Given | None = None) -> str:
        """Which engine runs and why; after the first batch also which channels are followed and where they stop, how
        many rows of each layer are computed, why more than are active, and what is expected to be gained.

        Args:
            measure: a batch; every layer is timed alone on inputs of the sizes it gets from it, masked and compact.
        """
        head, lines = f"{self.engine}: {self.reason}", []
        timed = None if measure is None else self._call_of(measure)
        for kind, captured in self._captures:
            flow, open_now = captured.flow, self._session is not None
            session = next(iter(captured.made.values()), None)
            if open_now and captured is self._captured:
                session = self._session
            rows = {} if session is None else session.rows()
            if not rows and not open_now:  # the model's own tensors are complete
                rows = captured.rows.of_model(gradients=True).reasoned(captured.rows.reasons)
            if self.engine == "compact" and (nothing := nothing_skipped(rows)) is not None:
                head = f"compact: {nothing}"
            count = timed.samples if timed is not None and kind == timed.kind else 0
            lines += in_words(flow, rows, self._batch, self.compiled, measure=count)
        return "\n".join([head, *lines])

    # -- start -----------------------------------------------------------------------------------------------------

    def _check_parameters(self, versions: dict[str, tuple[int, int]] | None = None) -> None:
        self._check_same_parameters()
        for name, p in self._parameters.items():
            if versions is not None and (p.data_ptr(), p._version) != versions[name]:
                raise RuntimeError(f"{name!r} was changed by somebody else between begin() and finish()")

    def _ready(self, call: _Call, training: bool = True) -> AnySession | None:
        """The compact copy for such batches and the model as it is; None if the masked trainer is to run."""
        kind, self._batch = call.kind, call.samples
        # What the batches of an evaluation said is asked of those of the training again.
        first, self._stepped = training and not self._stepped, self._stepped or training
        changed: str | None = None
        if self._session is not None and self._kind == kind:
            assert self._captured is not None
            changed = self._session.flow.trace.watch.changed(0 if training else 1, kinds=False)
            good = self._captured.verified and changed is None
            good = good and not (training and self._steps and self._loss_seen is not self.loss)
            if good and not (first and self._opened_by_evaluation and self._loses(self._session.flow)):
                return self._session
            self._leave()
        elif self._session is not None:
            self._leave()
        elif self._fallback is not None:
            # What was refused may have changed, or this batch may be of another kind.
            if self._resting and self._wait:
                return None
            if kind == self._kind and (self._refusal(kind, training) or self._still_loses(first, training)):
                return None
            self._end_masked()
        self._kind = kind
        self._met.add(kind)
        if new := self._trainable().keys() - self._trained.keys():
            raise RuntimeError(f"{min(new)!r} was frozen when this training began; finish() it and begin() another one")
        with torch.inference_mode(False):
            try:
                if (reason := self._refusal(kind, training)) is not None:
                    raise Unsupported(reason)
                self._session = self._open_session(call, training, changed)
            except _NoGain as error:
                self._wait = AGAIN
                self._run_masked(str(error), no_gain=True)
                return None
            except Unsupported as error:
                if self.strict:
                    raise
                self._run_masked(str(error))
                return None
        self._opened_by_evaluation = not training
        self.engine, self.reason = "compact", FOLLOWED
        return self._session

    def _call_of(self, x: Given) -> _Call:
        if type(x) is Tensor and x.dim() and x.layout is torch.strided:
            seen = x.shape[1:], x.dtype, x.stride(), self.form
            if seen != self._seen[0]:
                self._seen = seen, Batch(ONE, inputs_of((x,))[0], variant=self.form)
            return _Call(self._seen[1], (x,), len(x))
        count, _ = samples_of(x)
        try:
            form, tensors = Form.of(*arguments_of(x))
        except Unsupported as error:
            self._unknown = str(error)
            return _Call(NO_KIND, (), count)
        return _Call(Batch(form, inputs_of(tensors)[0], variant=self.form), tensors, count)

    def _refusal(self, kind: Batch, training: bool) -> str | None:
        """Why batches of this kind are known not to run compact."""
        if self._loss_that_reads[0] is self.loss:
            return self._loss_that_reads[1]
        if self._inventory.thresholds:
            if self._extra is not None:
                return HAS_EXTRA
            if not isinstance(self._options, SGDOptions):
                return NOT_LINEAR
        if kind is NO_KIND:
            return self._unknown
        if len(self._met) > KINDS_READ:
            return f"the batches of this training are of more than {KINDS_READ} kinds"
        return self._captures.refusal(kind, 0 if training else 1)

    def _loses(self, flow: Flow) -> str | None:
        """Why batches like the last had better run masked, the model being as it is."""
        return None if self._judge is None else self._judge(flow, self._batch)

    def _rests(self, captured: Captured[AnySession], changed: str | None) -> str | None:
        """Why a model that has changed had better run masked for a while: it did so just before, and reading it takes
        long. What it has changed back to is known. Where somebody chose this engine it is read all the same.

        Only what happens in this training counts, so that it is the same training in whatever process.
        """
        others = [state for state in self._states if state is not captured]
        known, self._states = len(others) < len(self._states), [captured, *others][:2]
        rested, self._resting = self._resting, False
        if self._judge is None or known or not (changed or rested):
            return None
        soon, self._changed_at = not rested and self._steps - self._changed_at < AGAIN, self._steps
        self._resting = soon
        return f"{changed} has changed, as something did less than {AGAIN} steps before" if soon else None

    def _still_loses(self, first: bool, training: bool) -> bool:
        """Whether the masked trainer, which runs because the judge said so, goes on."""
        if not self._no_gain:
            return False
        if first or (training and not self._wait):
            captured = None if self._kind is None else self._captures.get(self._kind)
            reason = None if captured is None else self._loses(captured.flow)
            if reason is None:
                return False
            self.reason, self._wait = reason, AGAIN
        return True

    def _open_session(self, call: _Call, training: bool, changed: str | None) -> AnySession:
        kind, tensors = call.kind, call.tensors
        modes = modes_of(self.model) if training else self._modes
        captured = self._captures.of(kind, tensors, modes, 0 if training else 1)
        if (reason := self._loses(captured.flow) or self._rests(captured, changed)) is not None:
            raise _NoGain(reason)
        self._captures.check(kind, captured, tensors, again=not self._checked)
        self._checked, self._captured = True, captured
        return self._load(captured)

    def _differs(self, flow: Flow, tensors: Sequence[Tensor]) -> str | None:
        return differs_in_training(flow, tensors, self.multiple, self.compiled, self.patience)

    @torch.no_grad()
    def _load(self, captured: Captured[AnySession]) -> AnySession:
        self._versions = {name: (p.data_ptr(), p._version) for name, p in self._parameters.items()}
        # It comes back when the training is finished; one that broke off leaves nothing to the next.
        session = captured.made.pop(settings_of(captured.flow), None)
        captured.made.clear()
        if session is None:
            kind = Session if self._inventory.thresholds else WholeSession
            session = kind(captured.flow, self.multiple, self.compiled, self.patience)
        state = self._state()
        if isinstance(session, WholeSession):
            session.load(self._parameters, self._options, state, self._fresh, self._extra)
        else:
            assert isinstance(self._options, SGDOptions)
            session.load(self._parameters, self._options, state, self._fresh, self._density)
        return session

    def _state(self) -> Mapping[str, Tensor]:
        """The optimiser's, to be worked on; of a training that begins without any, whatever is in memory."""
        if not isinstance(self._options, SGDOptions):
            self._given = self._given or self._options.fresh_state(self._trainable())
            return self._given
        return (self._given or self._buffers()) if self._options.momentum else {}

    # -- changing engines in the middle of a training --------------------------------------------------------------

    @torch.no_grad()
    def _store(self, session: AnySession) -> None:
        """Write the compact copy into the model."""
        # The optimiser of a whole session writes them by their own names.
        self._check_parameters(None if isinstance(session, WholeSession) else self._versions)
        session.store()
        self._rebuilds += session.rebuilds
        assert self._captured is not None
        self._captured.made[session.settings] = session

    @torch.no_grad()
    def _leave(self) -> None:
        """Complete the model and the momentum, for another compact copy or for the masked trainer."""
        session = self._session
        assert session is not None
        self._store(session)
        session.store_momentum()
        self._session, self._fresh = None, False

    def _without(self, parameter: str, undo: _Undo | None, x: Given, y: Any) -> Tensor:
        """The step once more, by the masked trainer: the loss has read a parameter that is not complete now."""
        reason = f"the loss reads parameter {parameter!r} of the model, not only what the model returns"
        if undo is None:
            raise RuntimeError(f"{reason}; from the first step on that runs masked, and later it cannot be made up for")
        if self.strict:
            raise Unsupported(reason)
        undo()
        self._loss_that_reads = self.loss, reason
        self._session = None  # nothing of it is in the model
        self._run_masked(reason)
        assert self._fallback is not None
        self._fallback.form = self.form
        return self._fallback.step(x, y)

    def _run_masked(self, reason: str, no_gain: bool = False) -> None:
        self._no_gain = no_gain
        momentum: dict[str, Tensor] = self._given
        if isinstance(self._options, SGDOptions):
            momentum = (self._given or self._buffers()) if self._options.momentum else {}
            if self._options.momentum and self._fresh:
                for buffer in momentum.values():
                    buffer.zero_()
            trainable = {name for name, p in self._parameters.items() if p.requires_grad}
            momentum = {name: v for name, v in momentum.items() if name in trainable}
        self._fresh = False
        modes = modes_of(self.model)
        if self._masked is None or self._masked.loss is not self.loss or self._masked._open:
            self._masked = MaskedTrainer(
                self.model, self.loss
            )  # kept: it counts multiply-accumulates at its first step
        self._fallback, self._masked.reason = self._masked, reason
        self._fallback.begin(self._options, momentum, self._density, self._extra)
        set_modes(self.model, modes)
        self.engine, self.reason = "masked", reason

    def _end_masked(self) -> None:
        assert self._fallback is not None
        result = self._fallback.finish()
        self._density.update(result.densities)
        self._steps, self._macs = self._steps + result.steps, self._macs + result.macs
        if not isinstance(self._options, SGDOptions):
            self._given = dict(result.momentum)
        self._fallback = None

    def _buffers(self) -> dict[str, Tensor]:
        """Full-size buffers of the trainer's own. Nothing is in memory until somebody writes to them."""
        wanted = self._trained
        if self._scratch.keys() != wanted.keys():
            sizes = [p.numel() for p in wanted.values()]
            parts = pages(sum(sizes), next(iter(wanted.values()))).split(sizes)
            kept = self._scratch
            self._scratch = {name: part.view(p.shape) for (name, p), part in zip(wanted.items(), parts)}
            for name in self._scratch.keys() & kept.keys():
                self._scratch[name].copy_(kept[name])
        return self._scratch

    def _finished_momentum(self, session: AnySession | None) -> Mapping[str, Tensor]:
        if not isinstance(self._options, SGDOptions):
            if session is not None:
                session.store_momentum()
            return self._given
        if not self._options.momentum:
            return {}
        if self._given:
            if session is not None:
                session.store_momentum()
            return self._given
        self._lent = OwnMomentum(self._buffers(), partial(_complete, session, self._buffers(), self._fresh))
        return self._lent


class _Undo:
    """What the first forward of a training changes, as it was before: buffers, densities, generators."""

    def __init__(self, model: nn.Module, densities: dict[str, float]) -> None:
        self.densities, self.known = densities, dict(densities)
        self.buffers = [(b, b.clone()) for b in model.buffers()]
        self.random = random_state()

    @torch.no_grad()
    def __call__(self) -> None:
        self.densities.update(self.known)
        for buffer, value in self.buffers:
            buffer.copy_(value)
        set_random_state(self.random)


def _complete(session: AnySession | None, buffers: Mapping[str, Tensor], fresh: bool) -> None:
    if session is not None:
        session.store_momentum()
    elif fresh:
        for buffer in buffers.values():
            buffer.zero_()

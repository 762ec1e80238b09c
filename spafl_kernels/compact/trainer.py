"""The persistent engine: weights and momentum stay compact across steps, and only a mask that changes costs a rebuild.

This is the life of a training: what the caller may do, which engine runs, who may write the model's tensors. The
compact copy itself is in :mod:`.session`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import ThresholdLayer
from ..training import Loss, MaskedTrainer, SGDOptions, Trainer, TrainResult, Unsupported
from .flow import Flow
from .follow import trace_flow
from .memory import pages
from .momentum import OwnMomentum
from .session import Session, settings_of
from .trace import check_traceable

__all__ = ["CompactTrainer"]


class CompactTrainer(Trainer):
    """Equal to :class:`~spafl_kernels.training.MaskedTrainer`, on compact weights and activations.

    The channels are followed when the first batch shows the input shape; if that fails the trainer becomes a masked one
    (``engine`` and ``reason`` say so) or raises in strict mode.

    Args:
        model, loss: see :class:`~spafl_kernels.training.Trainer`.
        strict: raise :class:`~spafl_kernels.training.Unsupported` instead of falling back.
        multiple: convolutions keep a multiple of this many filters.
        compiled: use the compiled operators where the extension is there; otherwise plain PyTorch.
        patience: filters that were pruned are computed on, with zero weights, until that has cost about this many
            steps; then a new plan drops them. 0: a new plan whenever a mask changes.

    Raises:
        Unsupported: the model has no threshold layers, or cannot be traced.
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
    ) -> None:
        super().__init__(model, loss)
        if not patience >= 0:
            raise ValueError(f"patience must not be negative; got {patience!r}")
        if not any(isinstance(m, ThresholdLayer) for m in model.modules()):
            raise Unsupported("the model has no threshold layers")
        check_traceable(model)
        self.strict, self.multiple, self.compiled, self.patience = strict, multiple, compiled, patience
        self.reason = "all channels can be traced"
        self._flows: dict[tuple[int, ...], Flow] = {}
        self._sessions: dict[tuple[int, ...], Session] = {}
        self._scratch: dict[str, Tensor] = {}
        self._lent: OwnMomentum | None = None
        self._fallback: MaskedTrainer | None = None
        self._parameters = self._inventory.parameters

    # -- interface -------------------------------------------------------------------------------------------------

    def begin(
        self,
        options: SGDOptions,
        momentum: Mapping[str, Tensor] | None = None,
        densities: Mapping[str, float] | None = None,
    ) -> None:
        start = self._start(options, momentum, densities)
        try:
            self._check_parameters()
        except RuntimeError:
            self._open = False
            raise
        # Buffers may be those that the last training has lent: read before they expire.
        self._options, self._given, self._density = options, dict(momentum or {}), start
        if self._lent is not None:
            self._lent.expire()
        self._session: Session | None = None
        self._steps = self._macs = 0
        if self._fallback is not None:
            self._fallback.begin(options, self._given, densities)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self._check_open()
        session = self._ready(x)
        if session is None:
            assert self._fallback is not None
            return self._fallback.step(x, y)
        session.refresh()
        program, leaves = session.program, session.leaves
        loss = self.loss(program(x, True), y)
        grads: list[Tensor | None] = [None] * len(leaves)
        if loss.requires_grad:  # not so when the whole last layer is pruned
            grads = list(torch.autograd.grad(loss, leaves, allow_unused=True))
        with torch.no_grad():
            session.advance(grads)
        self._steps += 1
        self._macs += program.macs * len(x) + program.macs_fixed
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_open()
        session = self._ready(x)
        if session is None:
            assert self._fallback is not None
            return self._fallback.evaluate(x, y)
        session.refresh()
        # Modules that run as they are (dropout, attention) read their own flag.
        self.model.eval()
        out = session.program(x, False)
        self.model.train()
        return self.loss(out, y) * len(y), (out.argmax(dim=1) == y).sum()

    @torch.no_grad()
    def finish(self) -> TrainResult:
        if self._result is not None:
            return self._result
        self._check_open()
        if self._fallback is not None:
            self._result = self._fallback.finish()
        else:
            session = self._session
            if session is not None:
                # Whatever happens, this training is over: nothing compact may be written into a changed model.
                self._open = False
                self._inventory.refresh()
                self._check_parameters(self._versions)
                session.store()
                self._sessions[session.flow.image] = session
            self._result = TrainResult(
                densities=dict(self._density),
                macs=self._macs,
                steps=self._steps,
                rebuilds=0 if session is None else session.rebuilds,
                momentum=self._finished_momentum(session),
            )
        self._open = False
        return self._result

    def explain(self) -> str:
        """Which engine runs and why; after the first batch also which channels are followed and where they stop."""
        return "\n".join([f"{self.engine}: {self.reason}", *(flow.explain() for flow in self._flows.values())])

    # -- start -----------------------------------------------------------------------------------------------------

    def _check_parameters(self, versions: dict[str, tuple[int, int]] | None = None) -> None:
        now = self._inventory.parameters
        if now is not self._parameters:  # modules or parameters were exchanged
            if now.keys() != self._parameters.keys() or any(now[k] is not p for k, p in self._parameters.items()):
                raise RuntimeError("parameters of the model were replaced; make a new trainer (p.data may be swapped)")
            self._parameters = now
            # Another module may do something else; the next first batch shows it.
            self._flows.clear()
            self._sessions.clear()
        for name, p in now.items():
            if not p.requires_grad:
                raise RuntimeError(f"requires_grad of {name!r} was switched off; make a new trainer")
            if versions is not None and (p.data_ptr(), p._version) != versions[name]:
                raise RuntimeError(f"{name!r} was changed by somebody else between begin() and finish()")

    def _ready(self, x: Tensor) -> Session | None:
        """The compact copy, made from the first batch; None if the masked trainer has taken over."""
        image = tuple(x.shape[1:])
        if self._session is not None:
            if image != self._session.flow.image:
                raise ValueError(
                    f"x must have the sample shape this training began with, {self._session.flow.image}; got {image}"
                )
            return self._session
        if self._fallback is not None:
            return None
        try:
            if image not in self._flows:
                self._flows[image] = trace_flow(self.model, image)
        except Unsupported as error:
            if self.strict:
                raise
            self._fallback = MaskedTrainer(self.model, self.loss, str(error))
            self.engine, self.reason = "masked", str(error)
            self._fallback.begin(self._options, self._given, self._density)
            return None
        self._session = self._load(self._flows[image])
        return self._session

    @torch.no_grad()
    def _load(self, flow: Flow) -> Session:
        self.model.train()
        self._versions = {name: (p.data_ptr(), p._version) for name, p in self._parameters.items()}
        momentum: Mapping[str, Tensor] = {}
        if self._options.momentum:
            momentum = self._given or self._buffers()
        # It comes back when the training is finished; one that broke off leaves nothing to the next.
        session = self._sessions.pop(flow.image, None)
        if session is None or session.flow is not flow or session.settings != settings_of(flow):
            session = Session(flow, self.multiple, self.compiled, self.patience)
        session.load(self._parameters, self._options, momentum, not self._given, self._density)
        return session

    def _buffers(self) -> dict[str, Tensor]:
        """Full-size buffers of the trainer's own. Nothing is in memory until somebody writes to them."""
        if not self._scratch:
            sizes = [p.numel() for p in self._parameters.values()]
            parts = pages(sum(sizes), next(iter(self._parameters.values()))).split(sizes)
            self._scratch = {name: part.view(p.shape) for (name, p), part in zip(self._parameters.items(), parts)}
        return self._scratch

    def _finished_momentum(self, session: Session | None) -> Mapping[str, Tensor]:
        if not self._options.momentum:
            return {}
        if self._given:
            if session is not None:
                session.store_momentum()
            return self._given
        self._lent = OwnMomentum(self._buffers(), partial(_complete, session, self._buffers()))
        return self._lent


def _complete(session: Session | None, buffers: Mapping[str, Tensor]) -> None:
    if session is not None:
        session.store_momentum()
    else:
        for buffer in buffers.values():
            buffer.zero_()

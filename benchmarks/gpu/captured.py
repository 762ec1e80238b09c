"""Compact training under a fixed plan: steps that neither ask the host nor move a tensor, for CUDA graphs.

The compact trainer asks the host in every step whether a mask changed. Here the plan of the first masks stays, and a
flag on the device says whether some step ran that the trainer would have run under another plan: whoever replays the
graph reads it when it likes, and must throw away what came after its last look if it is set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spafl_kernels.compact.graph.follow import trace_flow
from spafl_kernels.compact.train.session import Session
from spafl_kernels.threshold_layer import ThresholdLayer
from spafl_kernels.training import Loss, SGDOptions

__all__ = ["CapturedCohort", "CapturedCompact"]


class CapturedCompact:
    """One training of one model, under the plan of the masks it begins with.

    While no mask changes every step is that of :class:`~spafl_kernels.compact.CompactTrainer`. The parameters are read
    here and complete again after :meth:`finish`.

    Args:
        model: with threshold layers.
        options: of the training.
        sample: shape of one input sample.
        loss: see :class:`~spafl_kernels.training.Trainer`.
        multiple: layers keep a multiple of this many filters, filled up with zero rows; products of 16-bit numbers and
            of tf32 want 8.
        momentum: full-size buffers by parameter name; they are completed by :meth:`finish`. None: zeros.
        densities: of every threshold layer in its last forward, for the collapse guard; 1 by default.
        horizon: steps after which ``changed`` is set if pruned rows still move (weight decay, or given momentum).
        autocast: dtype of products under autocast; None: that of the model.

    Attributes:
        changed: bool scalar on the device; set, and never reset, once a step ran that may have needed another plan.
        steps: int64 scalar on the device.

    Raises:
        Unsupported: the model cannot be followed.
    """

    def __init__(
        self,
        model: nn.Module,
        options: SGDOptions,
        sample: Sequence[int],
        loss: Loss = F.cross_entropy,
        multiple: int = 8,
        momentum: Mapping[str, Tensor] | None = None,
        densities: Mapping[str, float] | None = None,
        horizon: int = 10_000,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.loss, self.horizon, self.autocast = model.train(), loss, horizon, autocast
        parameters = dict(model.named_parameters())
        device = next(iter(parameters.values())).device
        self.momentum: Mapping[str, Tensor] = {}
        if options.momentum:
            self.momentum = momentum or {name: torch.zeros_like(p) for name, p in parameters.items()}
        if densities is None:
            densities = {name: 1.0 for name, m in model.named_modules() if isinstance(m, ThresholdLayer)}
        self.session = Session(trace_flow(model, tuple(sample)), multiple, compiled=False, patience=0.5, gpu=True)
        self.session.load(parameters, options, self.momentum, not momentum, dict(densities))
        self.session.refresh()
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.changed = torch.zeros((), dtype=torch.bool, device=device)
        # Builds the table of powers that later calls read, if there are rows that move.
        self.session.drift(self.steps, horizon)

    def _products(self, device: str) -> contextlib.AbstractContextManager[object]:
        if self.autocast is None:
            return contextlib.nullcontext()
        # Cached copies of weights would outlive the step that made them.
        return torch.autocast(device, self.autocast, cache_enabled=False)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One SGD step; returns the detached loss. The host does the same in every call, whatever the values are."""
        session = self.session
        session.guard()
        self.changed |= session.drift(self.steps, self.horizon)
        with self._products(x.device.type):
            loss = self.loss(session.program(x, True), y)
        leaves = session.leaves
        grads: list[Tensor | None] = [None] * len(leaves)
        if loss.requires_grad:  # not so when the whole last layer is pruned
            grads = list(torch.autograd.grad(loss, leaves, allow_unused=True))
        with torch.no_grad():
            session.advance(grads)
            session.rescore()
            self.steps += 1
        return loss.detach()

    def finish(self) -> None:
        """Write all state into the model and the momentum; waits for the device.

        Raises:
            RuntimeError: a mask may have changed, so that these are not the steps that the trainer takes. The model is
                as it was.
        """
        if bool(self.changed):
            raise RuntimeError("a mask may have changed since the plan was made: these steps are not the trainer's")
        self.session.store(int(self.steps))
        self.session.store_momentum()


class CapturedCohort:
    """Clients that each train under a plan of their own; their steps go into one CUDA graph.

    Args:
        models: one per client; trained in place.
        options: of the training.
        sample: shape of one input sample.
        streams: on how many streams the clients run, so that a graph has as many branches. On a CPU, where there are no
            streams, they run one after the other whatever it is.
        multiple: see :class:`CapturedCompact`.
    """

    def __init__(
        self, models: Sequence[nn.Module], options: SGDOptions, sample: Sequence[int], streams: int = 1,
        multiple: int = 8,
    ) -> None:  # fmt: skip
        self.models = list(models)
        self.clients = [CapturedCompact(m, options, sample, multiple=multiple) for m in models]
        on_cuda = self.clients[0].changed.is_cuda and streams > 1
        self._streams = [torch.cuda.Stream() for _ in range(streams)] if on_cuda else []

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of every client; ``x`` and ``y`` with the client first. Returns the losses, ``(clients,)``."""
        jobs = list(zip(self.clients, x, y, strict=True))
        if not self._streams:
            return torch.stack([client.step(a, b) for client, a, b in jobs])
        here, losses = torch.cuda.current_stream(), []
        for stream in self._streams:
            stream.wait_stream(here)
        for i, (client, a, b) in enumerate(jobs):
            with torch.cuda.stream(self._streams[i % len(self._streams)]):
                losses.append(client.step(a, b))
        for stream in self._streams:
            here.wait_stream(stream)
        return torch.stack(losses)

    def finish(self) -> None:
        """See :meth:`CapturedCompact.finish`, of every client."""
        for client in self.clients:
            client.finish()

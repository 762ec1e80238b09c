"""Local training of weights and thresholds: the interface, and the trainer that defines it.

:class:`MaskedTrainer` runs the model's own layers and ``torch.optim``. On a CPU these compute the masked reference,
which every faster trainer must equal; on a GPU they run what :mod:`spafl_kernels.gpu.choice` says.
:func:`spafl_kernels.engines.make_trainer` picks a trainer for a model and says why.

One step, in this order (the order of the published code):

1. collapse guard: a threshold layer whose density in its previous forward was ``<= collapse_floor`` gets ``tau = 0``;
2. masks from the current weights and thresholds; forward in train mode; ``loss(model(x), y)``;
3. gradients of ``loss + penalty * sum exp(-tau)`` for weights, thresholds and all other parameters; then ``extra``, if
   ``begin`` was given one, adds its own terms or takes some away;
4. the gradient is scaled down if its global norm exceeds ``max_grad_norm`` (``torch.nn.utils.clip_grad_norm_``);
5. ``torch.optim.SGD``: ``g += weight_decay * p; v = momentum * v + g; p -= lr * v``, or what else the options say
   (:mod:`spafl_kernels.optimisers`); thresholds may have a learning rate of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from . import backend
from .executed import Executed
from .flops import Counter
from .functional import check_thresholds, refuse_transforms, threshold_penalty
from .inventory import Inventory
from .optimisers import AdamOptions, Options, SGDOptions, torch_optimiser, write_back
from .shared_pass import share

__all__ = [
    "AdamOptions",
    "Extra",
    "Given",
    "MaskedTrainer",
    "Options",
    "SGDOptions",
    "TrainResult",
    "Trainer",
    "Unsupported",
]

Loss = Callable[[Any, Any], Tensor]
Given = Tensor | Sequence[Any] | Mapping[str, Any]
"""A batch as a model gets it: a tensor; a tuple or list of all its arguments; a dictionary of them by name."""

Extra = Callable[[Mapping[str, nn.Parameter]], None]
"""``extra(parameters)`` gets the trained parameters by name, their ``grad`` complete, and changes these gradients in
place: a proximal term, a correction, a mask. A parameter that the loss does not depend on has the gradient None."""


class Unsupported(ValueError):
    """An engine cannot run this model exactly; the message says why."""


@dataclass(frozen=True)
class TrainResult:
    """What a local training did.

    Args:
        densities: share of active filters in the last forward (train or eval), by threshold layer; what was given to
            ``begin`` if there was no forward.
        macs: multiply-accumulates executed by ``step`` calls in convolutions (groups and all), matrix products,
            attention and recurrent layers: forward, gradient of the input and gradient of the weight, as far as they
            are needed. Evaluation is not counted. What skips pruned filters counts those that it computes: the
            active ones, those that fill a block up, and pruned ones whose gradient is not zero.
        steps: optimiser steps done.
        rebuilds: times the compact plan was made anew because a mask changed (0 for the masked engine).
        momentum: the optimiser's state, full-size, by the names that :mod:`spafl_kernels.optimisers` gives (for SGD
            those of the parameters): the tensors given to ``begin``, or the trainer's own, which are to be read before
            its next ``begin``. Empty for SGD whose momentum is 0.
    """

    densities: dict[str, float]
    macs: int
    steps: int
    rebuilds: int
    momentum: Mapping[str, Tensor] = field(repr=False)


class Trainer:
    """Trains and evaluates one resident model; between ``begin`` calls its parameters may point at other memory.

    Use: ``begin(...)``, any number of ``step`` and ``evaluate``, ``finish()``. The parameters, and the statistics of
    norms, are read at ``begin`` and complete again, in place, after ``finish``; in between their contents are undefined
    and nobody else may write them. The ``nn.Parameter`` objects must stay the same; their ``data`` may be swapped (same
    shape, dtype, device) while no training is open. A trainer is not thread safe, and is not copied: who needs another
    one copies the model.

    Args:
        model: any module; without threshold layers the training is plain SGD.
        loss: ``loss(out, y)`` of what the model returns, a scalar, the mean over the batch.
    """

    engine: str
    reason: str
    hits: Callable[[Tensor, Tensor], Tensor]
    """``hits(model(x), y)``: what :meth:`evaluate` counts as right of a batch, a scalar; by default the samples whose
    largest output is that of their class. May be set to something else between two evaluations."""
    form: Hashable = None
    """Set it to something else where the model computes something else from one step to the next (another width, say):
    multiply-accumulates are counted, and the compact engine reads the model, once for each form and shape of input."""

    def __init__(self, model: nn.Module, loss: Loss = F.cross_entropy) -> None:
        self.model = model
        self.loss = loss
        self.hits = of_classes
        self._inventory = Inventory(model)
        self._parameters = self._inventory.parameters
        self._open = False
        self._result: TrainResult | None = None

    def begin(
        self,
        options: Options,
        momentum: Mapping[str, Tensor] | None = None,
        densities: Mapping[str, float] | None = None,
        extra: Extra | None = None,
    ) -> None:
        """Start a local training from the model's current parameters and buffers.

        Args:
            options: settings of the optimiser and of the SpaFL terms.
            momentum: the optimiser's state for every trainable parameter: full-size buffers by name, with the
                parameter's shape, dtype and device (``options.state_like``); ``finish`` leaves the new state in these
                tensors. None or an empty mapping starts without state, which is the same as zeros: without dampening
                the first step of ``torch.optim.SGD`` sets ``v = g``, and ``momentum * 0 + g`` is ``g``.
            densities: density of every threshold layer in its last forward, the collapse guard's state; 1.0 by default.
            extra: changes the gradient of every step of this training before it is clipped; see :data:`Extra`. It sees
                full-size parameters, so the masked engine runs the whole training if there are threshold layers.

        Raises:
            ValueError: a buffer or density that is missing, unknown or of the wrong shape, dtype or device; a threshold
                that is not finite; every parameter is frozen.
            RuntimeError: the last training was not finished.
        """
        raise NotImplementedError

    def step(self, x: Given, y: Any) -> Tensor:
        """One step of the optimiser in train mode.

        Args:
            x: a batch the model takes: ``model(x)`` of a tensor, ``model(*x)`` of a tuple or list, ``model(**x)`` of a
                dictionary. The samples are counted along dimension 0 of the first tensor in it.
            y: targets the loss takes.

        Returns:
            The loss without the penalty, before the update: a detached scalar on the model's device. If it is not
            finite the parameters are not either; the caller decides what to do.

        Raises:
            ValueError: the loss is not a scalar tensor, or does not depend on what the model returns; every parameter
                was frozen meanwhile; there is no tensor in ``x``.
            TypeError: ``x`` is nothing of that.
            RuntimeError: no training is open; parameters of the model were replaced.
        """
        raise NotImplementedError

    def evaluate(self, x: Given, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and hits on a batch in eval mode; the collapse guard fires here too, as in the published code.

        Args:
            x: a batch as :meth:`step` takes it; the output is ``(N, classes)``.
            y: int64 ``(N,)`` classes.

        Returns:
            ``(loss summed over the batch, number of correct predictions)``, scalars on the model's device.

        Raises:
            ValueError: the loss is not a scalar tensor.
            TypeError: the model's output is no tensor ``(N, classes)``.
            RuntimeError: no training is open; parameters of the model were replaced.
        """
        raise NotImplementedError

    def finish(self) -> TrainResult:
        """Write all state back to the model and the momentum tensors; a second call returns the same result."""
        raise NotImplementedError

    def explain(self, measure: Tensor | None = None) -> str:
        """Which engine runs, and why; ``measure``: a batch on which an engine that skips measures what that brings."""
        return f"{self.engine}: {self.reason}"

    # A copy would share with its original whatever holds memory and is no tensor: programs, graphs, an optimiser.
    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is neither copied nor pickled; finish the training, copy or pickle its model and "
            "the momentum of its result, and make a trainer of those"
        )

    # -- shared by the engines -------------------------------------------------------------------------------------

    def _start(
        self, options: Options, momentum: Mapping[str, Tensor] | None, densities: Mapping[str, float] | None
    ) -> dict[str, float]:
        """Check the arguments of ``begin`` and refresh the inventory; returns complete densities."""
        if self._open:
            raise RuntimeError("begin() was called before the last training was finished; call finish() first")
        self._inventory.refresh()
        self._trainable()
        layers = [name for name, _ in self._inventory.thresholds]
        if unknown := sorted((options.penalty_scales or {}).keys() - set(layers)):
            raise ValueError(f"penalty_scales must name threshold layers of the model; {unknown[0]!r} is none")
        check_thresholds(dict(self._inventory.thresholds))
        if momentum:
            form = options.state_like(self._trainable())
            if wrong := sorted(form.keys() ^ momentum.keys()):
                raise ValueError(f"momentum must have one buffer for every trainable parameter; differs in {wrong}")
            for name, p in form.items():
                v = momentum[name]
                if (v.shape, v.dtype, v.device) != (p.shape, p.dtype, p.device):
                    raise ValueError(
                        f"momentum[{name!r}] must be {tuple(p.shape)} {p.dtype} on {p.device}; "
                        f"got {tuple(v.shape)} {v.dtype} on {v.device}"
                    )
        if densities is not None:
            if wrong := sorted(set(layers) ^ densities.keys()):
                raise ValueError(f"densities must have one value for every threshold layer; differs in {wrong}")
            for name, value in densities.items():
                if not 0 <= value <= 1:
                    raise ValueError(f"densities[{name!r}] must be in [0, 1]; got {value!r}")
        self._open = True
        self._result = None
        return {name: float(densities[name]) if densities is not None else 1.0 for name in layers}

    def _check_open(self) -> None:
        refuse_transforms("a trainer")
        if not self._open:
            raise RuntimeError("no training is open; call begin() first")

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are not frozen; ``ValueError`` if there are none."""
        found = {name: p for name, p in self._inventory.parameters.items() if p.requires_grad}
        if not found:
            raise ValueError("there is nothing to train: every parameter of the model is frozen (requires_grad=False)")
        return found

    def _check_same_parameters(self) -> None:
        """Raise ``RuntimeError`` unless the ``nn.Parameter`` objects are those that this trainer works on."""
        self._inventory.refresh()
        now, then = self._inventory.parameters, self._parameters
        if now is then:
            return
        other = sorted(name for name in now.keys() | then.keys() if now.get(name) is not then.get(name))
        if other:
            raise RuntimeError(
                f"parameters of the model were replaced ({', '.join(other[:4])}{', ...' if len(other) > 4 else ''}); "
                "make a new trainer (p.data may be swapped)"
            )
        self._parameters = now

    def _loss_of(self, out: Any, y: Tensor) -> Tensor:
        """The loss of what the model returned, fit for a backward pass."""
        loss = scalar_loss(self.loss(out, y))
        if not loss.requires_grad and any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(out)):
            raise ValueError(
                "loss must be differentiable in what the model returns; its result does not depend on it "
                "(detached, or made of whole numbers)"
            )
        return loss

    def _loss_and_hits(self, out: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`evaluate` returns."""
        loss = scalar_loss(self.loss(out, y)) * len(y)
        if not isinstance(out, Tensor) or out.dim() < 2:
            raise TypeError(f"evaluate() needs a model that returns (N, classes); this one returned {_words(out)}")
        return loss, self.hits(out, y)


def of_classes(out: Tensor, y: Tensor) -> Tensor:
    """How many of the ``(N, classes)`` outputs are largest at their class ``(N,)``."""
    return (out.argmax(dim=1) == y).sum()


def arguments_of(x: Given) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with, by place and by name; ``TypeError`` for what is no batch."""
    if isinstance(x, Tensor):
        return (x,), {}
    if isinstance(x, (tuple, list)):
        return tuple(x), {}
    if isinstance(x, Mapping) and all(isinstance(name, str) for name in x):
        return (), dict(x)
    raise TypeError(
        "x must be a tensor, a tuple or list of the model's arguments, or a dictionary of them by name; "
        f"got a {type(x).__name__}"
    )


def called(model: nn.Module, x: Given) -> Any:
    """What the model returns for a batch."""
    if isinstance(x, Tensor):
        return model(x)
    args, kwargs = arguments_of(x)
    return model(*args, **kwargs)


def samples_of(x: Given) -> tuple[int, Hashable]:
    """How many samples a batch has, and what of it a step's work depends on besides their number."""
    if isinstance(x, Tensor) and x.dim():
        return len(x), x.shape[1:]
    leaves = tree_leaves(arguments_of(x))
    count = next((len(t) for t in leaves if isinstance(t, Tensor) and t.dim()), None)
    if count is None:
        raise ValueError("x must have a tensor with a dimension of samples in it")
    shapes = [
        t.shape[t.dim() > 0 and len(t) == count :] if isinstance(t, Tensor) else (type(t), repr(t)) for t in leaves
    ]
    return count, tuple(shapes)


def _words(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def scalar_loss(value: Any) -> Tensor:
    """``value`` as what a loss must return: a scalar tensor. ``ValueError`` says what came instead."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"loss must return a scalar tensor, the mean over the batch; got {_words(value)}")
    return value.reshape(())


class Stepper(Protocol):
    """What moves parameters by their gradients: the part of ``torch.optim.Optimizer`` that a step needs."""

    def zero_grad(self) -> None: ...

    def step(self) -> Any: ...


def step_on_gradients(
    optimiser: Stepper, parameters: Mapping[str, nn.Parameter], options: Options, extra: Extra | None
) -> None:
    """The end of a step, when every parameter has its gradient: extra terms, clipping, the optimiser."""
    if extra is not None:
        with torch.no_grad():
            extra(parameters)
    if options.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(parameters.values(), options.max_grad_norm)
    optimiser.step()


class MaskedTrainer(Trainer):
    """The model's own layers, autograd, ``torch.optim``: on a CPU dense operators on masked weights, the definition."""

    engine = "masked"
    # Without it ``TrainResult.macs`` has only what counts itself.
    counts_macs = True

    def __init__(self, model: nn.Module, loss: Loss = F.cross_entropy, reason: str = "asked for") -> None:
        super().__init__(model, loss)
        self.reason = reason
        # MACs of one step that do not depend on masks, as (MACs, batch of the count), by the shape of a sample, the
        # model's form and by which parameters are frozen.
        self._macs_of: dict[Any, tuple[int, int]] = {}
        # Those that do. Kept over trainings: a captured step adds to the same tensors at each replay.
        self._executed = Executed()

    def begin(
        self,
        options: Options,
        momentum: Mapping[str, Tensor] | None = None,
        densities: Mapping[str, float] | None = None,
        extra: Extra | None = None,
    ) -> None:
        start = self._start(options, momentum, densities)
        self._options, self._parameters, self._extra = options, self._inventory.parameters, extra
        self._layers: list[tuple[str, Any]] = self._inventory.thresholds
        self._params = self._trainable()
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._hold(torch.tensor(list(start.values()), dtype=torch.float64, device=device), dict(momentum or {}))
        self._steps = self._macs = 0
        self._executed.reset()
        self.model.train()

    def _hold(self, densities: Tensor, momentum: dict[str, Tensor]) -> None:
        """Keep what a step works on besides the model: ``densities`` are written in place, for whoever captures it."""
        self._densities, self._momentum = densities, momentum or self._options.fresh_state(self._params)
        self._shared = share([layer for _, layer in self._layers])
        self._optimizer: Stepper = torch_optimiser(self._options, self._params, self._threshold_names(), self._momentum)

    def _threshold_names(self) -> set[str]:
        return {f"{name}.threshold" if name else "threshold" for name, _ in self._layers}

    @torch.no_grad()
    def _guard(self) -> AbstractContextManager[None]:
        """The collapse guard, then the densities of the forward that belongs into the context; nothing waits.

        On a CPU layers compute all their filters in it, pruned or not: this trainer is the definition.
        """
        if self._options.collapse_floor is not None:
            collapsed = self._densities <= self._options.collapse_floor
            for (_, layer), reset in zip(self._layers, collapsed.unbind(), strict=True):
                layer.threshold.masked_fill_(reset, 0.0)
        if self._shared is not None:
            return self._shared.open(self._densities)
        for (_, layer), density in zip(self._layers, self._densities.unbind(), strict=True):
            density.copy_(layer.mask().double().mean())
        on_cpu = self._densities.device.type == "cpu"
        return backend.requesting("reference") if on_cpu else contextlib.nullcontext()

    def step(self, x: Given, y: Any) -> Tensor:
        self._check_open()
        self._check_same_parameters()
        count, shape = samples_of(x)
        key = shape, self.form, tuple(p.requires_grad for p in self._parameters.values())
        if not self.counts_macs:
            self._steps += 1
            return self._step(x, y)
        if key not in self._macs_of:
            before = self._executed.numbers
            with Counter() as counted, self._executed.counting():
                loss = self._step(x, y)
            # PyTorch's own operators that compute active filters alone are in both counts.
            twice = self._executed.numbers - before
            macs, batch = counted.of_other_operators() // 2 - twice, count
            if not batch:  # nothing was counted of an empty batch
                self._steps += 1
                return loss
            self._macs_of[key] = macs, batch
        else:
            with self._executed.counting():
                loss = self._step(x, y)
        macs, batch = self._macs_of[key]
        self._macs += macs * count // batch
        self._steps += 1
        return loss

    def _step(self, x: Given, y: Any) -> Tensor:
        self._optimizer.zero_grad()
        with self._guard():
            out = called(self.model, x)
        loss = self._loss_of(out, y)
        if not loss.requires_grad:
            self._trainable()
            raise ValueError("what the model returns does not depend on any parameter that is trained")
        self._objective(loss).backward()
        step_on_gradients(self._optimizer, self._params, self._options, self._extra)
        return loss.detach()

    def _objective(self, loss: Tensor) -> Tensor:
        """What is minimised."""
        return loss + self._penalty() if self._options.penalty and self._layers else loss

    def _penalty(self) -> Tensor:
        options = self._options
        if options.penalty_scales is None:
            return options.penalty * threshold_penalty(self.model)
        return options.penalty_over((name, layer.threshold) for name, layer in self._layers)

    @torch.no_grad()
    def evaluate(self, x: Given, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_open()
        self._check_same_parameters()
        samples_of(x)
        self.model.eval()
        out = self._answer(x)
        self.model.train()
        return self._loss_and_hits(out, y)

    def _answer(self, x: Given) -> Any:
        """What the model says to a batch of an evaluation."""
        with self._guard():
            return called(self.model, x)

    def finish(self) -> TrainResult:
        if self._result is None:
            self._check_open()
            self._optimizer.zero_grad()
            if isinstance(self._optimizer, torch.optim.Optimizer):
                write_back(self._optimizer, self._params, self._momentum)
            stateful = not isinstance(self._options, SGDOptions) or bool(self._options.momentum)
            self._result = TrainResult(
                densities=dict(zip([name for name, _ in self._layers], self._densities.tolist(), strict=True)),
                macs=self._macs + self._executed.total(),
                steps=self._steps,
                rebuilds=0,
                momentum=self._momentum if stateful else {},
            )
            self._open = False
        return self._result

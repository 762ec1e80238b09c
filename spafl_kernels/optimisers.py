"""What steps the parameters: settings of SGD, Adam and AdamW, and the state they carry from step to step.

The arithmetic is that of ``torch.optim``; :func:`torch_optimiser` makes the optimiser that defines it. Its state is a
mapping of tensors that outlives it, called *momentum* throughout: for SGD one buffer for each parameter, by the
parameter's name; for Adam ``exp_avg.<name>``, ``exp_avg_sq.<name>`` and the scalar ``step.<name>``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reference import penalty

__all__ = ["AdamOptions", "Options", "SGDOptions", "torch_optimiser", "write_back"]


class _Checked:
    """Checks of the settings that all optimisers have."""

    lr: float
    penalty: float
    max_grad_norm: float | None
    collapse_floor: float | None
    threshold_lr: float | None
    penalty_scales: Mapping[str, float] | None

    def _check(self, name: str, allowed: str, ok: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and ok(value)):
            raise ValueError(f"{name} must be {allowed}; got {value!r}")

    def _check_common(self) -> None:
        for name in ("lr", "weight_decay"):
            self._check(name, "a finite number >= 0", lambda v: v >= 0)
        self._check("penalty", "a finite number", lambda v: True)
        if self.threshold_lr is not None:
            self._check("threshold_lr", "None or a finite number >= 0", lambda v: v >= 0)
        if self.max_grad_norm is not None:
            self._check("max_grad_norm", "None or a finite number > 0", lambda v: v > 0)
        if self.collapse_floor is not None:
            self._check("collapse_floor", "None or a number in [0, 1)", lambda v: 0 <= v < 1)
        for name, value in (self.penalty_scales or {}).items():
            if not (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)):
                raise ValueError(f"penalty_scales[{name!r}] must be a finite number; got {value!r}")

    @property
    def rate_of_thresholds(self) -> float:
        """``threshold_lr``, or ``lr`` where they have none of their own."""
        return self.lr if self.threshold_lr is None else self.threshold_lr

    def penalty_of(self, layer: str) -> float:
        """The penalty's coefficient for a threshold layer."""
        return self.penalty * (1.0 if self.penalty_scales is None else self.penalty_scales.get(layer, 1.0))

    def penalty_over(self, thresholds: Iterable[tuple[str, Tensor]]) -> Tensor:
        """``sum c exp(-tau)`` over thresholds by name of their layer, each layer with its own c; a scalar.

        A c of 0 gives gradients of 0, also where ``exp(-tau)`` is infinite.
        """
        parts = []
        for name, tau in thresholds:
            if c := self.penalty_of(name):
                parts.append(c * penalty([tau]))
            else:
                parts.append(tau.masked_fill(torch.ones_like(tau, dtype=torch.bool), 0).sum())
        return torch.stack(parts).sum()


@dataclass(frozen=True)
class SGDOptions(_Checked):
    """Settings of one local training by ``torch.optim.SGD``.

    Args:
        lr: learning rate, finite, >= 0.
        momentum: in [0, 1).
        weight_decay: finite, >= 0; applies to thresholds too, as one parameter group of ``torch.optim.SGD`` does.
        max_grad_norm: largest global gradient norm over all parameters including thresholds, > 0; None does not clip.
        penalty: coefficient of ``sum exp(-tau)``, finite; any warm-up is already in it. A negative one pulls thresholds
            down, which a controller of the density needs.
        collapse_floor: density in [0, 1) at or below which a layer's thresholds are reset to 0 before its next
            forward (published code: 0.01); None switches the guard off.
        nesterov: Nesterov's momentum: ``p -= lr * (g + momentum * v)``; needs momentum.
        threshold_lr: learning rate of the thresholds, finite, >= 0; None: that of all else.
        penalty_scales: factors of the penalty's coefficient by name of threshold layer, finite; 1 for all others.

    Raises:
        ValueError: a value outside its range.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    penalty: float = 0.0
    collapse_floor: float | None = None
    nesterov: bool = False
    threshold_lr: float | None = None
    penalty_scales: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        self._check_common()
        self._check("momentum", "a number in [0, 1)", lambda v: 0 <= v < 1)
        if self.nesterov and not self.momentum:
            raise ValueError(f"nesterov needs a momentum > 0; got momentum = {self.momentum!r}")

    def state_like(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the form that the momentum has; what is in them does not matter."""
        return dict(parameters)

    def fresh_state(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The momentum before the first step: zeros; nothing without momentum."""
        return {name: torch.zeros_like(p) for name, p in parameters.items()} if self.momentum else {}


@dataclass(frozen=True)
class AdamOptions(_Checked):
    """Settings of one local training by ``torch.optim.Adam`` or ``AdamW``.

    Args:
        lr: learning rate, finite, >= 0.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, finite, > 0.
        weight_decay: finite, >= 0; applies to thresholds too. Adam adds it to the gradient; with ``decoupled`` it
            shrinks the parameters instead, which is AdamW.
        max_grad_norm, penalty, collapse_floor, threshold_lr, penalty_scales: as in :class:`SGDOptions`.
        decoupled: AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Raises:
        ValueError: a value outside its range.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    penalty: float = 0.0
    collapse_floor: float | None = None
    decoupled: bool = False
    threshold_lr: float | None = None
    penalty_scales: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        self._check_common()
        self._check("eps", "a finite number > 0", lambda v: v > 0)
        pair = tuple(self.betas) if isinstance(self.betas, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in pair):
            raise ValueError(f"betas must be two numbers in [0, 1); got {self.betas!r}")

    def state_like(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`SGDOptions.state_like`."""
        return {
            f"{kind}.{name}": torch.empty((), dtype=torch.float32, device=p.device) if kind == "step" else p
            for name, p in parameters.items()
            for kind in _ADAM_STATE
        }

    def fresh_state(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state before the first step: zeros."""
        return {key: torch.zeros_like(t) for key, t in self.state_like(parameters).items()}


Options = SGDOptions | AdamOptions

_ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


def _never_compiled(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """``kind`` without what keeps PyTorch's compiler out of its methods.

    For that the compiler is imported, two seconds and a hundred megabytes for every process that takes a step; nothing
    is compiled here.
    """

    def plain(name: str) -> Any:
        method = getattr(kind, name)
        return getattr(method, "__wrapped__", method)

    step = torch.no_grad()(plain("step"))
    methods = {name: plain(name) for name in ("add_param_group", "zero_grad")}
    return type(kind.__name__, (kind,), {"step": step, "__doc__": kind.__doc__, **methods})


_SGD, _ADAM, _ADAMW = map(_never_compiled, (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW))


def torch_optimiser(
    options: Options, parameters: Mapping[str, Tensor], thresholds: Collection[str], state: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """The optimiser that defines what a step does, working on ``state`` in place.

    Args:
        parameters: those that are trained, by name.
        thresholds: names of those that ``threshold_lr`` is for.
        state: in the form of :meth:`SGDOptions.state_like`; of SGD without momentum it is not looked at.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters.values())}]
    if options.threshold_lr is not None:
        apart = [p for name, p in parameters.items() if name in thresholds]
        others = [p for name, p in parameters.items() if name not in thresholds]
        groups = [{"params": others}, {"params": apart, "lr": options.threshold_lr}]
    groups = [group for group in groups if group["params"]]
    optimiser: torch.optim.Optimizer
    if isinstance(options, SGDOptions):
        optimiser = _SGD(
            groups,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov,
        )
        if options.momentum:
            for name, p in parameters.items():
                optimiser.state[p]["momentum_buffer"] = state[name]
        return optimiser
    first, second = options.betas
    kind = _ADAMW if options.decoupled else _ADAM
    optimiser = kind(groups, lr=options.lr, betas=(first, second), eps=options.eps, weight_decay=options.weight_decay)
    for name, p in parameters.items():
        own = {key: state[f"{key}.{name}"] for key in _ADAM_STATE}
        own["step"] = own["step"].cpu()  # where torch.optim counts steps, whatever the device
        optimiser.state[p].update(own)
    return optimiser


def write_back(optimiser: torch.optim.Optimizer, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Complete ``state`` where the optimiser has worked on copies: the counts of steps, off the CPU."""
    for name, p in parameters.items():
        if f"step.{name}" in state and "step" in optimiser.state[p]:
            state[f"step.{name}"].copy_(optimiser.state[p]["step"])

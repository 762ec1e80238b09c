"""Budgets in place of the penalty's coefficient: a controller at every client that steers its own coefficient.

A client knows its scores and the thresholds it receives. A constant coefficient ``c`` pushes every threshold along
``d tau / dt = c exp(-tau)``, so after ``S`` effective steps of learning rate ``lr`` it is at ``log(exp(tau) + A)`` with
``A = c lr S``, and filter ``i`` is pruned where ``exp(s_i) - exp(tau_i) <= A``. That is the *model* of a turn: it says
what densities a push ``A``, the same for all layers, leads to, and by :func:`predicted` what is spent with them. The
client takes the push that leads to what is asked for (:func:`push_for`), and so ``c``. A layer that has few filters
left is pushed no further than to its last :data:`SPARED` share, two at least, and is pulled back where it has fewer:
the data might do the rest, and the collapse guard would bring all of the layer back. It then has a smaller coefficient
than the other layers.

A negative push pulls thresholds down. No coefficient does that: the equation runs away to minus infinity below 0, the
faster the lower a threshold is, and the data may take one there. A pull is made before the first step (:func:`pushed`),
and ends at 0. For as long as nothing pushes, nothing keeps the data from lowering thresholds either, and from -14, say,
one step of a penalty would throw a threshold far above all scores, for good: a steered turn begins with none below
:data:`FLOOR`.

The model leaves out what the data do to weights and thresholds. So what is asked for is not the budget but a *set
point* per client that is corrected after every turn by what the turn has brought (:func:`corrected`):
``p <- p (budget / measured) ** gain``, an integral controller in the logarithm. The gain is a half for density, half of
what would correct an error in one turn, and two fifths for operations and time, which are those of the whole turn, its
beginning included. The set point is clipped to [1e-3, 4]: above 1, where nothing would be pruned at the end of a turn,
thresholds are pulled down as many times as far, and earlier. A turn asks for at most a factor :data:`RATE` more or less
than the last one, so that a model is not cut down at once. While this or the layers' last filters limit a turn, the set
point stands still: it would run away from what can be had.

Operations and time are spent from the first step on. Where their budgets differ by class of device, a client receives
thresholds that are between what the classes need, and what a constant coefficient does in a turn comes too late. Such a
client makes the whole push before its first step (:func:`pushed`) and trains without a penalty: the coefficient that
would have made it in the turn is what the metrics say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spafl_kernels.training import SGDOptions

from ..budgets import EVERYBODY, FIGURES, KINDS, Kind, by_class
from ..errors import UserError
from .client import Client, steps_of_momentum

__all__ = [
    "FLOOR",
    "SPARED",
    "Budget",
    "Push",
    "Steering",
    "asked_for",
    "budget_for",
    "check_skips",
    "check_target",
    "corrected",
    "densities_of",
    "first_set_point",
    "predicted",
    "push_for",
    "pushed",
    "reached",
    "share_of_dense",
    "travel_of",
]

GAIN: dict[Kind, float] = {"density": 0.5, "macs": 0.4, "seconds": 0.4}
RATE = 0.95
LOWEST, HIGHEST = 1e-3, 4.0
SPARED = 0.02
FLOOR = -1.0
"""About where the lowest thresholds are that training with a constant coefficient leaves."""


@dataclass(frozen=True)
class Budget:
    """What a client may spend.

    Args:
        kind: ``density``: active filters after a turn, mean over layers; ``macs``: multiply-accumulates of a turn, as a
            share of those of the unpruned model; ``seconds``: modelled time of a turn on the client's device.
        value: of it.
    """

    kind: Kind
    value: float


@dataclass(frozen=True)
class Steering:
    """How a turn is steered.

    Args:
        set_point: what has to be asked for to meet the budget, as far as the client knows.
        asked: what this turn asks for.
        limited: the layers' last filters keep the turn from it.
        coefficient: of the penalty.
        scales: factors of it by layer; None: 1.
        ahead: the push was made before the first step, in the coefficient's place, as every pull is.
    """

    set_point: float
    asked: float
    limited: bool
    coefficient: float
    scales: dict[str, float] | None
    ahead: bool = False


def first_set_point(budget: Budget) -> float:
    """Where a client begins; of time it knows nothing."""
    return 1.0 if budget.kind == "seconds" else budget.value


def check_target(table: Mapping[str, Any]) -> None:
    """Check ``algorithm.target``: one budget for all, or one by class of device.

    Raises:
        ValueError: it is neither; one sentence.
    """
    if not by_class(table):
        _check_budget(table, "")
        return
    for name, budget in table.items():
        if not isinstance(budget, Mapping):
            raise ValueError(f"a budget for all and budgets by class of device cannot be mixed; {name} is no class")
        _check_budget(budget, f"{name}: ")


def _check_budget(table: Mapping[str, Any], where: str) -> None:
    if len(table) != 1 or next(iter(table)) not in KINDS:
        given = ", ".join(map(str, table)) or "nothing"
        raise ValueError(f"{where}a budget is one of density, macs, seconds; got {given}")
    kind, value = next(iter(table.items()))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value <= (1e9 if kind == "seconds" else 1)):
        raise ValueError(
            f"{where}{kind} must be {'a number of seconds above 0' if kind == 'seconds' else 'a number in (0, 1]'}; "
            f"got {value!r}"
        )


def budget_for(target: Mapping[str, Any] | None, device: str | None) -> Budget | None:
    """The budget of a client on a class of device; None: it has none, and the coefficient is the penalty's."""
    if target is None:
        return None
    if by_class(target):
        target = target.get(device) if device is not None else None
        if target is None:
            return None
    kind, value = next(iter(target.items()))
    return Budget(kind, float(value))  # type: ignore[arg-type]


def reached(
    target: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], classes: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """What clients with a budget have spent, by class of device; :data:`~spafl.budgets.EVERYBODY` where there is one
    budget for all.

    Args:
        lines: the metrics of a run; the mean is over the turns of the last tenth of the rounds, rounded up.
        classes: the class of every client, if devices are modelled.
    """
    found: dict[str, dict[str, Any]] = {}
    classed = by_class(target)
    for name in target if classed else (EVERYBODY,):
        budget = budget_for(target, name if classed else None)
        assert budget is not None
        spent = []
        for line in lines[len(lines) - -(-len(lines) // 10) :]:
            turns = line.get("turns") or {"clients": []}
            for k, value in zip(turns["clients"], turns.get(FIGURES[budget.kind], ()), strict=False):
                if value is not None and (not classed or (classes is not None and classes[k] == name)):
                    spent.append(value)
        mean = sum(spent) / len(spent) if spent else None
        found[name] = {"kind": budget.kind, "budget": budget.value, "reached": mean, "turns": len(spent)}
    return found


def densities_of(scores: Sequence[Tensor], thresholds: Sequence[Tensor]) -> list[float]:
    """Share of active filters of every layer."""
    return [(s > t).double().mean().item() for s, t in zip(scores, thresholds, strict=True)]


def predicted(kind: Kind, densities: Sequence[float], macs: Sequence[float]) -> float:
    """What is spent with some densities, as a share of what the unpruned model spends; increasing in all of them.

    The mean density; or operations as in a chain of layers, whose filters read the active ones of the layer before.

    Args:
        densities: of the threshold layers in registration order.
        macs: dense multiply-accumulates of each.
    """
    if kind == "density":
        return sum(densities) / len(densities)
    parts = zip(macs, densities, [1.0, *densities], strict=False)
    return sum(cost * own * before for cost, own, before in parts) / sum(macs)


@dataclass(frozen=True)
class Push:
    """How far the thresholds of a turn are pushed.

    Args:
        common: ``A`` of the module's text.
        layers: that of every layer; the common one, or less where a layer's last filters are spared.
        limited: it does not lead to what was asked, because of these.
    """

    common: float
    layers: tuple[float, ...]
    limited: bool


def push_for(
    scores: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    spent: Callable[[Sequence[float]], float],
    asked: float,
    spared: float = 0.0,
) -> Push:
    """The push after which ``spent`` of the layers' densities is nearest to ``asked``.

    Of all pushes that prune the same filters it is the smallest that stays clear of both ends.

    Args:
        scores, thresholds: ``(filters,)`` of every layer.
        spent: increasing in every density.
        asked: what it should be; above 1, the pull that revives all filters is so many times as strong.
        spared: a layer keeps more than this share of its filters, and two of them at least, where it has so many.
    """
    margins = [
        (s.double().exp() - t.double().exp()).sort().values.cpu() for s, t in zip(scores, thresholds, strict=True)
    ]
    ordered = torch.cat(margins).sort().values
    expendable = [len(m) - min(len(m), max(2, int(spared * len(m)) + 1)) for m in margins]

    def after(pruned: int) -> float:
        """What is spent when the filters of so many smallest margins are pruned, but for those that are spared."""
        gone = [int(torch.searchsorted(m, ordered[pruned - 1], right=True)) if pruned else 0 for m in margins]
        rest = zip(gone, expendable, margins, strict=True)
        return spent([1 - min(n, most) / len(m) for n, most, m in rest])

    more, asked = max(asked, 1.0), min(asked, 1.0)
    low, high = 0, len(ordered) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if after(middle) <= asked else (middle + 1, high)
    limited = after(low) > asked
    if low and abs(after(low - 1) - asked) < abs(after(low) - asked):
        low -= 1
    common = _push_between(ordered, low)
    if more > 1:
        limited |= common >= 0  # nothing is pruned, and nothing more can be had
        common *= more if common < 0 else 1.0
    own = (_most(m, n) for m, n in zip(margins, expendable, strict=True))
    return Push(common, tuple(min(common, most) for most in own), limited)


def pushed(threshold: Tensor, push: float) -> Tensor:
    """Thresholds after a push made at once: ``log(exp(tau) + A)``.

    A pull ends at 0, below which there are no scores; what is below it already stays.
    """
    t = threshold.double()
    moved = (t.exp() + push).clamp_min(torch.finfo(torch.float64).tiny).log()
    return torch.maximum(moved, t.clamp_max(0.0)).to(threshold.dtype)


def _push_between(ordered: Tensor, pruned: int) -> float:
    """The smallest push that prunes so many filters and stays clear of the next of either side."""
    below = ordered[pruned - 1].item() if pruned else -math.inf
    above = ordered[pruned].item()
    clear = 0.25 * (above - below) if pruned else 1e-6 * (1 + abs(above))
    return min(max(0.0, below + clear), above - clear)


def _most(margins: Tensor, expendable: int) -> float:
    """The push that leaves a layer the filters that are spared."""
    above = margins[expendable].item()
    return above - 1e-6 * (1 + abs(above)) if not expendable else (margins[expendable - 1].item() + above) / 2


def asked_for(set_point: float, before: float, arrived: float) -> float:
    """What a turn asks for: the set point, at most a factor :data:`RATE` from where the client is on its way.

    Args:
        before: what the last turn was asked for; what it has brought may be far from it, where the data resist.
        arrived: with the thresholds it has received.
    """
    return min(max(set_point, RATE * min(before, arrived)), max(before, arrived) / RATE, HIGHEST)


def corrected(set_point: float, asked: float, budget: Budget, measured: float) -> float:
    """The set point after a turn that was asked for ``asked`` and has brought ``measured`` of what the budget is of."""
    if asked != set_point or not measured > 0:
        return set_point
    return min(max(set_point * (budget.value / measured) ** GAIN[budget.kind], LOWEST), HIGHEST)


def travel_of(client: Client, round: int, moving: bool) -> float:
    """How far a constant gradient of 1 moves a threshold in a turn of SGD as planned; ``moving``: momentum is there
    already."""
    options, steps = client.local.options_at(round), client.planned_steps
    assert isinstance(options, SGDOptions)
    rate = options.rate_of_thresholds
    if moving:
        return rate * steps / (1 - options.momentum)
    return rate * steps_of_momentum(steps, options.momentum, options.nesterov)


def share_of_dense(client: Client, macs: int) -> float:
    """Multiply-accumulates of a turn as a share of what the unpruned model would have taken.

    Raises:
        UserError: see :func:`check_skips`.
    """
    check_skips(client)
    return macs / (client.dense_macs() * client.samples_done)


def check_skips(client: Client) -> None:
    """Refuse an engine that computes pruned filters too, where the budget is of what is executed.

    Raises:
        UserError: it does; says why it runs.
    """
    if client.trainer.engine == "masked":
        raise UserError(
            "algorithm.target: macs and seconds need an engine that leaves pruned filters out, and the masked one "
            f"runs ({client.trainer.reason}); density is what it can steer"
        )

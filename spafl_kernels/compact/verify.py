"""The engine checks itself: what was captured is compared with the masked model before it is used.

On float64 copies, on the first real batch, under random masks that stay clear of ties, with parameters moved away from
the values (zero biases, unit scales) at which a mistake would not show: outputs, every gradient, every buffer.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..layers import ThresholdLayer
from ..reference import WINDOW
from ..training import Given, MaskedTrainer, SGDOptions, Trainer
from .graph.flow import Flow
from .graph.trace import copy_of, kept_random_state
from .graph.watch import Modes, set_modes

__all__ = ["Verify", "check_verify", "compared", "differs", "differs_in_training", "twins"]

Verify = Literal["first", "always", "never"]

TOLERANCE = 1e-9
COARSE = 1e-3  # where the model itself computes with fewer digits
SAMPLES = 4
# One set of masks, not two, for models whose step costs more multiply-adds a sample than this.
LARGE = 30_000_000
OPTIONS = SGDOptions(lr=1e-3, momentum=0.9, weight_decay=0.01, penalty=0.01)


def check_verify(verify: str) -> Verify:
    if verify not in get_args(Verify):
        raise ValueError(f"verify must be one of {', '.join(get_args(Verify))}; got {verify!r}")
    return verify  # type: ignore[return-value]


class _Digits(TorchDispatchMode):
    """Notes whether something is computed in fewer digits than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.fewer = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see :class:`spafl_kernels.flops.Counter`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64:
                self.fewer = True
        return result


def twins(model: nn.Module, seed: int, density: float, far: bool) -> nn.Module:
    """A float64 copy of ``model`` with parameters moved a little, and random masks."""
    twin = copy_of(model).double()
    device = next(twin.parameters()).device
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(device)

    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.grad = None
            if name.rsplit(".", 1)[-1] == "threshold" or not p.is_floating_point():
                continue
            value = torch.nan_to_num(p, 0.0, 0.0, 0.0)
            size = value.std() if value.numel() > 1 else value.abs().mean()
            size = size if size > 0 else torch.full_like(size, 0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
            p.data = value + 0.3 * size * noise(p)
        for m in twin.modules():
            if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None:
                assert m.running_var is not None
                m.running_mean.copy_(torch.nan_to_num(m.running_mean, 0.0, 0.0, 0.0) + 0.3 * noise(m.running_mean))
                m.running_var.copy_((0.3 * noise(m.running_var)).exp())
        for m in twin.modules():
            if not isinstance(m, ThresholdLayer):
                continue
            scores = m.scores()
            rows = len(scores)
            active = torch.rand(rows, generator=generator) < density
            order = torch.randperm(rows, generator=generator)
            active[order[0]] = True
            if rows > 1:
                active[order[1]] = False
            active = active.to(device)
            m.threshold.data = torch.where(active, 0.9 * scores, 1.1 * scores + 0.01)
            if far and rows > 3:
                m.threshold.data[order[2]] = scores[order[2]] + 1.5 * WINDOW
                m.threshold.data[order[3]] = scores[order[3]] - 1.5 * WINDOW
    return twin


def _samples(flow: Flow, tensors: Sequence[Tensor], seed: int) -> Iterator[list[Tensor]]:
    """A few samples of the batch, or one of one sample so many times; then all of it if the model does not take those.

    All of it at once where there are several tensors, for it is a guess which of them are by sample.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(tensors) == 1:
        (t,), (i,) = tensors, flow.inputs
        part = t.detach()[:SAMPLES] if i.batched else t.detach()
        yield [_moved(part if len(part) > 1 else torch.cat([part] * SAMPLES), generator)]
    yield [_moved(t.detach(), generator) for t in tensors]


def _moved(part: Tensor, generator: torch.Generator) -> Tensor:
    if part.is_floating_point():
        part = torch.nan_to_num(part.double(), 0.0, 0.0, 0.0)
        size = part.std() if part.numel() > 1 else part.new_ones(())
        size = torch.where(size > 0, size, torch.ones_like(size))
        noise = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.device)
        part = part + 0.1 * size * noise  # no ties in a max-pool
    return part.clone()


def _floats(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    elif dataclasses.is_dataclass(value):
        value = list(vars(value).values())
    return [t for v in value for t in _floats(v)] if isinstance(value, (list, tuple)) else []


class _Functional:
    """A loss whose gradient with regard to every number of the output is random; it keeps the outputs."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.outputs: list[Tensor] = []

    def __call__(self, out: Any, y: Any) -> Tensor:
        parts = _floats(out)
        self.outputs += [t.detach().clone() for t in parts]
        generator = torch.Generator().manual_seed(self.seed)
        sums = [(t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)).sum() for t in parts]
        return torch.stack(sums).sum() / max(1, sum(t.numel() for t in parts)) ** 0.5


def _apart(what: str, ours: Tensor | None, right: Tensor | None, tolerance: float) -> str | None:
    if ours is None or right is None:
        ours = torch.zeros_like(right) if ours is None and right is not None else ours
        right = torch.zeros_like(ours) if right is None and ours is not None else right
        if ours is None or right is None:
            return None
    if ours.shape != right.shape:
        return f"{what} has shape {tuple(ours.shape)}, not {tuple(right.shape)}"
    if ours.dtype != right.dtype:
        return f"{what} is {ours.dtype}, not {right.dtype}"
    if not right.numel():
        return None
    difference = (ours.double() - right.double()).abs().max()
    scale = max(1.0, float(right.double().abs().max()))
    if not bool(difference <= tolerance * scale):
        return f"{what} differs by {float(difference):.2g}"
    return None


class _NotComparable(Exception):
    """The masked model does not run on a float64 copy, or gives what is not finite."""


def _masked(run: Callable[[], Any], losses: list[_Functional]) -> tuple[Any, float]:
    """What the masked model gives, and how closely it can be compared with."""
    with _Digits() as digits:
        try:
            result = run()
        except Exception as error:
            raise _NotComparable(f"which fails on a copy: {error}") from error
    if not all(bool(t.isfinite().all()) for t in losses[0].outputs):
        raise _NotComparable("whose output is not finite")
    return result, COARSE if digits.fewer else TOLERANCE


def _over_rounds(
    flow: Flow,
    tensors: Sequence[Tensor],
    gradients: bool,
    compare: Callable[[nn.Module, list[Tensor], int], str | None],
    which: tuple[int, ...] | None = None,
) -> str | None:
    """The first thing that ``compare`` finds, with copies under random masks and a part of the batch."""
    if any(not len(t) for i, t in zip(flow.inputs, tensors) if i.batched):
        return None
    macs = sum(op.macs for op in flow.ops.values())
    macs += sum(op.module.weight.numel() * op.positions for op in flow.layers.values())
    which = which or ((0,) if macs > LARGE else (0, 1))
    rounds = [((1, 0.5, True), (2, 0.3, False))[i] for i in which]
    plain: Any = contextlib.nullcontext()
    kind = tensors[0].device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        plain = torch.autocast(kind, enabled=False)
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), kept_random_state(), plain:
        for seed, density, far in rounds:
            twin, found = twins(flow.model, seed, density, far), ""
            for part in _samples(flow, tensors, seed):
                try:
                    result = compare(twin, part, seed)
                except _NotComparable as error:
                    found = found or f"it could not be compared with the masked model, {error}"
                    continue
                if result is not None:
                    return result
                found = ""
                break
            if found:
                return found
    return None


def differs_in_training(
    flow: Flow, tensors: Sequence[Tensor], multiple: int, compiled: bool, patience: float
) -> str | None:
    """What a step or an evaluation of the compact trainer does otherwise than the masked one, in words.

    Args:
        flow: of the model, for training.
        tensors: those of a batch.
        multiple, compiled, patience: of the trainer.
    """
    from .trainer import CompactTrainer  # it calls this

    trace, modes = flow.trace, flow.trace.modes[0]

    def compare(twin: nn.Module, parts: list[Tensor], seed: int) -> str | None:
        losses = [_Functional(seed), _Functional(seed)]
        part = trace.form.given(parts)
        model, other = copy.deepcopy(twin), copy.deepcopy(twin)
        masked = MaskedTrainer(model, losses[0])
        masked.counts_macs = False  # nobody asks for them, and to count takes as long as the step
        (state, momentum), tolerance = _masked(lambda: _train(masked, modes, part, seed), losses)
        try:
            set_modes(other, modes)
            trainer = CompactTrainer(other, losses[1], True, multiple, compiled, patience, "never", trace.on(other))
            ours, velocity = _train(trainer, modes, part, seed)
        except Exception as error:
            return f"it fails where the masked model does not: {error}"
        if (found := _outputs(losses[0].outputs, losses[1].outputs, tolerance)) is not None:
            return f"{found}{_where(flow, twin, parts, tolerance)}"
        gradients = (_apart(f"the gradient of {n!r}", velocity.get(n), v, tolerance) for n, v in momentum.items())
        states = (_apart(f"{n!r} after a step", ours.get(n), v, tolerance) for n, v in state.items())
        return next((found for found in (*gradients, *states) if found is not None), None)

    return _over_rounds(flow, tensors, True, compare)


def differs(
    flow: Flow,
    tensors: Sequence[Tensor],
    ours: Callable[[nn.Module, list[Tensor]], Any],
    gradients: bool,
    rounds: tuple[int, ...] | None = None,
) -> str | None:
    """What a program for one pattern of modes does otherwise than the model itself, in words.

    Args:
        flow: of the model.
        tensors: those that the model is called with.
        ours: gives the program's output for a copy of the model and such tensors.
        gradients: compare gradients too.
        rounds: which sets of masks; by default both, of a large model the first.
    """
    (modes,), form = flow.trace.modes, flow.trace.form

    def compare(twin: nn.Module, parts: list[Tensor], seed: int) -> str | None:
        losses = [_Functional(seed), _Functional(seed)]
        models = [copy.deepcopy(twin), copy.deepcopy(twin)]
        inputs = [[t.clone().requires_grad_(gradients and t.is_floating_point()) for t in parts] for _ in models]
        for model in models:
            set_modes(model, modes)

        def right(tensors: list[Tensor]) -> Any:
            args, kwargs = form.call(tensors)
            return models[0](*args, **kwargs)

        def run(i: int, forward: Callable[[list[Tensor]], Any]) -> None:
            torch.manual_seed(seed)
            value = losses[i](forward(inputs[i]), None)
            if gradients and value.requires_grad:
                value.backward()

        _, tolerance = _masked(lambda: run(0, right), losses)
        try:
            run(1, lambda t: ours(models[1], t))
        except Exception as error:
            return f"it fails where the model itself does not: {error}"
        if (found := _outputs(losses[0].outputs, losses[1].outputs, tolerance)) is not None:
            return f"{found}{_where(flow, twin, parts, tolerance)}"
        pairs = [(f"the gradient of {n!r}", q.grad, p.grad) for (n, p), q in _pairs(models, "named_parameters")]
        pairs += [("the gradient of the input", b.grad, a.grad) for a, b in zip(*inputs)]
        pairs += [(f"buffer {n!r}", u, t) for (n, t), u in _pairs(models, "named_buffers")]
        return next((found for p in pairs if (found := _apart(*p, tolerance)) is not None), None)

    return _over_rounds(flow, tensors, gradients, compare, rounds)


def _pairs(models: list[nn.Module], kind: str) -> Iterator[tuple[tuple[str, Tensor], Tensor]]:
    first, second = (getattr(m, kind)() for m in models)
    for named, (_, tensor) in zip(first, second, strict=True):
        yield named, tensor


def _outputs(right: list[Tensor], ours: list[Tensor], tolerance: float) -> str | None:
    if len(right) != len(ours):
        return "the output has other parts than the masked model's"
    found = (_apart("the output", b, a, tolerance) for a, b in zip(right, ours))
    return next((f for f in found if f is not None), None)


def compared(ours: Callable[[], Any], right: Callable[[], Any], tolerance: float) -> str | None:
    """Two outputs, drawing the same random numbers."""
    values = []
    for run in (ours, right):
        torch.manual_seed(0)
        values.append(_floats(run()))
    return _outputs(values[1], values[0], tolerance)


def _train(trainer: Trainer, modes: Modes, x: Given, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A step and an evaluation; all that the model and the momentum are afterwards."""
    model = trainer.model
    trainer.begin(OPTIONS)
    set_modes(model, modes)
    torch.manual_seed(seed)
    trainer.step(x, None)
    torch.manual_seed(seed)
    label = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        trainer.evaluate(x, label)
    except TypeError:  # the output has no classes in dimension 1
        model.train()
    result = trainer.finish()
    momentum = {name: v.clone() for name, v in result.momentum.items()}
    state = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    return state, momentum


def _where(flow: Flow, twin: nn.Module, tensors: Sequence[Tensor], tolerance: float) -> str:
    """The first operation whose value differs, if that shows in a plain run."""
    from .values import first_difference  # it runs what calls this

    try:
        name = first_difference(flow, twin, tensors, tolerance)
    except Exception:  # no more than a help for the reader
        name = None
    return "" if name is None else f", first at {name}"

"""What the host does for one threshold layer on a GPU, in microseconds: ``python -m benchmarks.gpu.host``.

Needs no GPU: :mod:`benchmarks.gpu.pretended` says what is real and what is not. Layers are called as a user calls them,
``layer(x)`` and ``y.backward(gradient)``; they are small, so that nothing else takes time. Figures are the least and
the median of many calls, in one thread, forward and backward.

=========  =========================================================================================================
``whole``  the layer, in a loop that gives its gradients back after every call
``parts``  what launches the kernels, called alone: results and scratch memory allocated, C launchers called
``rest``   the difference: the module's call, checks, choice of backend, autograd
``share``  one of the layers of a model of equal layers, whose backward pass is called once for all
``floor``  a layer that computes nothing: a module with the same parameters that calls a
           :class:`torch.autograd.Function`, which allocates a result and gradients. No layer costs less
=========  =========================================================================================================

``alone``: the layer makes its own threshold pass. ``shared``: within an open
:class:`spafl_kernels.shared_pass.SharedPass`, which is opened once. ``no grad``: forward alone under
:func:`torch.no_grad`. ``operator``: through the dispatcher, as under a mode or a transform.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from spafl_kernels import ThresholdConv2d, ThresholdLinear, eager
from spafl_kernels.gpu import arguments, direct
from spafl_kernels.shared_pass import SharedPass

from . import pretended


@dataclasses.dataclass(frozen=True)
class Time:
    """Of many calls, in microseconds."""

    least: float
    median: float

    def __sub__(self, other: Time) -> Time:
        return Time(self.least - other.least, self.median - other.median)

    def __add__(self, other: Time) -> Time:
        return Time(self.least + other.least, self.median + other.median)

    def __truediv__(self, parts: int) -> Time:
        return Time(self.least / parts, self.median / parts)

    def __str__(self) -> str:
        return f"{self.least:6.1f} {self.median:6.1f}"


def times(repeats: int, *parts: Callable[[Any], Any], after: Callable[[], None] = lambda: None) -> list[Time]:
    """The times of calls that follow each other, each given what the one before returned; ``after`` is not timed."""
    found: list[list[float]] = [[] for _ in parts]
    for _ in range(repeats):
        value = None
        for part, into in zip(parts, found, strict=True):
            began = time.perf_counter_ns()
            value = part(value)
            into.append((time.perf_counter_ns() - began) / 1e3)
        after()
    return [Time(min(each), statistics.median(each)) for each in found]


class _Nothing(torch.autograd.Function):
    """Memory for a result and for gradients, and no work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor, shape: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, weight, threshold, bias)
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *(torch.empty_like(t) for t in ctx.saved_tensors), None


class Floor(nn.Module):
    """A layer that computes nothing, with the parameters of ``layer`` and results of ``shape``."""

    def __init__(self, layer: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.weight, self.threshold, self.bias, self.shape = layer.weight, layer.threshold, layer.bias, shape

    def forward(self, x: Tensor) -> Tensor:
        return _Nothing.apply(x, self.weight, self.threshold, self.bias, self.shape)


def _reset(layer: nn.Module, x: Tensor) -> None:
    for tensor in (x, *layer.parameters()):
        tensor.grad = None


def whole(layer: nn.Module, x: Tensor, repeats: int) -> tuple[Time, Time]:
    """A layer's call, and the backward pass from it."""
    gradient = torch.empty_like(layer(x).detach())
    forward, backward = times(
        repeats, lambda _: layer(x), lambda y: y.backward(gradient), after=lambda: _reset(layer, x)
    )
    return forward, backward


def parts(layer: ThresholdConv2d | ThresholdLinear, x: Tensor, repeats: int, selected: bool) -> tuple[Time, Time]:
    """What launches the kernels of a layer's call, on its tensors."""
    geometry = None
    if isinstance(layer, nn.Conv2d):
        steps = layer.stride, layer.padding, layer.dilation
        geometry = arguments.geometry((1, *x.shape), (1, *layer.weight.shape), *steps)
    x, weight, threshold, bias = (t.detach() for t in (x, layer.weight, layer.threshold, layer.bias))
    call = direct.Call(x, weight, threshold, bias, geometry, "identity", False, False)
    y, selection, packed = call.forward(x, weight, threshold, bias, None, None)
    given = (selection, packed) if selected else (None, None)
    gradient = torch.empty_like(y)
    call.backward(gradient, x, weight, packed, selection, bias, True, True)
    forward, backward = times(
        repeats,
        lambda _: call.forward(x, weight, threshold, bias, *given),
        lambda _: call.backward_again(gradient, x, weight, packed, selection, bias),
    )
    return forward, backward


@contextlib.contextmanager
def through_the_dispatcher() -> Iterator[None]:
    """No call is plain: layers take the operators."""
    with mock.patch.object(eager, "unseen", lambda: False):
        yield


def row(name: str, found: tuple[Time, Time], launches: tuple[int, int] | None = None) -> str:
    forward, backward = found
    count = "" if launches is None else f"   {launches[0]} + {launches[1]} launches"
    return f"  {name:<18}{forward} |{backward} |{forward + backward}{count}"


def launched(layer: nn.Module, x: Tensor) -> tuple[int, int]:
    """Kernels launched forward and backward."""
    before = pretended.launches()
    y = layer(x)
    between = pretended.launches()
    y.backward(torch.empty_like(y))
    return between - before, pretended.launches() - between


def report(layer: ThresholdConv2d | ThresholdLinear, x: Tensor, repeats: int) -> Iterator[str]:
    """The rows of one layer."""
    yield row("floor", whole(Floor(layer, layer(x).shape), x, repeats))
    densities = torch.empty(1, dtype=torch.float64)
    shared = SharedPass([layer])
    for name, context in (("alone", contextlib.nullcontext()), ("shared", shared.open(densities))):
        with context:
            selected = name == "shared"
            launched(layer, x)  # compiled and remembered
            total, inner = whole(layer, x, repeats), parts(layer, x, repeats, selected)
            yield row(f"{name}: whole", total, launched(layer, x))
            yield row(f"{name}: parts", inner)
            yield row(f"{name}: rest", (total[0] - inner[0], total[1] - inner[1]))
    with torch.no_grad():
        (forward,) = times(repeats, lambda _: layer(x))
    yield f"  {'alone: no grad':<18}{forward}"
    with through_the_dispatcher():
        launched(layer, x)
        yield row("alone: operator", whole(layer, x, repeats))


DEPTH = 8


def stacked(layers: Sequence[Any], x: Tensor, repeats: int) -> Iterator[str]:
    """A layer's share of a model of some layers, alone and with a shared pass (its opening is not timed), and floor."""
    model, densities = nn.Sequential(*layers), torch.empty(len(layers), dtype=torch.float64)
    floors = nn.Sequential(*(Floor(layer, x.shape) for layer in layers))
    for name, net in (("floor", floors), ("alone", model), ("shared", model)):
        with SharedPass(layers).open(densities) if name == "shared" else contextlib.nullcontext():
            launched(net, x)
            forward, backward = whole(net, x, repeats)
            yield row(f"{name}: share", (forward / len(layers), backward / len(layers)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1000, help="calls per figure (default 1000)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    layers: dict[str, tuple[Any, Tensor]] = {
        "convolution, 6 to 16 channels 5x5, batch 4, channels last": (
            ThresholdConv2d(6, 16, 5).to(memory_format=torch.channels_last),
            torch.randn(4, 6, 14, 14).to(memory_format=torch.channels_last),
        ),
        "linear, 120 to 84, batch 4": (ThresholdLinear(120, 84), torch.randn(4, 120)),
    }
    stacks: dict[str, tuple[Callable[[], Any], Tensor]] = {
        f"one of {DEPTH} convolutions of 16 channels 3x3, batch 4, channels last": (
            lambda: ThresholdConv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last),
            torch.randn(4, 16, 8, 8).to(memory_format=torch.channels_last),
        ),
        f"one of {DEPTH} linear layers of 84, batch 4": (lambda: ThresholdLinear(84, 84), torch.randn(4, 84)),
    }
    print(f"microseconds, least and median of {options.repeats} calls: forward | backward | both")
    with pretended.device():
        for name, (layer, x) in layers.items():
            print(name)
            for line in report(layer, x.requires_grad_(), options.repeats):
                print(line, flush=True)
        for name, (layer, x) in stacks.items():
            print(name)
            for line in stacked([layer() for _ in range(DEPTH)], x.requires_grad_(), options.repeats // 2):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

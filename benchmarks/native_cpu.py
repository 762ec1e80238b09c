"""The compiled CPU operators against torch's operators.

One thread, and its CPU time, which a busy machine disturbs less than the clock on the wall. Rivals run in turns in one
process; a figure is the median over the rounds of (time of ours / time of torch in the same round), with its quartiles.
Nothing is timed before outputs and gradients agree. Convolution, pooling and norm are called as an engine calls them,
by the autograd functions, without checks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import common
from spafl_kernels import native, ops

Call = Callable[[], Any]


def agree(what: str, ours: Any, theirs: Any, rtol: float = 2e-4, atol: float = 1e-3) -> None:
    """The gate: raise unless two nested results are equal to rounding."""
    try:
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    except AssertionError as error:
        raise SystemExit(f"benchmarks: {what} is wrong, nothing is timed: {error}") from None


Case = tuple[str, str, dict[str, Call]]


def _conv_case(batch: int, channels: int, size: int, filters: int, kernel: int, padding: int, inner: bool) -> Case:
    """One convolution with ReLU and 2x2 max-pool; ``inner`` layers need an input gradient."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, size, size, requires_grad=inner)
    weight = torch.randn(filters, channels, kernel, kernel) / (channels * kernel * kernel) ** 0.5
    leaves = [weight.requires_grad_(), torch.randn(filters).mul_(0.1).requires_grad_()]
    wanted = [*leaves, x] if inner else leaves
    grad = torch.randn_like(ops.conv_relu_pool(x, *leaves, padding))

    def ours() -> Any:
        y = ops.DirectConvReluPool.apply(x, *leaves, padding, padding, 2)
        return y, torch.autograd.grad(y, wanted, grad)

    def plain() -> Any:
        y = F.max_pool2d(F.relu(F.conv2d(x, *leaves, padding=padding)), 2)
        return y, torch.autograd.grad(y, wanted, grad)

    def reordered() -> Any:
        y = F.relu(F.max_pool2d(F.conv2d(x, *leaves, padding=padding), 2))
        return y, torch.autograd.grad(y, wanted, grad)

    agree("conv_relu_pool", ours(), plain())
    name = f"batch {batch}, {channels}x{size}x{size} -> {filters}, {kernel}x{kernel}, pad {padding}"
    operator = "conv_relu_pool inner" if inner else "conv_relu_pool first"
    return operator, name, {"ours": ours, "torch": plain, "torch, relu last": reordered}


def convolutions() -> Iterator[Case]:
    for filters in (2, 5, 10, 20, 32, 64):
        yield _conv_case(64, 1, 28, filters, 5, 0, False)
    yield _conv_case(16, 1, 28, 20, 5, 0, False)
    yield _conv_case(1, 1, 28, 20, 5, 0, False)
    yield _conv_case(64, 3, 32, 32, 3, 1, False)
    yield _conv_case(64, 3, 32, 64, 5, 2, False)
    for channels, filters in ((2, 5), (5, 12), (10, 25), (16, 32), (20, 50)):
        yield _conv_case(64, channels, 12, filters, 5, 0, True)


def pools() -> Iterator[Case]:
    for batch, channels, size in [(64, 50, 8), (64, 24, 8), (64, 8, 8), (16, 64, 32), (64, 32, 16)]:
        torch.manual_seed(0)
        x = torch.randn(batch, channels, size, size, requires_grad=True)
        grad = torch.randn_like(ops.relu_pool(x))

        def ours(x: Tensor = x, grad: Tensor = grad) -> Any:
            y = ops.DirectReluPool.apply(x, 2)
            return y, torch.autograd.grad(y, x, grad)

        def plain(x: Tensor = x, grad: Tensor = grad) -> Any:
            y = F.max_pool2d(F.relu(x), 2)
            return y, torch.autograd.grad(y, x, grad)

        def reordered(x: Tensor = x, grad: Tensor = grad) -> Any:
            y = F.relu(F.max_pool2d(x, 2))
            return y, torch.autograd.grad(y, x, grad)

        agree("relu_pool", ours(), plain(), 0, 0)
        rivals = {"ours": ours, "torch": plain, "torch, relu last": reordered}
        yield "relu_pool fwd+bwd", f"batch {batch}, {channels}x{size}x{size}", rivals


def norms() -> Iterator[Case]:
    """BatchNorm with ReLU in training, channels last as Conv4 and ResNet-18 run; then with the max-pool behind them."""
    maps = [(8, 28, 1), (16, 28, 1), (64, 28, 1), (16, 8, 1), (128, 8, 1), (16, 32, 1), (64, 32, 1), (128, 4, 1)]
    for channels, size, pool in [*maps, (16, 1, 1), (8, 24, 2), (16, 24, 2), (64, 24, 2), (16, 4, 2)]:
        torch.manual_seed(0)
        x = torch.randn(16, channels, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
        leaves = [x, torch.rand(channels).requires_grad_(), torch.randn(channels).mul_(0.1).requires_grad_()]
        mine, other = ([torch.zeros(channels), torch.ones(channels)] for _ in range(2))
        grad = torch.randn(16, channels, size // pool, size // pool).contiguous(memory_format=torch.channels_last)

        def ours(
            leaves: list[Tensor] = leaves, running: list[Tensor] = mine, grad: Tensor = grad, pool: int = pool
        ) -> Any:
            y = ops.DirectBatchNormRelu.apply(leaves[0], *running, *leaves[1:], True, 0.1, 1e-5, pool)
            return y, torch.autograd.grad(y, leaves, grad)

        def plain(
            leaves: list[Tensor] = leaves, running: list[Tensor] = other, grad: Tensor = grad, pool: int = pool
        ) -> Any:
            y = F.batch_norm(leaves[0], *running, *leaves[1:], True, 0.1, 1e-5)
            # As an engine runs it: in place, and behind the pool.
            y = torch.relu_(y if pool == 1 else F.max_pool2d(y, pool))
            return y, torch.autograd.grad(y, leaves, grad)

        # In float64: rounding passes a value next to 0 in one and blocks it in the other.
        exact = [
            [t.detach().double().requires_grad_() for t in leaves],
            [t.double() for t in mine],
            grad.double(),
            pool,
        ]
        agree("batch_norm_relu", ours(*exact), plain(*exact), 1e-9, 1e-9)
        ours(), plain()
        agree("batch_norm_relu", mine, other)
        name = f"batch 16, {channels}x{size}x{size}" + (f", pool {pool}" if pool > 1 else "")
        yield "batch_norm_relu fwd+bwd", name, {"ours": ours, "torch": plain}


def _backward(y: Tensor, leaves: list[Tensor], grad: Tensor) -> Any:
    return y, torch.autograd.grad(y, leaves, grad)


def streams() -> Iterator[Case]:
    """A compact output put onto a residual stream; torch: a product with the matrix that puts channels in place."""
    for width, kept, size, constants in (
        (32, 8, 32, 0),
        (64, 16, 16, 0),
        (128, 32, 8, 0),
        (256, 64, 4, 0),
        (32, 16, 32, 1),
    ):
        torch.manual_seed(0)
        order = torch.channels_last
        place = torch.randperm(width)[:kept].sort().values
        dropped = torch.ones(width, dtype=torch.bool).index_fill(0, place, False).nonzero().flatten()
        x = torch.randn(16, kept, size, size).contiguous(memory_format=order).requires_grad_()
        stream = torch.randn(16, width, size, size).contiguous(memory_format=order).requires_grad_()
        c = torch.randn(width - kept, requires_grad=True) if constants else None
        spread = torch.zeros(kept, width)
        spread[torch.arange(kept), place] = 1
        leaves = [x, stream] if c is None else [x, stream, c]
        grad = torch.randn_like(stream)

        def ours(
            x: Any = x, stream: Any = stream, c: Any = c, place: Any = place, n: int = width, g: Any = grad
        ) -> Any:
            y = ops.DirectExpandChannels.apply(x, place, n, 1, c, stream)
            return _backward(y, [x, stream] if c is None else [x, stream, c], g)

        def product(
            x: Any = x,
            s: Any = stream,
            c: Any = c,
            m: Any = spread,
            d: Any = dropped,
            g: Any = grad,
            leaves: Any = leaves,
        ) -> Any:
            flat, onto = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (x, s))
            if c is not None:
                onto = onto + torch.zeros(s.shape[1]).index_copy(0, d, c)
            y = torch.addmm(onto, flat, m).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
            return _backward(y, leaves, g)

        agree("expand_channels", ours(), product())
        name = f"batch 16, {kept} of {width} channels, {size}x{size}{', constants' if constants else ''}"
        yield "expand_channels", name, {"ours": ours, "torch": product}


IMAGE_CONVS = [  # in, size, out, kernel, stride, padding; ResNet-18 and Conv4 at densities .25, .1 and .5
    (3, 32, 8, 3, 1, 1), (8, 32, 8, 3, 1, 1), (32, 32, 8, 3, 1, 1), (32, 32, 16, 3, 2, 1), (16, 16, 16, 3, 1, 1),
    (64, 16, 16, 3, 1, 1), (32, 8, 32, 3, 1, 1), (64, 4, 64, 3, 1, 1), (3, 32, 16, 5, 1, 0), (16, 28, 16, 5, 1, 0),
    (16, 12, 32, 5, 1, 0), (8, 28, 8, 5, 1, 0), (6, 28, 6, 5, 1, 0), (6, 12, 13, 5, 1, 0), (13, 8, 13, 5, 1, 0),
    (64, 16, 6, 3, 1, 1), (64, 16, 13, 3, 1, 1), (128, 8, 26, 3, 1, 1), (256, 4, 51, 3, 1, 1), (128, 8, 26, 3, 2, 1),
]  # fmt: skip


def image_convs() -> Iterator[Case]:
    """Pass by pass; torch computes channels rounded up to eight, as an engine stores them."""
    for inputs, size, outputs, kernel, stride, padding in IMAGE_CONVS:
        torch.manual_seed(0)
        order, used = torch.channels_last, (inputs, outputs)
        stored = [n if n == 3 else -(-n // 8) * 8 for n in used]
        x = torch.zeros(16, stored[0], size, size).contiguous(memory_format=order)
        x[:, :inputs] = torch.randn(16, inputs, size, size)
        weight = torch.zeros(stored[1], stored[0], kernel, kernel)
        weight[:outputs, :inputs] = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel * kernel) ** 0.5
        grad = torch.randn_like(F.conv2d(x, weight, None, stride, padding))
        grad[:, outputs:] = 0
        options = (stride, stride, padding, padding, *used)
        back = (x, weight, None, (stride, stride), (padding, padding), (1, 1), False, (0, 0), 1)

        def torchs(mask: list[bool], grad: Tensor = grad, back: Any = back) -> Call:
            return lambda: next(g for g in torch.ops.aten.convolution_backward(grad, *back, mask) if g is not None)

        rivals: dict[str, tuple[Call, Call]] = {
            "image_conv": (
                lambda x=x, w=weight, o=options: torch.ops.spafl.image_conv(x, w, None, *o),
                lambda x=x, w=weight, s=stride, p=padding: F.conv2d(x, w, None, s, p),
            ),
            "image_conv grad input": (
                lambda g=grad, w=weight, n=size, o=options: torch.ops.spafl.image_conv_grad_input(g, w, n, n, *o),
                torchs([True, False, False]),
            ),
            "image_conv grad weight": (
                lambda g=grad, x=x, w=weight, o=options: torch.ops.spafl.image_conv_grad_weight(g, x, w, *o, False)[0],
                torchs([False, True, False]),
            ),
        }
        taken = ops.image_passes(16, *used, torch.float)
        for (operator, (ours, theirs)), takes in zip(rivals.items(), taken):
            agree(operator, ours(), theirs(), 1e-3, 1e-3)
            name = f"b16, {inputs}x{size}x{size} -> {outputs}, {kernel}x{kernel}, stride {stride}"
            yield operator, name + ("" if takes else " (not used)"), {"ours": ours, "torch": theirs}


LENET = [(20, 25), (50, 500), (500, 800), (10, 500)]
CONV4 = [(64, 75), (64, 1600), (128, 1600), (128, 3200), (256, 2048), (128, 256), (10, 128)]


def model(name: str, shapes: list[tuple[int, int]], density: float) -> tuple[str, list[Tensor], list[Tensor]]:
    """Weights and thresholds of a model of ``shapes`` (filters, row length), its layers thinned on both sides."""
    torch.manual_seed(0)
    thin = [
        (max(1, round(o * (density if i + 1 < len(shapes) else 1))), max(1, round(n * (density if i else 1))))
        for i, (o, n) in enumerate(shapes)
    ]
    weights = [torch.randn(s) / s[1] ** 0.5 for s in thin]
    return f"{name}, density {density:g}", weights, [torch.full((len(w),), 0.01) for w in weights]


MODELS = [("LeNet-5", LENET, d) for d in (1.0, 0.5, 0.25, 0.1)] + [("Conv4", CONV4, d) for d in (1.0, 0.25)]


def threshold_passes() -> Iterator[Case]:
    for arguments in MODELS:
        name, weights, thresholds = model(*arguments)

        def buffers(weights: list[Tensor] = weights) -> tuple[list[Tensor], list[Tensor]]:
            return [w.new_zeros(len(w)) for w in weights], [torch.zeros(len(w), dtype=torch.bool) for w in weights]

        mine, other = buffers(), buffers()
        lengths = [w.shape[1] for w in weights]

        def ours(w: list[Tensor] = weights, t: list[Tensor] = thresholds, b: Any = mine, n: list[int] = lengths) -> Any:
            return ops.threshold_pass(w, t, *b, n_in=n, backend="native", check=False)

        def plain(w: list[Tensor] = weights, t: list[Tensor] = thresholds, b: Any = other) -> Any:
            return ops.threshold_pass(w, t, *b, backend="torch", check=False)

        ours(), plain()
        agree("threshold_pass", mine, other)
        yield "threshold_pass", name, {"ours": ours, "torch": plain}


def steps() -> Iterator[Case]:
    for arguments in MODELS:
        name, weights, thresholds = model(*arguments)
        options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "penalty": 1e-3, "max_norm": 10.0}
        gradients = [torch.randn_like(w) * 1e-3 for w in weights]

        def rows(weights: list[Tensor] = weights, thresholds: list[Tensor] = thresholds) -> ops.FilterRows:
            return ops.FilterRows(
                [w.clone() for w in weights], [t.clone() for t in thresholds], [w.new_zeros(len(w)) for w in weights],
                [torch.zeros(len(w), dtype=torch.bool) for w in weights], [w.shape[1] for w in weights],
                weight_momenta=[torch.zeros_like(w) for w in weights],
                threshold_momenta=[torch.zeros_like(t) for t in thresholds],
            )  # fmt: skip

        mine, other = rows(), rows()
        # Both get fresh gradients every time: the step uses them up.
        scratch = [[g.clone() for g in gradients] for _ in range(2)]
        dots = [g.new_empty(0) for g in gradients]

        def run(
            state: ops.FilterRows,
            use: list[Tensor],
            backend: Any,
            gradients: list[Tensor] = gradients,
            options: dict[str, Any] = options,
            dots: list[Tensor] = dots,
        ) -> Any:
            torch._foreach_copy_(use, gradients)
            return ops.threshold_step(state, use, dots=dots, backend=backend, check=False, **options)

        def ours(run: Callable[..., Any] = run, state: Any = mine, use: list[Tensor] = scratch[0]) -> Any:
            return run(state, use, "native")

        def plain(run: Callable[..., Any] = run, state: Any = other, use: list[Tensor] = scratch[1]) -> Any:
            return run(state, use, "torch")

        agree("threshold_step", ours(), plain())
        agree(
            "threshold_step",
            [mine.weights, mine.thresholds, mine.scores],
            [other.weights, other.thresholds, other.scores],
        )
        yield "threshold_step", name, {"ours": ours, "torch": plain}


KEY = ("operator", "case", "rival")
SUITES = {
    "conv": convolutions, "pool": pools, "norm": norms, "stream": streams, "image": image_convs,
    "pass": threshold_passes, "step": steps,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.native_cpu", __doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--only", choices=SUITES, help="one suite instead of all")
    args = parser.parse_args(argv)
    if not ops.ready():
        raise SystemExit(f"benchmarks: {native.why_not()}")
    if args.quick:
        args.rounds, args.only = 2, "pass"
    rows = common.start(args, KEY)
    print(f"torch {torch.__version__}, kernels: {native.cpu_isa()}, one thread, {args.rounds} rounds")
    for suite in [args.only] if args.only else SUITES:
        for operator, case, rivals in SUITES[suite]():
            times = common.in_turns(common.evenly(rivals, time.thread_time), args.rounds)
            for rival in [name for name in rivals if name != "ours"]:
                low, middle, high = common.over(times["ours"], times[rival])
                ours, theirs = (statistics.median(times[name]) * 1e3 for name in ("ours", rival))
                note = "" if middle < 1 else "   SLOWER"
                print(
                    f"{operator:23} {case:44} x{middle:.3f} of {rival} ({low:.3f} .. {high:.3f}); "
                    f"{ours:.3f} ms against {theirs:.3f} ms{note}",
                    flush=True,
                )
                names = ("ratio", "ratio_q1", "ratio_q3", "ours_ms", "rival_ms")
                figures = {n: f"{v:.4f}" for n, v in zip(names, (middle, low, high, ours, theirs))}
                rows.add({"operator": operator, "case": case, "rival": rival, **figures})
    return 0


if __name__ == "__main__":
    common.alone(main)

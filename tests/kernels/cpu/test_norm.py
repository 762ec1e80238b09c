"""BatchNorm with ReLU, and with the max-pool behind it, against torch's chain of operators."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.nn import functional as F

from spafl_kernels import native, ops
from spafl_kernels.cpu import norm

ROWS, LAST = torch.contiguous_format, torch.channels_last

# Input shape and pool. Channels below, at, above and between the vector lengths; planes of less than a vector, of a few
# and of many; two values per channel; more rows than are summed in float32 without a pause.
SHAPES = [
    ((2, 1, 1, 1), 1),
    ((2, 3, 1, 1), 1),
    ((1, 7, 1, 2), 1),
    ((17, 8, 1, 1), 1),
    ((3, 9, 5, 7), 1),
    ((2, 64, 3, 5), 1),
    ((2, 65, 3, 3), 1),
    ((1, 1, 40, 41), 1),
    ((5, 24, 8, 8), 1),
    ((3, 16, 28, 28), 1),
    ((1, 2, 70, 150), 1),
    ((40, 40, 9, 9), 1),
    ((16, 8), 1),
    ((2, 13), 1),
    ((300, 128), 1),
    ((4, 9, 11), 1),
    ((3, 8, 24, 24), 2),  # Conv4's second layer
    ((1, 8, 2, 2), 2),  # one window, half an AVX-512 vector
    ((3, 24, 2, 6), 2),  # an odd number of half vectors
    ((2, 64, 4, 4), 2),
    ((2, 16, 66, 70), 2),
    ((2, 40, 9, 3), 3),
    ((2, 8, 7, 5), 2),  # rows and columns that fill no window: PyTorch's pool
]
# With both memory orders, where there are two.
CASES = [
    pytest.param(shape, pool, order, id=f"{shape}-{pool}-{name}")
    for shape, pool in SHAPES
    for name, order in (("rows", ROWS), ("last", LAST))
    if order is ROWS or len(shape) == 4
]


def inputs(shape, dtype, order, mean=0.0, seed=0):
    """Leaves (input, weight, bias), running mean and variance."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, dtype=torch.float64, generator=generator).to(dtype)  # noqa: E731
    x = make(*shape) + mean
    x = x.contiguous(memory_format=order) if len(shape) == 4 else x
    c = shape[1]
    return [x, make(c), make(c)], make(c), make(c).abs() + 0.1


def chain(leaves, mean, var, training, momentum=0.1, eps=1e-5, pool=1):
    x, weight, bias = leaves
    y = F.relu(F.batch_norm(x, mean, var, weight, bias, training, momentum, eps))
    return y if pool == 1 else F.max_pool2d(y, pool)


def run(function, leaves, mean, var, dtype=None):
    """Output, gradients of the leaves that are not None, running statistics; in ``dtype``."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in leaves]
    mean, var = (None if t is None else t.to(dtype or t.dtype, copy=True) for t in (mean, var))
    y = function(leaves, mean, var)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
    return [y.detach(), *grads, *(t for t in (mean, var) if t is not None)]


def ours(backend="native", training=True, momentum=0.1, eps=1e-5, pool=1):
    return lambda leaves, mean, var: ops.batch_norm_relu(
        leaves[0], mean, var, leaves[1], leaves[2], training, momentum, eps, pool, backend
    )


def theirs(**options):
    return lambda leaves, mean, var: chain(leaves, mean, var, **options)


def compare(have, want, tolerance):
    """Errors against the size of what is added up: an input gradient can cancel to nothing."""
    for a, e in zip(have, want, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a.to(e.dtype), e, rtol=tolerance, atol=tolerance * max(1.0, e.abs().max().item()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "pool", "order"), CASES)
def test_float64_equals_chain(shape, pool, order, training, backend, poison):
    leaves, mean, var = inputs(shape, torch.float64, order)
    backend = "auto" if pool > 1 and backend == "native" else backend
    have = run(ours(backend, training, pool=pool), leaves, mean, var)
    eps_free = 1e-12 if shape[0] * shape[-1] > 2 else 1e-10  # two values: the gradient is what eps leaves of 0
    compare(have, run(theirs(training=training, pool=pool), leaves, mean, var), eps_free)
    if len(shape) == 4:
        assert have[0].is_contiguous(memory_format=order) and have[1].is_contiguous(memory_format=order)


@pytest.mark.parametrize(("shape", "pool", "order"), CASES[6:])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_float32_is_as_accurate_as_torch(shape, pool, order, mean, backend, poison):
    """Errors against float64 on the same numbers, ours and torch's."""
    state = inputs(shape, torch.float32, order, mean)
    backend = "auto" if pool > 1 and backend == "native" else backend
    have, exact = run(ours(backend, pool=pool), *state), run(theirs(training=True, pool=pool), *state, torch.float64)
    rival = run(theirs(training=True, pool=pool), *state)
    for a, b, e in zip(have, rival, exact, strict=True):
        # A value next to 0 is passed by one and blocked by the other: count those, and measure the rest.
        mine, other = ((t - e).abs() / max(1.0, e.abs().max().item()) for t in (a, b))
        flips = mine.numel() // 10_000
        worst = mine.flatten().sort().values[-1 - flips].item()
        assert worst <= max(2e-6 * (1 + mean), 2 * other.max().item())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_float64_equals_chain_on_any_shape(data):
    if not native.available():
        pytest.skip(native.why_not())
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    shape = (pick(1, 5), pick(1, 70), pick(1, 12), pick(2, 12))
    order, training = data.draw(st.sampled_from([ROWS, LAST])), data.draw(st.booleans())
    state = inputs(shape, torch.float64, order, seed=pick(0, 100))
    compare(run(ours("native", training), *state), run(theirs(training=training), *state), 1e-10)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pooled_float64_equals_chain_on_any_shape(data):
    if not native.available():
        pytest.skip(native.why_not())
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    pool, training = pick(2, 3), data.draw(st.booleans())
    shape = (pick(1, 4), 8 * pick(1, 6), pool * pick(1, 5), pool * pick(1, 5))
    leaves, mean, var = inputs(shape, torch.float64, LAST, seed=pick(0, 100))
    leaves[0] = leaves[0].mul(2).round()  # ties
    have = run(ours("native" if norm.pools(leaves[0], pool) else "auto", training, pool=pool), leaves, mean, var)
    compare(have, run(theirs(training=training, pool=pool), leaves, mean, var), 1e-10)


@pytest.mark.parametrize("order", [ROWS, LAST], ids=["rows", "last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_optional_tensors(order, dtype, backend):
    """Without weight, without bias, without running statistics; all are torch's."""
    leaves, mean, var = inputs((3, 9, 5, 4), dtype, order)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for some in ([leaves[0], None, None], [leaves[0], leaves[1], None], [leaves[0], None, leaves[2]]):
        for statistics in ((mean, var), (None, None)):
            compare(run(ours(backend), some, *statistics), run(theirs(training=True), some, *statistics), tolerance)
        compare(run(ours(backend, False), some, mean, var), run(theirs(training=False), some, mean, var), tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics(momentum, backend):
    """The unbiased variance, mixed in double and rounded once."""
    (x, weight, bias), mean, var = inputs((4, 8, 3, 3), torch.float64, LAST, mean=2.0)
    want_mean = momentum * x.mean((0, 2, 3)) + (1 - momentum) * mean
    want_var = momentum * x.var((0, 2, 3), unbiased=True) + (1 - momentum) * var
    ops.batch_norm_relu(x, mean, var, weight, bias, True, momentum, backend=backend)
    compare([mean, var], [want_mean, want_var], 1e-14)


@pytest.mark.parametrize("order", [ROWS, LAST], ids=["rows", "last"])
@pytest.mark.parametrize("value", [0.0, 0.1, -7e3, 1e30])
def test_a_constant_channel_gives_beta(order, value, extension):
    """Its variance is 0 and its normalised value 0, exactly: what the compact engine says of a dropped channel."""
    x = torch.full((3, 8, 7, 5), value).contiguous(memory_format=order).requires_grad_()
    weight, bias = torch.randn(8), torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    mean, var = torch.zeros(8), torch.ones(8)
    y = ops.batch_norm_relu(x, mean, var, weight, bias, True, 1.0, backend="native")
    assert torch.equal(y, bias.clamp(min=0).view(-1, 1, 1).expand_as(y))
    assert torch.equal(mean, torch.full((8,), value)) and torch.equal(var, torch.zeros(8))


@pytest.mark.parametrize("order", [ROWS, LAST], ids=["rows", "last"])
def test_a_large_mean_does_not_cancel(order, extension):
    """Values of 1e4 +- 1: sums of squares in float32 would leave nothing of the variance."""
    (x, _, _), mean, var = inputs((8, 8, 16, 16), torch.float32, order, mean=1e4)
    ops.batch_norm_relu(x, mean, var, training=True, momentum=1.0, backend="native")
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", [ROWS, LAST], ids=["rows", "last"])
def test_outliers_do_not_cancel(order, extension):
    """The numbers near which moments are taken are no typical ones."""
    x = torch.randn(4, 8, 20, 20, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 1e3
    x = x.contiguous(memory_format=order)
    mean, var = torch.zeros(8), torch.zeros(8)
    ops.batch_norm_relu(x, mean, var, training=True, momentum=1.0, backend="native")
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("pool", [1, 2])
def test_relu_at_zero_passes_no_gradient(pool, backend):
    x = torch.zeros(2, 8, 4, 4).contiguous(memory_format=LAST).requires_grad_()
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    running = torch.zeros(8), torch.ones(8)
    for training in (True, False):
        y = ops.batch_norm_relu(x, *running, weight, bias, training, pool=pool, backend=backend)
        for grad in torch.autograd.grad(y.sum(), (x, weight, bias)):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("order", [ROWS, LAST], ids=["rows", "last"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (5, 8, 6, 6), (3, 24, 3, 5)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 2)], ids=str)
def test_non_finite_values(shape, order, value, place, backend):
    """A channel that is not finite is what torch makes of it, and no other channel hears of it."""
    leaves, mean, var = inputs(shape, torch.float64, order)
    leaves[0][place[0], 1, place[1], place[2]] = value
    have, want = run(ours(backend), leaves, mean, var), run(theirs(training=True), leaves, mean, var)
    assert want[0][:, 1].isnan().all()
    for a, e in zip(have, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_with_a_pool(value, backend):
    leaves, mean, var = inputs((3, 24, 2, 6), torch.float64, LAST)
    leaves[0][2, 23, 1, 5] = value  # in the last half of an AVX-512 vector
    have = run(ours(backend, pool=2), leaves, mean, var)
    want = run(theirs(training=True, pool=2), leaves, mean, var)
    for a, e in zip(have, want, strict=True):
        dim = 0 if a.dim() == 1 else 1
        a, e = (t.narrow(dim, 0, 23) for t in (a, e))
        assert a.isfinite().all()
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert have[0][:, 23].isnan().all() and have[1][:, 23].isnan().all() and have[2][23].isnan()


def test_an_output_of_nan_passes_the_gradient(backend):
    """threshold_backward blocks where y <= 0, and NaN is not."""
    x = torch.randn(4, 8, dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64)
    bias[3] = float("nan")
    have = run(ours(backend), [x, None, bias], None, None)
    want = run(theirs(training=True), [x, None, bias], None, None)
    for a, e in zip(have, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert have[0][:, 3].isnan().all() and have[1][:, 3].isfinite().all()


def test_ties_go_to_the_first_position(backend):
    x = torch.zeros(1, 8, 4, 4, dtype=torch.float64)
    x[:, :, 2:] = 1.0
    leaves = [x.contiguous(memory_format=LAST), None, torch.ones(8, dtype=torch.float64)]
    running = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    have = run(ours(backend, False, pool=2), leaves, *running)
    for a, e in zip(have, run(theirs(training=False, pool=2), leaves, *running), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-15, atol=0)
    assert torch.equal(have[1][0, 0] != 0, torch.tensor([[1, 0, 1, 0], [0] * 4, [1, 0, 1, 0], [0] * 4]).bool())


@pytest.mark.parametrize("pool", [1, 2])
def test_other_strides(pool, backend):
    """Neither order, sliced, expanded: input and output gradient are brought in order."""
    (x, weight, _), *_ = inputs((4, 6, 16, 16), torch.float64, ROWS)
    leaves = [x.permute(0, 2, 3, 1)[:, ::2, ::2], weight[:1].expand(8), torch.ones(16).double()[::2]]
    assert norm._dense(leaves[0]) is not leaves[0]
    function = ours("auto" if pool == 2 and backend == "native" else backend, pool=pool)
    compare(run(function, leaves, None, None), run(theirs(training=True, pool=pool), leaves, None, None), 1e-12)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_()
    want = chain([x, None, None], None, None, True, pool=pool).sum()
    have = ops.batch_norm_relu(x, None, None, training=True, pool=pool, backend=backend).sum()  # gradient of stride 0
    compare(torch.autograd.grad(have, x), torch.autograd.grad(want, x), 1e-12)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(pool, training, extension):
    leaves, mean, var = inputs((3, 8, 4, 4), torch.float64, LAST)
    leaves = [t.requires_grad_() for t in leaves]
    statistics = (None, None) if training else (mean, var)

    def function(x, weight, bias):
        return ops.batch_norm_relu(x, *statistics, weight, bias, training, pool=pool, backend="native")

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("direct", [True, False])
def test_second_derivatives(direct, extension):
    """Torch's operators make the graph of the gradient."""
    leaves, mean, var = inputs((3, 3), torch.float64, ROWS)
    leaves = [t.requires_grad_() for t in leaves]

    def function(x, weight, bias):
        if direct:
            return norm.DirectBatchNormRelu.apply(x, None, None, weight, bias, True, 0.1, 1e-5, 1)
        return ops.batch_norm_relu(x, mean, var, weight, bias, backend="native")

    assert torch.autograd.gradgradcheck(function, leaves)


def test_opcheck(extension):
    for shape, order, pool in [
        ((2, 8, 4, 6), LAST, 1),
        ((2, 8, 4, 6), LAST, 2),
        ((2, 3, 5, 4), ROWS, 1),
        ((4, 5), ROWS, 1),
    ]:
        (x, weight, bias), mean, var = inputs(shape, torch.float32, order)
        y, stats = extension.batch_norm_relu(x, weight, bias, None, None, 1e-5, pool)
        library.opcheck(extension.batch_norm_relu.default, (x, weight, bias, None, None, 1e-5, pool))
        library.opcheck(extension.batch_norm_relu.default, (x, None, None, mean, var, 1e-5, pool))
        for training in (True, False):
            given = (torch.randn_like(y), x, weight, bias, stats, training, pool)
            library.opcheck(extension.batch_norm_relu_grad.default, given)
        options = (mean.clone(), var.clone(), 0.1, 1e-5, pool)
        library.opcheck(extension.batch_norm_relu_train.default, (x, weight, bias, *options))


def test_compiles_without_graph_breaks(extension):
    (x, weight, bias), mean, var = inputs((2, 8, 4, 4), torch.float32, LAST)
    compiled = torch.compile(
        lambda x: ops.batch_norm_relu(x, mean, var, weight, bias, True), backend="aot_eager", fullgraph=True
    )
    want = chain([x, weight, bias], mean.clone(), var.clone(), True)
    torch.testing.assert_close(compiled(x), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": torch.zeros(3)}, "2 to 4 dimensions"),
        ({"input": torch.zeros(1, 8, 1, 1)}, "more than 1 value per channel"),
        ({"weight": torch.zeros(7)}, r"weight must have shape \(8,\); got \(7,\)"),
        ({"running_mean": None}, "both be tensors or both be None"),
        ({"running_mean": None, "running_var": None, "training": False}, "needed unless training=True"),
        ({"pool": 4}, r"pool must be 1 \(none\), 2 or 3; got 4"),
        ({"pool": 3}, "pool 3 needs an input"),
        ({"backend": "cpp"}, "backend must be one of auto, native, torch"),
    ],
    ids=str,
)
def test_bad_input(arguments, message):
    good = {
        "input": torch.zeros(2, 8, 2, 2), "running_mean": torch.zeros(8), "running_var": torch.ones(8), "training": True
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.batch_norm_relu(**{**good, **arguments})


def test_native_is_refused_where_it_does_not_apply(extension):
    x = torch.randn(2, 8, 4, 4)
    with pytest.raises(RuntimeError, match="running statistics, which it updates in place, are not contiguous"):
        ops.batch_norm_relu(x, torch.zeros(16)[::2], torch.ones(16)[::2], training=True, backend="native")
    for bad, pool, message in [
        (x.bfloat16(), 1, r"float32 and float64, not torch\.bfloat16"),
        (x[:0], 1, "the input is empty"),
        (x, 2, "channels-last inputs of 8, 16"),
        (torch.randn(2, 7, 4, 4).contiguous(memory_format=LAST), 2, "channels-last inputs of 8, 16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.batch_norm_relu(bad, None, None, training=True, pool=pool, backend="native")
    torch.testing.assert_close(
        ops.batch_norm_relu(x, None, None, training=True, pool=2), chain([x, None, None], None, None, True, pool=2)
    )


def test_the_operators_check_their_arguments_themselves(extension):
    x = torch.randn(2, 8, 4, 4)
    last, c = x.contiguous(memory_format=LAST), torch.zeros(8)
    stats = extension.batch_norm_relu(x, None, None, None, None, 1e-5, 1)[1]
    for call, message in [
        (lambda: extension.batch_norm_relu(x.transpose(2, 3), None, None, None, None, 1e-5, 1), "must be contiguous"),
        (lambda: extension.batch_norm_relu(x, c.double(), None, None, None, 1e-5, 1), "weight must have the dtype"),
        (lambda: extension.batch_norm_relu(x, None, c[:7], None, None, 1e-5, 1), "bias must have 8 values; got 7"),
        (lambda: extension.batch_norm_relu(x, None, None, c, None, 1e-5, 1), "both be given"),
        (
            lambda: extension.batch_norm_relu(x[:1, :, :1, :1].contiguous(), None, None, None, None, 1e-5, 1),
            "more than 1",
        ),
        (lambda: extension.batch_norm_relu(x, None, None, None, None, 1e-5, 2), "channels-last input of 8"),
        (lambda: extension.batch_norm_relu_grad(last, x, None, None, stats, True, 1), "memory format of input"),
        (lambda: extension.batch_norm_relu_grad(last, last, None, None, stats, True, 2), "shape of the output"),
        (
            lambda: extension.batch_norm_relu_grad(x, x, None, None, stats[:2].contiguous(), True, 1),
            "stats must have 24",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa, extension):
    """The tests against torch, in a process of their own."""
    if isa == native.cpu_isa():
        pytest.skip("the tests of this file run it")
    if isa not in native.cpu_isas():
        pytest.skip("this machine cannot run it")
    tests = "(equals_chain or float32 or non_finite or constant or ties) and not any_shape and not torch-"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "SPAFL_CPU_ISA": isa}, timeout=300
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr

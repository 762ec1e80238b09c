"""The fused first layer and ReLU + max-pool against torch's own chain of operators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.nn import functional as F

from spafl_kernels import native, ops


def chain(x, w, b, padding, pool):
    return F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=padding)), pool)


def compare(x, w, b, padding, pool, backend, tolerance):
    """Outputs and all gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    bias = leaves[2] if b is not None else None
    expected = chain(leaves[0], leaves[1], bias, padding, pool)
    got = ops.conv_relu_pool(leaves[0], leaves[1], bias, padding, pool, backend)
    torch.testing.assert_close(got, expected, **tolerance)
    grad = torch.randn(expected.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad(expected, leaves, grad)
    have = torch.autograd.grad(got, leaves, grad)
    for a, e in zip(have, want):
        torch.testing.assert_close(a, e, **tolerance)


EXACT = {"rtol": 1e-12, "atol": 1e-12}

SHAPES = [  # batch, in, height, width, out, kernel, padding, pool
    (3, 1, 28, 28, 20, (5, 5), (0, 0), 2),  # LeNet-5's first layer
    (2, 3, 32, 32, 7, (3, 3), (1, 1), 2),
    (2, 1, 28, 28, 1, (5, 5), (2, 2), 2),
    (1, 2, 11, 23, 5, (4, 7), (2, 3), 3),
    (1, 8, 12, 13, 3, (11, 11), (5, 5), 2),
    (2, 1, 2, 2, 4, (1, 1), (0, 0), 2),  # one window
    (1, 1, 3, 7, 13, (2, 2), (0, 3), 2),
    (1, 5, 9, 9, 33, (3, 1), (4, 0), 3),  # padding wider than the kernel
    (1, 1, 1, 1, 2, (1, 1), (7, 7), 2),  # nearly all padding
    (0, 1, 8, 8, 3, (3, 3), (0, 0), 2),  # empty batch
    (35, 3, 7, 8, 5, (3, 3), (1, 1), 2),  # narrow maps: images side by side in a vector, and some left over
    (16, 12, 12, 12, 7, (5, 5), (0, 0), 2),  # LeNet-5's second layer
    (17, 2, 9, 6, 4, (2, 3), (1, 0), 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_float64_equals_chain(shape, with_bias, backend, poison):
    n, ci, h, w, co, kernel, padding, pool = shape
    torch.manual_seed(0)
    x, weight = torch.randn(n, ci, h, w, dtype=torch.double), torch.randn(co, ci, *kernel, dtype=torch.double)
    bias = torch.randn(co, dtype=torch.double) if with_bias else None
    compare(x, weight, bias, padding, pool, backend, EXACT)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_float64_equals_chain_on_any_shape(data):
    if not native.available():
        pytest.skip(native.why_not())
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    pool, kh, kw, ph, pw = pick(2, 3), pick(1, 11), pick(1, 11), pick(0, 3), pick(0, 3)
    h, w = pick(max(1, kh - 2 * ph + pool - 1), 24), pick(max(1, kw - 2 * pw + pool - 1), 40)
    torch.manual_seed(pick(0, 100))
    x = torch.randn(pick(1, 2), pick(1, 3), h, w, dtype=torch.double)
    weight = torch.randn(pick(1, 9), x.shape[1], kh, kw, dtype=torch.double)
    compare(x, weight, torch.randn(weight.shape[0], dtype=torch.double), (ph, pw), pool, "native", EXACT)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_float32(shape, backend, poison):
    n, ci, h, w, co, kernel, padding, pool = shape
    torch.manual_seed(0)
    x, weight, bias = torch.randn(n, ci, h, w), torch.randn(co, ci, *kernel), torch.randn(co)
    compare(x, weight, bias, padding, pool, backend, {"rtol": 1e-4, "atol": 2e-4})


def test_ties_go_to_the_first_position(backend):
    # Constant image: all four positions of a window are equal, and the bias keeps them alive.
    x = torch.ones(1, 1, 6, 6, dtype=torch.double, requires_grad=True)
    w = torch.ones(1, 1, 3, 3, dtype=torch.double)
    b = torch.ones(1, dtype=torch.double)
    (want,) = torch.autograd.grad(chain(x, w, b, 0, 2).sum(), x)
    (have,) = torch.autograd.grad(ops.conv_relu_pool(x, w, b, backend=backend).sum(), x)
    assert torch.equal(have, want)


def test_relu_at_zero_passes_no_gradient(backend):
    x = torch.zeros(1, 1, 6, 6, dtype=torch.double)
    w = torch.ones(2, 1, 3, 3, dtype=torch.double, requires_grad=True)
    b = torch.zeros(2, dtype=torch.double, requires_grad=True)
    for grad in torch.autograd.grad(ops.conv_relu_pool(x, w, b, backend=backend).sum(), (w, b)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("pool", [2, 3])
def test_nan_is_carried_on_as_torch_does(backend, pool):
    torch.manual_seed(0)
    x = torch.randn(2, 1, 16, 16, dtype=torch.double)
    x[0, 0, 5, 5] = float("nan")
    w = torch.randn(3, 1, 3, 3, dtype=torch.double, requires_grad=True)
    expected, got = chain(x, w, None, 0, pool), ops.conv_relu_pool(x, w, None, 0, pool, backend)
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(got, expected, equal_nan=True, **EXACT)
    # Backward: the dense operators also multiply the zeros of blocked positions by NaN; the kernel sees winners only.
    assert torch.autograd.grad(got.sum(), w)[0].isnan().any()


def test_an_infinite_gradient_stays_in_its_patch(backend):
    torch.manual_seed(0)
    x = torch.randn(1, 1, 12, 12, dtype=torch.double, requires_grad=True)
    w = torch.randn(2, 1, 5, 5, dtype=torch.double)
    b = torch.full((2,), 100.0, dtype=torch.double)  # nothing is blocked by ReLU
    grad = torch.zeros(1, 2, 4, 4, dtype=torch.double)
    grad[0, 1, 1, 2] = float("inf")
    (have,) = torch.autograd.grad(ops.conv_relu_pool(x, w, b, backend=backend), x, grad)
    assert (~have.isfinite()).sum() == 25


def test_non_contiguous_inputs(backend):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 10, 3, dtype=torch.double).permute(0, 3, 1, 2)
    w = torch.randn(3, 3, 3, 4, dtype=torch.double).transpose(0, 3)
    compare(x, w, torch.randn(8, dtype=torch.double)[::2], 0, 2, backend, EXACT)


def test_gradcheck(extension):
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((2, 2, 7, 6), (3, 2, 3, 2), (3,))]
    assert torch.autograd.gradcheck(lambda *a: ops.conv_relu_pool(*a, padding=(1, 0), backend="native"), leaves)
    assert torch.autograd.gradcheck(lambda x: ops.relu_pool(x, backend="native"), leaves[:1])


def test_opcheck(extension):
    x, w, b = torch.randn(2, 1, 8, 9), torch.randn(3, 1, 3, 3), torch.randn(3)
    y = ops.conv_relu_pool(x, w, b, backend="native")
    argmax = extension.conv_relu_pool(x, w, b, 0, 0, 2)[1]
    library.opcheck(extension.conv_relu_pool.default, (x, w, b, 0, 0, 2))
    grads = (torch.randn_like(y), x, w, argmax, 0, 0, 2)
    library.opcheck(extension.conv_relu_pool_grad_weight.default, grads)
    library.opcheck(extension.conv_relu_pool_grad_input.default, grads)
    library.opcheck(extension.relu_pool.default, (x, 2))
    codes = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    library.opcheck(extension.relu_pool_grad.default, (torch.randn(2, 1, 4, 4), codes, 8, 9, 2))


@pytest.mark.parametrize("name", ["batch_norm_relu", "conv_relu_pool", "expand_channels", "image_conv", "relu_pool"])
def test_a_derivative_is_written_once(name, extension):
    """In the autograd function; a second one in the dispatcher would be Python around every call of the kernel."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"spafl::{name}", "CPU")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"spafl::{name}", "AutogradCPU")


def test_transforms_take_the_twin(extension):
    x = torch.randn(2, 3, 6, 6)
    got, want = (torch.func.grad(lambda x, b=b: ops.relu_pool(x, 2, b).square().sum())(x) for b in ("auto", "torch"))
    assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match=r"relu_pool: backend='native' cannot be used: .*torch\.func"):
        torch.func.grad(lambda x: ops.relu_pool(x, 2, "native").sum())(x)


def test_compiles_without_graph_breaks(extension):
    w = torch.randn(3, 1, 3, 3)
    compiled = torch.compile(lambda x: ops.conv_relu_pool(x, w), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(compiled(x), chain(x, w, None, 0, 2))


@pytest.mark.parametrize("pool", [2, 3])
@pytest.mark.parametrize(
    "size", [(2, 3, 8, 8), (1, 2, 7, 11), (3, 1, 3, 3), (1, 1, 32, 33), (1, 4, 9, 64), (0, 2, 6, 6)]
)
def test_relu_pool(size, pool, backend, poison):
    torch.manual_seed(0)
    x = torch.randn(size, dtype=torch.double).round(decimals=0).requires_grad_()  # many ties and zeros
    expected = F.max_pool2d(F.relu(x), pool)
    got = ops.relu_pool(x, pool, backend)
    assert torch.equal(got, expected)
    grad = torch.randn_like(expected)
    assert torch.equal(torch.autograd.grad(got, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


def test_relu_pool_carries_nan(backend):
    x = torch.randn(1, 2, 8, 10)
    x[0, 0, 2:4, 2:4] = float("nan")
    x[0, 1, 3, 3] = float("nan")
    x.requires_grad_()
    expected, got = F.max_pool2d(F.relu(x), 2), ops.relu_pool(x, 2, backend)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=0)
    grad = torch.randn_like(expected)
    assert torch.equal(torch.autograd.grad(got, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ops.conv_relu_pool(x[0], w), "4 dimensions"),
        (lambda x, w: ops.conv_relu_pool(x, w[:, :0]), "input channels"),
        (lambda x, w: ops.conv_relu_pool(x, w, torch.zeros(9)), "bias must have shape"),
        (lambda x, w: ops.conv_relu_pool(x, w, pool=4), "pool must be 2 or 3; got 4"),
        (lambda x, w: ops.conv_relu_pool(x, w, padding=-1), "padding must not be negative"),
        (lambda x, w: ops.conv_relu_pool(x[..., :3], w), "too small"),
        (lambda x, w: ops.conv_relu_pool(x, w, backend="cpp"), "backend must be one of auto, native, torch"),
        (lambda x, w: ops.relu_pool(x[0]), "4 dimensions"),
        (lambda x, w: ops.relu_pool(x, 1), "pool must be 2 or 3"),
        (lambda x, w: ops.relu_pool(x[..., :1]), "too small"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 1, 8, 8), torch.randn(3, 1, 3, 3))


def test_native_is_refused_where_it_does_not_apply(extension):
    x, w = torch.randn(1, 65, 8, 8), torch.randn(3, 65, 3, 3)
    with pytest.raises(RuntimeError, match="up to 64 input channels, not 65"):
        ops.conv_relu_pool(x, w, backend="native")
    with pytest.raises(RuntimeError, match=r"float32 and float64, not torch\.bfloat16"):
        ops.relu_pool(x.bfloat16(), backend="native")
    torch.testing.assert_close(ops.conv_relu_pool(x, w), chain(x, w, None, 0, 2))


def test_the_operators_check_their_arguments_themselves(extension):
    x, w = torch.randn(2, 1, 8, 8), torch.randn(3, 1, 3, 3)
    with pytest.raises(RuntimeError, match="weight must have the dtype"):
        extension.conv_relu_pool(x, w.double(), None, 0, 0, 2)
    with pytest.raises(RuntimeError, match="input must be contiguous"):
        extension.conv_relu_pool(x.transpose(2, 3), w, None, 0, 0, 2)
    with pytest.raises(RuntimeError, match="shape of the output"):
        extension.conv_relu_pool_grad_weight(x, x, w, torch.zeros(2, 3, 3, 3, dtype=torch.uint8), 0, 0, 2)

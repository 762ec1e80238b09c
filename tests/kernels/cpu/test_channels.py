"""Compact channels among all channels, and their sum with a residual stream, against plain indexing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from spafl_kernels import native, ops
from spafl_kernels.cpu.channels import is_channels_last

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def plain(x, kept, width, dim, constants, stream):
    """One channel at a time."""
    stored = dict(zip(kept.tolist(), x.unbind(dim)))
    fill = {} if constants is None else dict(zip(sorted(set(range(width)) - set(stored)), constants.unbind()))
    zero = x.select(dim, 0) * 0  # of x, so that there is a gradient even if nothing is kept
    parts = [stored[c] if c in stored else zero + fill.get(c, 0) for c in range(width)]
    out = torch.stack(parts, dim)
    return out if stream is None else stream + out


def make(width, count, pads, rest, dim, constants, stream, last, dtype=torch.double, seed=0):
    """Leaves in a memory order: input, and constants and stream or None; and the kept channels."""
    torch.manual_seed(seed)
    kept = torch.randperm(width)[:count].sort().values

    def tensor(channels):
        t = torch.randn((*rest[:dim], channels, *rest[dim:]), dtype=dtype)
        return (t.contiguous(memory_format=torch.channels_last) if last else t).requires_grad_()

    x, base = tensor(count + pads), tensor(width) if stream else None
    c = torch.randn(width - count, dtype=dtype, requires_grad=True) if constants else None
    return kept, x, c, base


def compare(kept, x, c, base, width, dim, run, tolerance):
    leaves = [t for t in (x, c, base) if t is not None]
    want, have = plain(x, kept, width, dim, c, base), run(x, kept, width, dim, c, base)
    torch.testing.assert_close(have, want, rtol=0, atol=0)  # a copy or one sum: nothing to round differently
    grad = torch.randn(want.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    grad = grad.contiguous(memory_format=torch.channels_last) if is_channels_last(have) else grad
    expected = torch.autograd.grad(want, leaves, grad, allow_unused=True)
    for leaf, e, a in zip(leaves, expected, torch.autograd.grad(have, leaves, grad)):
        e = torch.zeros_like(leaf) if e is None else e
        torch.testing.assert_close(a, e, **(tolerance if leaf is c else {"rtol": 0, "atol": 0}))


SHAPES = [  # width, kept, padding channels, other dimensions, channel dimension
    (32, 8, 0, (3, 5, 4), 1),
    (64, 9, 7, (2, 4, 4), 1),
    (20, 3, 5, (1, 3, 3), 1),
    (7, 7, 0, (2, 3, 2), 1),  # nothing is dropped
    (33, 0, 1, (2, 3, 3), 1),  # nothing is kept
    (5, 2, 30, (2, 2, 3), 1),  # more padding than channels
    (200, 101, 3, (1, 2, 2), 1),
    (130, 1, 0, (700, 1, 1), 1),  # more positions than one block of a sum
    (16, 4, 0, (0, 4, 4), 1),  # empty batch
    (24, 6, 2, (4, 5), 2),  # tokens
    (12, 5, 3, (9,), 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_equals_plain_indexing(shape, last, constants, stream, backend, poison):
    width, count, pads, rest, dim = shape
    leaves = make(width, count, pads, rest, dim, constants, stream, last and len(rest) == 3)
    run = lambda *a: ops.expand_channels(*a, backend=backend)  # noqa: E731
    compare(*leaves, width, dim, run, EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_direct_function_in_float32(shape, last, extension, poison):
    width, count, pads, rest, dim = shape
    leaves = make(width, count, pads, rest, dim, True, True, last and len(rest) == 3, torch.float)
    compare(*leaves, width, dim, ops.DirectExpandChannels.apply, {"rtol": 1e-5, "atol": 1e-4})


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data):
    if not native.available():
        pytest.skip(native.why_not())
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    width = pick(1, 70)
    count = pick(0, width)
    rest = pick(1, 4), pick(1, 5), pick(1, 5)
    flags = [bool(pick(0, 1)) for _ in range(3)]
    leaves = make(width, count, pick(0 if count else 1, 9), rest, 1, *flags, seed=pick(0, 99))
    compare(*leaves, width, 1, lambda *a: ops.expand_channels(*a, backend="native"), EXACT)


@pytest.mark.parametrize("last", [False, True])
def test_nan_is_carried_where_it_is(backend, last):
    kept, x, c, base = make(20, 6, 2, (2, 3, 3), 1, True, True, last)
    with torch.no_grad():
        x[1, 2, 0, 1] = c[3] = base[0, 0, 2, 2] = float("nan")
        x[:, 6:] = float("nan")  # padding is not read
        have = ops.expand_channels(x, kept, 20, 1, c, base, backend)
        torch.testing.assert_close(have, plain(x, kept, 20, 1, c, base), rtol=0, atol=0, equal_nan=True)
    assert have.isnan().any() and not have.isnan().all()


def test_gradients_of_padding_are_zero(backend):
    kept, x, c, _ = make(40, 5, 14, (2, 3, 3), 1, True, False, True)
    (grad,) = torch.autograd.grad(ops.expand_channels(x, kept, 40, 1, c, backend=backend).sum(), x)
    assert torch.equal(grad[:, :5], torch.ones_like(grad[:, :5])) and not grad[:, 5:].any()


def test_orders_may_differ(extension):
    """The stream and the gradient come in whatever order; the result has that of the input."""
    kept, x, c, base = make(12, 5, 1, (2, 3, 4), 1, True, True, True)
    base = base.detach().contiguous().requires_grad_()
    for run in (ops.expand_channels, ops.DirectExpandChannels.apply):
        y = run(x, kept, 12, 1, c, base)
        assert is_channels_last(y) and torch.equal(y, plain(x, kept, 12, 1, c, base))
        grad = torch.randn(y.shape, dtype=y.dtype)
        want = torch.autograd.grad(plain(x, kept, 12, 1, c, base), (x, c, base), grad)
        for a, e in zip(torch.autograd.grad(y, (x, c, base), grad), want):
            torch.testing.assert_close(a, e, **EXACT)


def test_result_may_be_changed_in_place(extension):
    """A view made inside of an autograd function could not be."""
    kept, x, c, base = make(12, 5, 1, (2, 3, 4), 1, True, True, True)
    y = torch.relu_(ops.DirectExpandChannels.apply(x, kept, 12, 1, c, base))
    want = torch.relu(plain(x, kept, 12, 1, c, base))
    for a, e in zip(torch.autograd.grad(y.sum(), (x, c, base)), torch.autograd.grad(want.sum(), (x, c, base))):
        torch.testing.assert_close(a, e, **EXACT)


@pytest.mark.parametrize("stream", [False, True])
def test_only_wanted_gradients(extension, stream):
    kept, x, c, base = make(12, 5, 1, (2, 3, 4), 1, True, stream, True)
    for leaf in [t for t in (x, c, base) if t is not None]:
        for t in (x, c, base):
            if t is not None:
                t.requires_grad_(t is leaf)
        for run in (ops.expand_channels, ops.DirectExpandChannels.apply):
            (have,) = torch.autograd.grad(run(x, kept, 12, 1, c, base).sum(), leaf)
            (want,) = torch.autograd.grad(plain(x, kept, 12, 1, c, base).sum(), leaf)
            torch.testing.assert_close(have, want, **EXACT)


def test_gradcheck_and_opcheck(extension):
    for last in (False, True):
        kept, x, c, base = make(9, 4, 2, (2, 2, 3), 1, True, True, last)
        run = lambda x, c, base, kept=kept: ops.expand_channels(x, kept, 9, 1, c, base, "native")  # noqa: E731
        assert torch.autograd.gradcheck(run, (x, c, base))
        x, c, base = (t.detach() for t in (x, c, base))
        library.opcheck(extension.expand_channels.default, (x, kept, 9, 1, c, base))
        library.opcheck(extension.expand_channels.default, (x, kept, 9, 1, None, None))
        library.opcheck(extension.collect_channels.default, (base, kept, 6, 1, True))


def test_bad_input_is_named(backend):
    x, kept = torch.randn(2, 4, 3, 3), torch.tensor([0, 2, 5])
    cases = [
        ({"dim": 4}, "dim"),
        ({"kept": kept.int()}, "kept must be a vector of int64"),
        ({"kept": torch.tensor([0, 2, 2])}, "kept must ascend"),
        ({"kept": torch.tensor([0, 2, 8])}, "kept must ascend"),
        ({"kept": torch.arange(5)}, "input has 4 channels"),
        ({"constants": torch.zeros(4)}, "constants"),
        ({"stream": torch.zeros(2, 7, 3, 3)}, "stream"),
    ]
    for change, match in cases:
        with pytest.raises(ValueError, match=match):
            ops.expand_channels(**{"input": x, "kept": kept, "width": 8, "backend": backend, **change})


def test_the_operator_refuses_what_it_cannot_read(extension):
    x, kept = torch.randn(2, 4, 3, 3), torch.tensor([0, 2, 5])
    for arguments in (
        (x.transpose(2, 3), kept, 8, 1, None, None),
        (x, torch.tensor([0, 5, 2]), 8, 1, None, None),
        (x, torch.arange(5), 8, 1, None, None),
        (x, kept, 8, 1, torch.zeros(4), None),
        (x, kept, 8, 1, None, torch.zeros(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)),
        (x, kept, 8, 1, None, torch.zeros(2, 8, 3, 3, dtype=torch.double)),
        (x.long(), kept, 8, 1, None, None),
    ):
        with pytest.raises(RuntimeError):
            extension.expand_channels(*arguments)

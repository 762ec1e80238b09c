"""The convolution with a lane per image against torch's."""

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
from spafl_kernels.cpu.image_conv import Passes, image_passes

EXACT = {"rtol": 1e-11, "atol": 1e-11}
OURS = Passes(True, True, True)

SHAPES = [  # batch, in, height, width, out, kernel, stride, padding
    (16, 8, 9, 7, 8, (3, 3), (1, 1), (1, 1)),
    (16, 3, 12, 12, 5, (5, 5), (1, 1), (0, 0)),
    (3, 13, 6, 5, 11, (3, 3), (1, 1), (1, 1)),  # few images, several blocks of channels
    (35, 4, 5, 6, 9, (3, 3), (2, 2), (1, 1)),  # whole vectors of images and a rest
    (16, 20, 7, 7, 3, (1, 1), (2, 2), (0, 0)),  # some inputs are read by nobody
    (2, 2, 11, 3, 4, (4, 2), (3, 1), (2, 3)),
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0)),
    (2, 1, 2, 1, 2, (3, 5), (1, 2), (3, 4)),  # windows that see nothing but padding
    (0, 3, 4, 4, 2, (3, 3), (1, 1), (1, 1)),  # empty batch
]


def make(shape, bias, dtype=torch.double, seed=0):
    n, ci, h, w, co, kernel, *_ = shape
    torch.manual_seed(seed)
    x = torch.randn(n, ci, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(co, ci, *kernel, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(co, dtype=dtype, requires_grad=True) if bias else None


def compare(leaves, stride, padding, run, tolerance=EXACT):
    """Output and all gradients."""
    want, have = F.conv2d(*leaves, stride, padding), run(*leaves)
    torch.testing.assert_close(have, want, **tolerance)
    inputs = [t for t in leaves if t is not None]
    grad = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    for a, e in zip(torch.autograd.grad(have, inputs, grad), torch.autograd.grad(want, inputs, grad)):
        torch.testing.assert_close(a, e, **tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_float64_equals_conv2d(shape, bias, backend, poison):
    *_, stride, padding = shape
    compare(make(shape, bias), stride, padding, lambda *a: ops.image_conv(*a, stride, padding, backend=backend))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape, backend, poison):
    *_, stride, padding = shape
    run = lambda *a: ops.image_conv(*a, stride, padding, backend=backend)  # noqa: E731
    compare(make(shape, True, torch.float), stride, padding, run, {"rtol": 1e-4, "atol": 2e-4})


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data):
    if not native.available():
        pytest.skip(native.why_not())
    pick = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kernel, stride, padding = [(pick(low, high), pick(low, high)) for low, high in ((1, 5), (1, 3), (0, 3))]
    size = [pick(max(1, k - 2 * p), 12) for k, p in zip(kernel, padding)]
    shape = (pick(1, 19), pick(1, 18), *size, pick(1, 18), kernel)
    run = lambda *a: ops.image_conv(*a, stride, padding, backend="native")  # noqa: E731
    compare(make(shape, bool(pick(0, 1)), seed=pick(0, 99)), stride, padding, run)


def forced(isa):
    """The figures of test_float64_equals_conv2d in a process that runs another instruction set."""
    code = (
        "import test_image_conv as t, torch\n"
        "assert t.native.cpu_isa() == '" + isa + "'\n"
        "for shape in t.SHAPES:\n"
        "    run = lambda *a: t.ops.image_conv(*a, *shape[-2:], backend='native')\n"
        "    t.compare(t.make(shape, True), *shape[-2:], run)\n"
        "    t.compare(t.make(shape, True, torch.float), *shape[-2:], run, dict(rtol=1e-4, atol=2e-4))\n"
    )
    paths = [os.path.dirname(__file__), *sys.path]
    environment = {**os.environ, "SPAFL_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa):
    if isa not in native.cpu_isas():
        pytest.skip(f"this machine or build has no {isa}")
    done = forced(isa)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("used", [(1, 1), (5, 3), (8, 16), (9, 9)], ids=str)
def test_channels_that_are_not_used(used, backend, poison):
    """They are read by nobody and stay 0, whatever they hold."""
    x, weight, bias = make((17, 9, 5, 6, 16, (3, 3)), True)
    i, o = used
    with torch.no_grad():
        x[:, i:] = weight[o:] = bias[o:] = float("nan")
        weight[:, i:] = float("nan")
    have = ops.image_conv(x, weight, bias, (1, 1), (1, 1), used, backend)
    small = [t.detach().clone().requires_grad_() for t in (x[:, :i], weight[:o, :i], bias[:o])]
    want = F.conv2d(*small, padding=1)
    torch.testing.assert_close(have[:, :o], want, **EXACT)
    assert not have[:, o:].any()
    grad = torch.randn_like(have)
    gx, gw, gb = torch.autograd.grad(have, (x, weight, bias), grad)
    sx, sw, sb = torch.autograd.grad(want, small, grad[:, :o])
    for part, rest, expected in (
        (gx[:, :i], (gx[:, i:],), sx), (gw[:o, :i], (gw[o:], gw[:, i:]), sw), (gb[:o], (gb[o:],), sb),
    ):  # fmt: skip
        torch.testing.assert_close(part, expected, **EXACT)
        assert not any(r.any() for r in rest)


@pytest.mark.parametrize("passes", [Passes(*(bool(k >> i & 1) for i in range(3))) for k in range(8)], ids=str)
def test_direct_function_in_any_mix_of_passes(passes, extension, poison):
    x, weight, bias = make((16, 8, 6, 6, 8, (3, 3)), True)
    with torch.no_grad():
        x[:, 6:], weight[5:], weight[:, 6:], bias[5:] = 0, 0, 0, 0
    run = lambda *a: ops.DirectImageConv.apply(*a, (2, 2), (1, 1), (6, 5), passes)  # noqa: E731
    have, want = run(x, weight, bias), F.conv2d(x, weight, bias, 2, 1)
    torch.testing.assert_close(have, want, **EXACT)
    # What an engine hands back: nothing for the padding.
    grad = torch.randn_like(want) * (torch.arange(8) < 5).view(1, -1, 1, 1)
    leaves = (x, weight, bias)
    for a, e in zip(torch.autograd.grad(have, leaves, grad), torch.autograd.grad(want, leaves, grad)):
        torch.testing.assert_close(a, e, **EXACT)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_wanted_gradients(wanted, extension):
    leaves = make((16, 4, 5, 5, 3, (3, 3)), True)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wanted)
    (want,) = torch.autograd.grad(F.conv2d(*leaves).sum(), leaves[wanted])
    options = (1, 1), (0, 0), (4, 3)
    for passes in (OURS, Passes(True, False, False)):
        (have,) = torch.autograd.grad(ops.DirectImageConv.apply(*leaves, *options, passes).sum(), leaves[wanted])
        torch.testing.assert_close(have, want, **EXACT)
    (have,) = torch.autograd.grad(ops.image_conv(*leaves, backend="native").sum(), leaves[wanted])
    torch.testing.assert_close(have, want, **EXACT)


def test_nan_stays_in_its_image_and_window(backend):
    x, weight, _ = make((17, 3, 6, 6, 4, (3, 3)), False)
    with torch.no_grad():
        x[16, 1, 2, 3] = float("nan")
        have, want = ops.image_conv(x, weight, backend=backend), F.conv2d(x, weight)
    torch.testing.assert_close(have, want, equal_nan=True, **EXACT)
    assert have[16].isnan().any() and not have[:16].isnan().any()


def test_any_memory_order(backend):
    x, weight, bias = make((16, 4, 5, 6, 3, (3, 2)), True)
    x = x.detach().contiguous().requires_grad_()
    weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    run = lambda *a: ops.image_conv(*a, backend=backend)  # noqa: E731
    compare((x, weight, bias), 1, 0, run)


def test_result_may_be_changed_in_place(extension):
    x, weight, bias = make((16, 4, 5, 6, 3, (3, 2)), True)
    y = ops.DirectImageConv.apply(x, weight, bias, (1, 1), (0, 0), (4, 3), OURS)
    y += 1
    want = F.conv2d(x, weight, bias) + 1
    torch.testing.assert_close(y, want, **EXACT)
    for a, e in zip(torch.autograd.grad(y.sum(), (x, weight)), torch.autograd.grad(want.sum(), (x, weight))):
        torch.testing.assert_close(a, e, **EXACT)


def test_gradcheck_and_opcheck(extension):
    x, weight, bias = make((3, 2, 4, 5, 3, (3, 2)), True)
    run = lambda *a: ops.image_conv(*a, (2, 1), (1, 0), backend="native")  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight, bias))
    options = (2, 1, 1, 0, 2, 3)
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    library.opcheck(extension.image_conv.default, (x, weight, bias, *options))
    library.opcheck(extension.image_conv.default, (x, weight, None, *options))
    grad = torch.randn_like(run(x, weight, bias))
    library.opcheck(extension.image_conv_grad_input.default, (grad, weight, 4, 5, *options))
    for flag in (False, True):
        library.opcheck(extension.image_conv_grad_weight.default, (grad, x, weight, *options, flag))


def test_where_it_pays(extension):
    lanes = {"avx512": 16, "avx2": 8}.get(native.cpu_isa())
    if lanes is None:
        assert not any(image_passes(64, 4, 4, torch.float))
        return
    assert all(image_passes(lanes, 4, 4, torch.float)) and all(image_passes(lanes // 2, 4, 4, torch.double))
    assert not any(image_passes(lanes + 1, 4, 4, torch.float))  # nearly half of the lanes are empty
    assert all(image_passes(8 * lanes - 1, 4, 4, torch.float))
    assert image_passes(lanes, 64, 5, torch.float) == OURS  # oneDNN computes padding, in blocks of 8 too
    assert not any(image_passes(lanes, 512, 6, torch.float))  # not measured
    assert not any(image_passes(lanes, 128, 128, torch.float)) and not any(image_passes(16, 4, 4, torch.bfloat16))


def test_bad_input_is_named(backend):
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3)
    cases = [
        ({"input": x[0]}, "4 dimensions"),
        ({"input": x[:, :3]}, "weight expects 4 input channels but input has 3"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"stride": (0, 1)}, "stride"),
        ({"padding": (0, -1)}, "padding"),
        ({"input": x[..., :2]}, "too small"),
        ({"used": (5, 3)}, "used"),
        ({"used": (4, 0)}, "used"),
    ]
    for change, match in cases:
        with pytest.raises(ValueError, match=match):
            ops.image_conv(**{"input": x, "weight": weight, "backend": backend, **change})


def test_the_operator_refuses_what_it_cannot_read(extension):
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(3, 4, 3, 3)
    good = [x, weight, None, 1, 1, 0, 0, 4, 3]
    assert torch.isfinite(extension.image_conv(*good)).all()
    tensors = [
        (0, x.contiguous()),
        (0, x.double()),
        (1, weight.transpose(2, 3)),
        (1, weight[:, :3]),
        (2, torch.zeros(4)),
    ]
    for at, bad in [*tensors, (3, 0), (5, -1), (7, 5), (8, 0)]:
        arguments = list(good)
        arguments[at] = bad
        with pytest.raises(RuntimeError):
            extension.image_conv(*arguments)

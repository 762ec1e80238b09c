"""Dense operators on the active filters: the same function as the definition, and less work."""

import pytest
import torch
from support import cases
from torch.utils.flop_counter import FlopCounterMode

from spafl_kernels import ThresholdConv2d, ThresholdLinear, backend, ops, reference
from spafl_kernels.gpu.geometry import Geometry
from spafl_kernels.gpu.narrow import narrow

GEOMETRY = Geometry(5, 9, 8, (3, 2), (3, 2), (2, 1), (2, 3))
STEPS = (GEOMETRY.stride, GEOMETRY.padding, GEOMETRY.dilation, 1)


def inputs(linear, count, seed=0, dead_gradient=False):
    case = cases.make(21, Geometry(13) if linear else GEOMETRY, 4, count, 1, torch.float64, seed, dead_gradient)
    x, w, dy = (t[0] for t in (case.x, case.weight, case.grad))
    if linear:
        x, w, dy = (t[..., 0, 0].contiguous() for t in (x, w, dy))
    return [t.requires_grad_() for t in (x, w, case.threshold[0], case.bias[0])], dy


def both(linear, leaves, bias, estimator, mask_bias):
    x, w, t, b = leaves
    b = b if bias else None
    if linear:
        return (
            narrow(x, w, t, b, estimator, mask_bias, None),
            reference.threshold_linear(x, w, t, b, estimator, mask_bias),
        )
    return (
        narrow(x, w, t, b, estimator, mask_bias, GEOMETRY),
        reference.threshold_conv2d(x, w, t, b, *STEPS, estimator, mask_bias),
    )


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("estimator", reference.ESTIMATORS)
@pytest.mark.parametrize(("bias", "mask_bias"), [(False, False), (True, False), (True, True)])
def test_values_and_gradients_equal_the_definition(linear, estimator, bias, mask_bias):
    for seed, count in enumerate(cases.counts(21)):
        leaves, dy = inputs(linear, count, seed, dead_gradient=bool(seed % 2))
        got, want = both(linear, leaves, bias, estimator, mask_bias)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert linear or got.is_contiguous(memory_format=torch.channels_last)
        variables = leaves if bias else leaves[:3]
        gradients = (torch.autograd.grad(y, variables, dy) for y in (got, want))
        for a, e in zip(*gradients, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("estimator", reference.ESTIMATORS)
@pytest.mark.parametrize(
    ("what", "mask_bias", "value"),
    [("weight", False, "nan"), ("weight", True, "nan"), ("bias", True, "nan"), ("bias", True, "-inf")],
)
def test_what_is_not_finite_in_a_pruned_filter_is_not_lost(linear, estimator, what, mask_bias, value):
    leaves, dy = inputs(linear, 7)
    row = int((leaves[2] > reference.filter_scores(leaves[1])).nonzero()[0])
    with torch.no_grad():
        leaves[1 if what == "weight" else 3][row].view(-1)[0] = float(value)
    dy[:, row] = 0
    got, want = both(linear, leaves, True, estimator, mask_bias)
    assert want.isnan().any() or value == "-inf"
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
    gradients = (torch.autograd.grad(y, leaves, dy) for y in (got, want))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2)])
def test_only_what_is_needed(needed):
    leaves, dy = inputs(False, 7)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in needed)
    got, want = both(False, leaves, True, "identity", False)
    variables = [leaves[i] for i in needed]
    gradients = (torch.autograd.grad(y, variables, dy) for y in (got, want))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_work_follows_the_count():
    """Filters are computed in eights; the pruned ones cost nothing where their gradient is zero."""
    work = {}
    for count in (0, 8, 9, 16):
        (x, w, t, _), dy = inputs(False, count, dead_gradient=True)
        with FlopCounterMode(display=False) as counter:
            y = narrow(x, w, t, None, "identity", False, GEOMETRY)
            torch.autograd.grad(y, (x, w, t), dy)
        work[count] = counter.get_total_flops()
    assert work[0] == 0 and work[16] == pytest.approx(2 * work[8]) and work[8] < work[9] < work[16]


def test_a_second_derivative_is_refused():
    (x, w, t, _), dy = inputs(True, 7)
    y = narrow(x, w, t, None, "identity", False, None)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(y, x, dy, create_graph=True)


def test_autocast_computes_in_its_dtype_and_keeps_the_weights():
    layer, x = ThresholdLinear(7, 6), torch.randn(5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = narrow(x, layer.weight, layer.threshold, layer.bias, "identity", False, None)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("padding", ["same", (2, 1)])
def test_layers_reach_it_with_their_own_shapes(padding):
    conv = ThresholdConv2d(3, 4, (4, 3), padding=padding, dilation=(1, 2))
    linear = ThresholdLinear(5, 4)
    with torch.no_grad():
        conv.threshold[1] = linear.threshold[2] = 9.0
    rows = torch.randn(2, 3, 5)
    with backend.requesting("narrow"):
        for image in (torch.randn(2, 3, 6, 7), torch.randn(3, 6, 7)):
            got = ops.conv2d(
                image, conv.weight, conv.threshold, conv.bias, 1, padding, (1, 2), 1, "identity", False
            )  # fmt: skip
            torch.testing.assert_close(got, conv(image))
        got = ops.linear(rows, linear.weight, linear.threshold, linear.bias, "identity", False)
    torch.testing.assert_close(got, linear(rows))

"""The operators on the CPU: equal to the definition, and well registered with PyTorch."""

import os
import subprocess
import sys

import pytest
import torch
from support import cases
from torch import library
from torch.func import grad, vmap

from spafl_kernels import (
    ThresholdConv2d,
    ThresholdLinear,
    backend,
    explain,
    ops,
    reference,
    threshold_conv2d,
    threshold_linear,
)
from spafl_kernels.gpu import choice, single
from spafl_kernels.gpu.geometry import Geometry

DOUBLE = torch.float64
LINEAR, CONV2D = torch.ops.spafl.threshold_linear, torch.ops.spafl.threshold_conv2d
GEOMETRY = Geometry(3, 7, 6, (3, 2), (2, 1), (1, 0), (1, 2))
STEPS = (GEOMETRY.stride, GEOMETRY.padding, GEOMETRY.dilation)


def inputs(linear: bool, dtype=DOUBLE, clients=2, requires_grad=True, channels_last=False):
    """``(input, weight, threshold, bias)`` with some filters pruned and margins on both sides of the window."""
    case = cases.make(6, Geometry(7) if linear else GEOMETRY, 3, 3, clients, dtype)
    x, w = (case.x, case.weight) if not linear else (case.x[..., 0, 0], case.weight[..., 0, 0])
    if channels_last and not linear:
        w = w.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    return [t.requires_grad_(requires_grad) for t in (x, w, case.threshold, case.bias)]


def by_reference(linear, estimator, mask_bias, x, w, t, b):
    """The definition, client by client, through autograd."""
    call = reference.threshold_linear if linear else reference.threshold_conv2d
    rest = () if linear else (*STEPS, 1)
    outputs = [
        call(x[i], w[i], t[i], None if b is None else b[i], *rest, estimator=estimator, mask_bias=mask_bias)
        for i in range(len(w))
    ]
    return torch.stack(outputs)


def by_operator(linear, estimator, mask_bias, x, w, t, b):
    if linear:
        return LINEAR(x, w, t, b, estimator, mask_bias)[0]
    return CONV2D(x, w, t, b, *STEPS, estimator, mask_bias)[0]


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("estimator", reference.ESTIMATORS)
@pytest.mark.parametrize(("bias", "mask_bias"), [(False, False), (True, False), (True, True)])
def test_values_and_gradients_equal_the_definition(linear, estimator, bias, mask_bias):
    x, w, t, b = inputs(linear)
    variables = (x, w, t, b) if bias else (x, w, t)
    b = b if bias else None
    got, want = (f(linear, estimator, mask_bias, x, w, t, b) for f in (by_operator, by_reference))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(want)
    for a, e in zip(
        torch.autograd.grad(got, variables, upstream), torch.autograd.grad(want, variables, upstream), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_linear(bias):
    x, w, t, b = inputs(True)
    library.opcheck(LINEAR, (x, w, t, b if bias else None, "identity", bias))


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_conv2d(channels_last):
    x, w, t, b = inputs(False, channels_last=channels_last)
    library.opcheck(CONV2D, (x, w, t, b, *STEPS, "window", False))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_backward_operators(needs):
    x, w, t, b = inputs(True, requires_grad=False)
    y, selection, packed = LINEAR(x, w, t, b, "identity", True)
    library.opcheck(torch.ops.spafl.threshold_linear_backward, (y, x, w, packed, selection, b, True, *needs))
    x, w, t, b = inputs(False, requires_grad=False)
    y, selection, packed = CONV2D(x, w, t, b, *STEPS, "identity", False)
    library.opcheck(
        torch.ops.spafl.threshold_conv2d_backward, (y, x, w, packed, selection, None, *STEPS, False, *needs)
    )


@pytest.mark.parametrize("linear", [True, False])
def test_gradcheck_where_the_function_is_smooth(linear):
    """Inside the window nothing passes the estimator: the true derivative, for a mask that does not flip."""
    case = cases.make(4, Geometry(5) if linear else Geometry(2, 4, 3, (2, 2)), 2, 2, 1, DOUBLE)
    scores = case.weight.flatten(2).abs().mean(2)
    t = torch.where(case.keep, scores - 0.5, scores + 0.5)
    args = [a.detach().requires_grad_() for a in (case.x, case.weight, t, case.bias)]
    if linear:
        args[0], args[1] = (a[..., 0, 0].detach().requires_grad_() for a in args[:2])
        assert torch.autograd.gradcheck(lambda *a: LINEAR(*a, "window", True)[0], args)
    else:
        one = ((1, 1), (0, 0), (1, 1))
        assert torch.autograd.gradcheck(lambda *a: CONV2D(*a, *one, "window", False)[0], args)


@pytest.mark.parametrize("linear", [True, False])
def test_compiled_equals_eager(linear):
    x, w, t, b = inputs(linear, torch.float32, clients=1)

    def layer(x, w, t, b):
        if linear:
            return ops.linear(x[0], w[0], t[0], b[0], "identity", False).relu()
        return ops.conv2d(x[0], w[0], t[0], b[0], *STEPS, 1, "identity", False).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    eager, got = layer(x, w, t, b), compiled(x, w, t, b)
    assert torch.equal(eager, got)
    upstream = torch.randn_like(eager)
    for a, e in zip(
        torch.autograd.grad(got, (x, w, t, b), upstream),
        torch.autograd.grad(eager, (x, w, t, b), upstream),
        strict=True,
    ):
        assert torch.equal(a, e)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_equals_eager(linear, dynamic):
    class Layer(torch.nn.Module):
        def forward(self, x, w, t, b):
            return by_operator(linear, "identity", True, x, w, t, b) + 1

    arguments = inputs(linear, requires_grad=False)
    batch = torch.export.Dim("batch", min=2)
    shapes = ({1: batch}, None, None, None) if dynamic else None
    program = torch.export.export(Layer(), tuple(arguments), dynamic_shapes=shapes)
    assert any("spafl.threshold_" in str(node.target) for node in program.graph.nodes)
    if dynamic:
        arguments[0] = torch.cat([arguments[0], arguments[0][:, :2]], 1)
    assert torch.equal(program.module()(*arguments), Layer()(*arguments))


@pytest.mark.parametrize("linear", [True, False])
def test_vmap_over_clients_equals_the_definition(linear):
    x, w, t, b = inputs(linear, torch.float32, clients=3, requires_grad=False)

    def loss(layer):
        def of_client(w, t, x, b):
            rest = () if linear else (*STEPS, 1)
            return (layer(x, w, t, b, *rest, "identity", True) ** 2).sum()

        return of_client

    pairs = (ops.linear, reference.threshold_linear) if linear else (ops.conv2d, reference.threshold_conv2d)
    for differentiate in (lambda f: f, lambda f: grad(f, (0, 1, 2))):
        got, want = (vmap(differentiate(loss(f)), in_dims=(0, 0, 0, None))(w, t, x, b[0]) for f in pairs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_vmap_is_one_call_for_all_clients(monkeypatch):
    x, w, t, _ = inputs(True, torch.float32, clients=3, requires_grad=False)
    seen = []
    from spafl_kernels.gpu import closed_form

    stock = closed_form.forward
    monkeypatch.setattr(closed_form, "forward", lambda input, *a: (seen.append(input.shape[0]), stock(input, *a))[1])
    vmap(lambda x, w, t: ops.linear(x, w, t, None, "identity", False))(x, w, t)
    assert seen == [3]


def test_autocast_casts_the_input_and_decides_masks_on_the_weights():
    """The margin vanishes in bfloat16: a cast before the comparison would prune."""
    weight = torch.full((1, 1, 4), 1.0 + 2**-12, requires_grad=True)
    threshold = torch.ones(1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = LINEAR(torch.ones(1, 2, 4), weight, threshold, None, "identity", False)[0]
    assert y.dtype == torch.bfloat16 and y.tolist() == [[[4.0], [4.0]]]
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_tf32_follows_the_old_and_the_new_setting():
    code = (
        "import torch; from spafl_kernels.gpu.choice import tf32\n"
        "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = False\n"
        "assert tf32(False) and not tf32(True)\n"
        "torch.backends.cuda.matmul.allow_tf32 = False; torch.backends.cudnn.allow_tf32 = True\n"
        "assert not tf32(False) and tf32(True)\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'; torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "assert tf32(False) and not tf32(True)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shapes_of_single_layers_are_those_of_torch():
    layer = ThresholdLinear(5, 4)
    x = torch.randn(2, 3, 5)
    got = ops.linear(x, layer.weight, layer.threshold, layer.bias, "identity", False)
    torch.testing.assert_close(got, layer(x))
    conv = ThresholdConv2d(3, 4, (4, 3), padding="same", dilation=(1, 2))
    for image in (torch.randn(2, 3, 6, 7), torch.randn(3, 6, 7)):
        got = ops.conv2d(
            image, conv.weight, conv.threshold, conv.bias, 1, "same", (1, 2), 1, "identity", False
        )  # fmt: skip
        torch.testing.assert_close(got, conv(image))


@pytest.mark.parametrize("linear", [True, False])
def test_cuda_tensors_take_the_operators(monkeypatch, linear):
    """The public functions on fake CUDA tensors: operator, shape, strides and device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(choice, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    called = []
    for name in ("linear", "conv2d"):
        stock = getattr(single, name)
        monkeypatch.setattr(single, name, lambda *a, stock=stock, name=name: (called.append(name), stock(*a))[1])
    with FakeTensorMode(), torch.no_grad():  # (the autograd engine of a build without CUDA has no thread for it)
        shapes = ((2, 4, 7), (6, 7)) if linear else ((2, 3, 7, 6), (6, 3, 3, 2))
        x, w, t, b = (torch.empty(s, device="cuda") for s in (*shapes, (6,), (6,)))
        if linear:
            y = threshold_linear(x, w, t, b)
            assert y.shape == (2, 4, 6)
        else:
            y = threshold_conv2d(x, w, t, b, *STEPS)
            assert y.shape == (2, 6, *GEOMETRY.output) and y.is_contiguous(memory_format=torch.channels_last)
        assert y.is_cuda
    assert called == ["linear" if linear else "conv2d"]


# ----------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 2, 5)}, "input must have 1 clients and 3 input channels"),
        ({"x": torch.zeros(2, 3)}, "input and weight must have 3 and 3 dimensions"),
        ({"t": torch.zeros(1, 5)}, r"threshold must have shape \(1, 4\); got \(1, 5\)"),
        ({"b": torch.zeros(1, 3)}, r"bias must have shape \(1, 4\); got \(1, 3\)"),
        ({"t": torch.zeros(1, 4, dtype=DOUBLE)}, "threshold has dtype torch.float64 but weight has torch.float32"),
        ({"x": torch.zeros(1, 2, 3, dtype=DOUBLE)}, "input must have the dtype of weight"),
        ({"x": torch.zeros(1, 2, 3, device="meta")}, "input is on meta but weight is on cpu"),
        ({"w": torch.zeros(1, 0, 3), "t": torch.zeros(1, 0), "b": None}, "weight must have at least one filter"),
        ({"estimator": "sigmoid"}, "estimator must be one of identity, window; got 'sigmoid'"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    given = {
        "x": torch.zeros(1, 2, 3),
        "w": torch.zeros(1, 4, 3),
        "t": torch.zeros(1, 4),
        "b": None,
        "estimator": "identity",
    }
    given.update(change)
    with pytest.raises(ValueError, match=message):
        LINEAR(given["x"], given["w"], given["t"], given["b"], given["estimator"], False)


def test_bad_geometry_is_refused_by_name():
    x, w, t = torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 5, 3, 3, 3), torch.zeros(1, 5)
    for stride, padding, dilation, message in (
        ((0, 1), (0, 0), (1, 1), "stride must be two integers of at least 1"),
        ((1, 1), (-1, 0), (1, 1), "padding must be two integers of at least 0"),
        ((1, 1), (0, 0), (2, 2), r"input of size \(4, 4\) is too small for kernel \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            CONV2D(x, w, t, None, stride, padding, dilation, "identity", False)
    with pytest.raises(ValueError, match="padding must be numbers, 'valid', or 'same' with stride 1"):
        ops.conv2d(x[0], w[0], t[0], None, 2, "same", 1, 1, "identity", False)
    with pytest.raises(ValueError, match="input must have the dtype of weight outside autocast"):
        ops.linear(torch.zeros(2, 3).half(), torch.zeros(4, 3), torch.zeros(4), None, "identity", False)


# ----------------------------------------------------------------------------------------------- choice of backend
def test_explain_on_the_cpu():
    explanation = explain(ThresholdConv2d(3, 4, 3), torch.zeros(1, 3, 5, 5))
    assert explanation.backend == "reference" and explanation.reason == "the layer is too small for skipping to pay"
    with pytest.raises(ValueError, match="module must be a threshold layer; got ReLU"):
        explain(torch.nn.ReLU(), torch.zeros(1))


def test_explain_on_a_gpu_names_the_reason(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(choice, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with FakeTensorMode():
        x = torch.empty(1, 4, 5, 5, device="cuda")
        w = torch.empty(6, 4, 3, 3, device="cuda")
        work = choice.conv_work(x, w, 1, 0, 1, 1.0)
        assert choice.choose(x, w, 1, work).backend == "triton"
        for tensors, groups, words in (((x, w), 2, "groups must be 1"), ((x.double(), w.double()), 1, "float64")):
            found = choice.choose(*tensors, groups, work)
            assert found.fallback and found.backend == "reference" and words in found.reason
        monkeypatch.setattr(choice, "HAS_TRITON", False)
        assert str(choice.choose(x, w, 1, work)).startswith("reference: triton is not installed")


def test_fallback_warns_once_and_is_an_error_in_strict_mode(monkeypatch):
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.delenv("SPAFL_STRICT", raising=False)
    layer = ThresholdConv2d(4, 4, 3, groups=2)
    x = torch.randn(1, 4, 5, 5)
    args = (x, layer.weight, layer.threshold, layer.bias, 1, 0, 1, 2, "identity", False)
    with pytest.warns(UserWarning, match="groups must be 1"):
        got = ops.conv2d(*args)
    torch.testing.assert_close(got, layer(x))
    monkeypatch.setenv("SPAFL_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"SPAFL_STRICT is set, and .* groups must be 1"):
        ops.conv2d(*args)


def test_the_reference_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(backend, "REQUESTED", "reference")
    monkeypatch.setenv("SPAFL_STRICT", "1")  # what was asked for is no fallback
    called = []
    stock = reference.threshold_linear
    monkeypatch.setattr(reference, "threshold_linear", lambda *a: (called.append(1), stock(*a))[1])
    layer = ThresholdLinear(3, 4)
    ops.linear(torch.ones(2, 3), layer.weight, layer.threshold, layer.bias, "identity", False)
    assert called
    code = "import spafl_kernels"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "SPAFL_BACKEND": "cuda"}, capture_output=True, text=True
    )
    want = "ValueError: SPAFL_BACKEND must be one of auto, reference, triton, narrow; got 'cuda'"
    assert done.stderr.splitlines()[-1] == want


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import spafl_kernels, torch\n"
        "y = torch.ops.spafl.threshold_linear(torch.ones(1, 2, 3), torch.ones(1, 4, 3), torch.zeros(1, 4), None,"
        " 'identity', False)[0]\nassert y.tolist() == [[[3.0] * 4] * 2]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

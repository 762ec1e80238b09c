"""The layers on a real GPU, against the definition in float64 on the CPU. ``python -m pytest -m gpu``."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from support import cases
from support.poison import poisoned
from support.process import INTERPRETED
from torch.func import functional_call, grad, vmap

import spafl_kernels
from spafl.models import build_model
from spafl_kernels import explain, reference
from spafl_kernels.gpu.geometry import Geometry
from spafl_kernels.gpu.packing import Selection
from spafl_kernels.training import MaskedTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA GPU"),
]

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# dtype, tf32, bound on the root mean square error. Measured on an H200, at most: 6.1e-7, 8.7e-4, 3.0e-4, 2.0e-3.
KINDS = {
    "fp32": (SINGLE, False, 5e-6), "tf32": (SINGLE, True, 2e-3),
    "fp16": (HALF, False, 1e-3), "bf16": (BRAIN, False, 5e-3),
}  # fmt: skip
SHAPES = {
    "linear": (123, Geometry(77), 65),
    "wide-linear": (500, Geometry(800), 16),
    "first": (20, Geometry(1, 28, 28, (5, 5)), 4),
    "same": (64, Geometry(64, 14, 14, (3, 3), (1, 1), (1, 1)), 5),
    "strided": (130, Geometry(48, 15, 13, (3, 3), (2, 2), (1, 1)), 3),
    "uneven": (33, Geometry(20, 11, 9, (3, 2), (3, 2), (2, 1), (2, 3)), 3),
    "pointwise": (96, Geometry(32, 8, 8, (1, 1), (2, 2)), 3),
}


@contextlib.contextmanager
def tf32(allowed):
    # By cuDNN's context manager: PyTorch's testing modules, which other tests import, forbid plain assignment.
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
        matmul.allow_tf32 = allowed
        try:
            yield
        finally:
            matmul.allow_tf32 = before


@contextlib.contextmanager
def nothing_waits():
    """The host must not wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(case):
    changes = {f.name: getattr(case, f.name).cuda() for f in dataclasses.fields(case) if f.name != "geometry"}
    return dataclasses.replace(case, **changes)


def operator(case, estimator, mask_bias):
    g = case.geometry
    return torch.ops.spafl.threshold_conv2d(
        case.x, case.weight, case.threshold, case.bias, g.stride, g.padding, g.dilation, estimator, mask_bias
    )


def run(case, estimator="identity", mask_bias=False):
    """Output, then gradients of input, weight, threshold and bias."""
    case = dataclasses.replace(
        case, **{n: getattr(case, n).detach().requires_grad_() for n in ("x", "weight", "threshold", "bias")}
    )
    y, selection, _ = operator(case, estimator, mask_bias)
    return selection, [y, *torch.autograd.grad(y, (case.x, case.weight, case.threshold, case.bias), case.grad)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(monkeypatch, kind, shape):
    dtype, allowed, bound = KINDS[kind]
    out, geometry, n = SHAPES[shape]
    for seed, count in enumerate(cases.counts(out)):
        mask_bias = bool(seed % 2)
        estimator = ("identity", "window")[seed % 3 == 1]
        case = cases.make(out, geometry, n, count, 2, dtype, seed)
        with tf32(allowed), poisoned(monkeypatch):
            _, got = run(on_gpu(case), estimator, mask_bias)
        selection, _ = case.selection(estimator)
        want = [
            cases.expected_output(case, True, mask_bias),
            *cases.expected_gradients(case, selection, True, mask_bias),
        ]
        for name, a, b in zip(("y", "dx", "dw", "dtau", "dbias"), got, want, strict=True):
            assert cases.error(a.cpu(), b) < bound, (name, count)
        pruned = ~case.keep[:, None, :, None, None].expand_as(got[0].cpu())
        bias = case.bias * (case.keep if mask_bias else 1)
        assert torch.equal(got[0].cpu()[pruned], bias[:, None, :, None, None].expand_as(pruned)[pruned])


def test_layers_choose_triton_and_agree_with_the_reference():
    layer = spafl_kernels.ThresholdConv2d(16, 32, 3, padding="same", device="cuda")
    with torch.no_grad():
        layer.threshold.copy_(torch.where(torch.arange(32) % 2 == 0, 1.0, -1.0))
    x = torch.randn(2, 16, 9, 9, device="cuda")
    assert explain(layer, x).backend == "triton"
    with tf32(False):
        want = reference.threshold_conv2d(x, layer.weight, layer.threshold, layer.bias, padding="same")
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x[0]), want[0], rtol=1e-4, atol=1e-5)


def test_pruned_weights_are_not_read_after_the_mask_is_made():
    from spafl_kernels.gpu.triton import layer_backward, layer_forward, select_layer

    case = on_gpu(cases.make(64, SHAPES["same"][1], 5, 20, dead_gradient=True))
    selection, packed, _ = select_layer(case.weight, case.threshold, "identity")
    case.weight[~case.keep] = float("nan")
    y = layer_forward(case.x, packed, selection, case.bias, case.geometry)
    gradients = layer_backward(case.grad, case.x, case.weight, packed, selection, case.bias, case.geometry)
    assert y.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert not gradients[1][~case.keep].any()


def test_no_synchronisation_and_the_same_bits_every_time():
    case = on_gpu(cases.make(130, SHAPES["strided"][1], 64, 70, dtype=BRAIN))
    _, first = run(case)
    with nothing_waits():
        runs = [run(case)[1] for _ in range(3)]
    for other in runs:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_graph_replay_follows_an_in_place_change_of_the_mask():
    case = on_gpu(cases.make(64, SHAPES["same"][1], 5, 40))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        selection, captured = run(case)
    for seed, count in ((1, 0), (2, 64), (3, 7)):
        other = on_gpu(cases.make(64, SHAPES["same"][1], 5, count, seed=seed))
        for name in ("x", "weight", "threshold", "bias", "grad"):
            getattr(case, name).copy_(getattr(other, name))
        graph.replay()
        assert int(selection[0, 0]) == count
        for a, b in zip(captured, run(other)[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layer_equals_eager(backend):
    layer = spafl_kernels.ThresholdLinear(77, 123, device="cuda")
    x = torch.randn(65, 77, device="cuda")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), layer(x))


def test_autocast():
    layer = spafl_kernels.ThresholdLinear(77, 123, device="cuda")
    x = torch.randn(65, 77, device="cuda")
    with torch.autocast("cuda", dtype=BRAIN):
        y = layer(x)
    assert y.dtype == BRAIN
    y.float().sum().backward()
    assert layer.weight.grad.dtype == SINGLE
    assert cases.error(y.detach(), layer(x).detach()) < 1e-2


def test_a_cohort_by_vmap_equals_client_after_client():
    models = [build_model("lenet5", 10, 1, seed=i).cuda() for i in range(3)]
    names = [n for n, _ in models[0].named_parameters()]
    stacked = {n: torch.stack([dict(m.named_parameters())[n].detach() for m in models]) for n in names}
    for n in names:
        if n.endswith("threshold"):
            stacked[n] += torch.rand_like(stacked[n]) * 0.05
    x, y = torch.randn(3, 8, 1, 28, 28, device="cuda"), torch.randint(10, (3, 8), device="cuda")

    def loss(parameters, x, y):
        return torch.nn.functional.cross_entropy(functional_call(models[0], parameters, (x,)), y)

    with tf32(False):
        together = vmap(grad(loss))(stacked, x, y)
        for i in range(3):
            alone = grad(loss)({n: p[i] for n, p in stacked.items()}, x[i], y[i])
            for n in names:
                torch.testing.assert_close(together[n][i], alone[n], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["conv4", "resnet18", "lenet5", "vit"])
def test_a_training_step_of_the_models(name):
    channels, size = (1, 28) if name == "lenet5" else (3, 32)
    model = build_model(name, 10, channels, seed=0).cuda()
    for _, layer in spafl_kernels.threshold_layers(model):
        with torch.no_grad():
            layer.threshold.copy_(layer.scores() * torch.rand_like(layer.threshold).mul(2))
    x, y = torch.randn(8, channels, size, size), torch.randint(10, (8,))
    dense = build_model(name, 10, channels, seed=0)
    dense.load_state_dict(model.state_dict())

    def step(model, x, y):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss, {n: p.grad.cpu() for n, p in model.named_parameters()}

    with tf32(False):
        loss, got = step(model, x.cuda(), y.cuda())
    want_loss, want = step(dense.double(), x.double(), y)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-3)
    for n in want:
        # Before a BatchNorm the threshold gradients cancel to about 0: an absolute bound, small beside other gradients.
        torch.testing.assert_close(got[n].double(), want[n], rtol=2e-2, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", ["lenet5", "conv4"])
def test_a_captured_training_step_follows_the_mask(name):
    """Guard, one threshold pass, forward, backward, clip and SGD in one graph; the eager twin takes the same steps."""
    from benchmarks.gpu.steps import SETTINGS, batches, opened, pruned_model

    model = pruned_model(name, 0.5, 0, "cuda", SINGLE)
    twin = copy.deepcopy(model)
    x, y = (t[0] for t in batches(name, 1, 8, "cuda", SINGLE))
    trainer, eager = (opened(MaskedTrainer(m), SETTINGS[name].options) for m in (model, twin))
    assert trainer._shared is not None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with tf32(False):
        with torch.cuda.stream(stream):
            for _ in range(2):
                trainer.step(x, y)
        torch.cuda.current_stream().wait_stream(stream)
        for _ in range(2):
            eager.step(x, y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            trainer.step(x, y)
        for factor in (1.0, 0.1, 4.0):
            with torch.no_grad():
                for m in (model, twin):
                    for _, layer in spafl_kernels.threshold_layers(m):
                        layer.threshold.mul_(factor)
            with nothing_waits():
                graph.replay()
                eager.step(x, y)
            assert trainer._densities.tolist() == eager._densities.tolist()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


def test_the_pass_of_a_model_is_one_launch_for_layers_of_any_size():
    from spafl_kernels.gpu import closed_form
    from spafl_kernels.gpu.triton import ModelPass

    layers = [
        on_gpu(cases.make(out, Geometry(c, kernel=(k, k), height=k, width=k), 1, count, 3, seed=out))
        for out, c, k, count in ((1000, 300, 3, 412), (20, 1, 5, 0), (4096, 64, 1, 4096), (500, 800, 1, 77))
    ]
    model = ModelPass([c.weight for c in layers], [c.threshold for c in layers])
    for turn in range(20):  # words of counts take turns; no order of blocks may hang or change anything
        selections = model()
        for case, selection, packed in zip(layers, selections, model.packed, strict=True):
            data, rows = (t.cuda() for t in closed_form.selection_and_packed(
                case.weight.cpu(), case.threshold.cpu(), "identity", SINGLE
            ))  # fmt: skip
            assert torch.equal(selection.index, Selection(data, selection.out).index) and torch.equal(packed, rows), (
                turn
            )
            assert selection.changed.tolist() == [int(turn == 0)] * 3
        if turn == 0:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                model()
                torch.cuda.synchronize()
            assert [e.count for e in profile.key_averages() if "threshold_pass" in e.key] == [1]

"""What a real device adds, and the same script over the CPU build, so that it is known to run before a GPU sees it."""

from __future__ import annotations

import pytest
import torch
from pass_cases import check_lists, cohort, poisoned
from test_cuda_fused_step import Cohort, Torch

from spafl_kernels import reference
from spafl_kernels.gpu import cuda_ops


@pytest.fixture
def gpu(monkeypatch):
    """The operators of the real extension, on a GPU; whatever was loaded before is put back afterwards."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    monkeypatch.setattr(cuda_ops, "_namespace", cuda_ops._namespace)
    monkeypatch.setattr(cuda_ops, "_reason", cuda_ops._reason)
    try:
        cuda_ops.load()
    except (OSError, RuntimeError) as error:
        pytest.skip(f"no CUDA extension: {error}")
    return "cuda"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device that the operators of this test run on."""
    if request.param == "cuda":
        return request.getfixturevalue("gpu")
    request.getfixturevalue("one_schedule")
    return "cpu"


def at(device, tensors):
    """Copies on the device, clients together in one block of memory."""
    return [t.clone().to(device) for t in tensors]


def run_pass(device, weights, thresholds, pad_to=8):
    state = poisoned(weights, pad_to)
    cuda_ops.threshold_pass(weights, thresholds, state, compare=False)
    return state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("density", ["one", 0.5])
def test_threshold_pass(device, dtype, density):
    weights, thresholds = (at(device, t) for t in cohort(2, density, dtype))
    state = run_pass(device, weights, thresholds)
    exact = [w.double().flatten(2).abs().mean(2) for w in weights]
    check_lists(state, weights, [s > t.double() for s, t in zip(exact, thresholds)])
    again = run_pass(device, weights, thresholds)
    assert torch.equal(state.scores, again.scores)  # bitwise, run after run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_fused_step(device, dtype):
    parameters = Cohort(2, dtype)
    expected = Torch(parameters, [0.05, 0.05], 0.02, 0.9, 0.01, 0.5)
    weights, thresholds, others = (
        at(device, group) for group in (parameters.weights, parameters.thresholds, parameters.others)
    )
    masks = run_pass(device, weights, thresholds)
    state = cuda_ops.step_state(weights, thresholds, others, learning_rate=0.05, penalty=0.02, momentum=0.9)
    grads = [at(device, group) for group in parameters.grads]
    for _ in range(3):
        cuda_ops.fused_step(
            *(weights, grads[0], thresholds, grads[1], others, grads[2], state, masks),
            momentum=0.9,
            weight_decay=0.01,
            max_norm=0.5,
        )
        norms = expected.step(parameters.grads)
    tolerance = {"rtol": 1e-13, "atol": 1e-15} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(state.norms.cpu(), torch.tensor(norms, dtype=torch.float64), rtol=1e-5, atol=0)
    for k, tensor in enumerate([*weights, *thresholds, *others]):
        torch.testing.assert_close(tensor.cpu(), torch.stack([p[k].detach() for p in expected.parameters]), **tolerance)
    assert torch.equal(masks.mask, run_pass(device, weights, thresholds).mask)


def test_gather_and_scatter(device):
    weights, thresholds = (at(device, t) for t in cohort(2, 0.5, torch.float32, shapes=[(11, 2), (40, 11, 3, 3)]))
    masks = run_pass(device, weights, thresholds)
    full = weights[1].view(2, 40, 1, 11, 9)
    compact = torch.full_like(full, float("nan"))
    before = full.clone()
    assert not cuda_ops.compact_gather([full], [compact], masks, [1], [0]).any()
    for c in range(2):
        rows, columns = (masks.layer(masks.mask, l)[c].nonzero().flatten() for l in (1, 0))
        assert torch.equal(compact[c, : len(rows), :, : len(columns)], full[c][rows][:, :, columns])
        assert compact[c].count_nonzero() == len(rows) * len(columns) * 9
    cuda_ops.compact_scatter([full], [compact], masks, [1], [0])
    assert torch.equal(full, before)


@pytest.mark.gpu
def test_a_captured_step_follows_the_mask(gpu):
    """A CUDA graph of step and lists, replayed after weights, gradients and learning rate changed in place; no sync."""
    parameters = Cohort(3, torch.float32)
    weights, thresholds = at("cuda", parameters.weights), at("cuda", parameters.thresholds)
    grads = [at("cuda", group) for group in parameters.grads]
    masks = run_pass("cuda", weights, thresholds)
    state = cuda_ops.step_state(weights, thresholds, learning_rate=0.05, penalty=0.02, momentum=0.9)

    def step():
        cuda_ops.fused_step(
            *(weights, grads[0], thresholds, grads[1], [], [], state, masks), momentum=0.9, max_norm=1.0
        )
        cuda_ops.active_lists(weights, masks)

    torch.cuda.set_sync_debug_mode("error")
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        state.learning_rate.mul_(2)
        for tensor in (*weights, *grads[0], *grads[1]):
            tensor.mul_(-0.5)
        for packed in masks.packed:
            packed.fill_(float("nan"))
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for l, (weight, threshold) in enumerate(zip(weights, thresholds)):
        wanted = torch.stack([reference.filter_mask(w, t).bool() for w, t in zip(weight, threshold)])
        margin = (weight.flatten(2).abs().mean(2) - threshold).abs()
        differs = masks.layer(masks.mask, l) != wanted
        assert not differs[margin > 1e-5].any()
        for c in range(3):
            active = masks.layer(masks.mask, l)[c].nonzero().flatten()
            assert masks.counts[c, l] == len(active)
            assert torch.equal(masks.packed[l][c, : len(active)], weight[c, active])

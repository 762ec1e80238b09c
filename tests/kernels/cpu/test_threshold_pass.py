"""The threshold pass against the definition in reference.py."""

import pytest
import torch
from torch import library

from spafl_kernels import ops, reference


def layers(dtype, density=0.5, sizes=((20, 1, 5, 5), (50, 20, 5, 5), (7, 3), (1, 4097), (3, 1))):
    torch.manual_seed(0)
    weights = [torch.randn(s, dtype=dtype) for s in sizes]
    scores = [reference.filter_scores(w) for w in weights]
    thresholds = []
    for score in scores:
        active = round(density * len(score))
        # Strictly between two scores, so that rounding cannot move a filter across.
        order = torch.cat([score.sort(descending=True).values, score.new_tensor([-1.0])])
        above = order[0] + 1 if active == 0 else order[active - 1]
        thresholds.append(torch.full_like(score, float((above + order[active]) / 2)))
    return weights, thresholds, scores


def buffers(weights):
    scores = [w.new_full((w.shape[0],), float("nan")) for w in weights]
    return scores, [torch.zeros(w.shape[0], dtype=torch.bool) for w in weights]


@pytest.mark.parametrize("density", [0, 0.05, 0.1, 0.5, 0.97, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_and_masks(density, dtype, backend):
    weights, thresholds, expected = layers(dtype, density)
    scores, masks = buffers(weights)
    flips = ops.threshold_pass(weights, thresholds, scores, masks, backend=backend)
    for i, weight in enumerate(weights):
        torch.testing.assert_close(scores[i], expected[i], rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)
        assert torch.equal(masks[i], reference.filter_mask(weight, thresholds[i]).bool())
    assert flips.tolist() == [int(m.sum()) for m in masks]
    assert ops.threshold_pass(weights, thresholds, scores, masks, backend=backend).tolist() == [0] * len(weights)


def test_flips_count_both_directions(backend):
    weights, thresholds, _ = layers(torch.float64)
    scores, masks = buffers(weights)
    ops.threshold_pass(weights, thresholds, scores, masks, backend=backend)
    masks[1][:3] = ~masks[1][:3]
    masks[3][0] = ~masks[3][0]
    assert ops.threshold_pass(weights, thresholds, scores, masks, backend=backend).tolist() == [0, 3, 0, 1, 0]


def test_ties_are_pruned(backend):
    weights = [torch.tensor([[1.0, -1.0], [0.0, 0.0], [2.0, 2.0]], dtype=torch.double)]
    scores, masks = buffers(weights)
    ops.threshold_pass(weights, [torch.tensor([1.0, 0.0, 1.0], dtype=torch.double)], scores, masks, backend=backend)
    assert masks[0].tolist() == [False, False, True]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_not_finite(value, backend):
    weights = [torch.ones(3, 70)]
    weights[0][1, 69] = float(value)
    scores, masks = buffers(weights)
    ops.threshold_pass(weights, [torch.zeros(3)], scores, masks, backend=backend)
    assert masks[0].tolist() == [True, value == "inf", True]
    assert str(scores[0][1].item()) == value


def test_compact_layers(backend):
    weights, thresholds, expected = layers(torch.float64)
    columns = [torch.randperm(w.flatten(1).shape[1])[: (w.flatten(1).shape[1] + 1) // 2] for w in weights]
    stored = [w.flatten(1)[:, c].contiguous() for w, c in zip(weights, columns)]
    rests = [w.flatten(1).abs().sum(1) - s.abs().sum(1) for w, s in zip(weights, stored)]
    scores, masks = buffers(weights)
    n_in = [w.flatten(1).shape[1] for w in weights]
    ops.threshold_pass(stored, thresholds, scores, masks, rests, n_in, backend=backend)
    for i, weight in enumerate(weights):
        torch.testing.assert_close(scores[i], expected[i], rtol=1e-13, atol=1e-15)
        assert torch.equal(masks[i], reference.filter_mask(weight, thresholds[i]).bool())


def test_empty_layer(backend):
    weights = [torch.ones(0, 3), torch.ones(2, 3)]
    scores, masks = buffers(weights)
    flips = ops.threshold_pass(weights, [torch.zeros(0), torch.zeros(2)], scores, masks, backend=backend)
    assert flips.tolist() == [0, 2]


def test_uint8_masks(backend):
    weights, thresholds, _ = layers(torch.float64)
    scores, masks = buffers(weights)
    bytes_ = [m.to(torch.uint8) for m in masks]
    a = ops.threshold_pass(weights, thresholds, scores, masks, backend=backend)
    b = ops.threshold_pass(weights, thresholds, scores, bytes_, backend=backend)
    assert torch.equal(a, b) and all(torch.equal(m, n.bool()) for m, n in zip(masks, bytes_))


def test_opcheck(extension):
    weights, thresholds, _ = layers(torch.float32)
    ops.threshold_pass(weights, thresholds, *buffers(weights), backend="native")
    n_in = [w.flatten(1).shape[1] for w in weights]
    library.opcheck(extension.threshold_pass.default, (weights, thresholds, [], n_in, *buffers(weights)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "at least one layer"),
        ({"thresholds": []}, "thresholds must have one entry per weight, 1; got 0"),
        ({"thresholds": [torch.zeros(2)]}, r"thresholds\[0\] must have one value per filter, shape \(3,\)"),
        ({"masks": [torch.zeros(3)]}, r"masks\[0\] must be bool or uint8; got torch.float32"),
        ({"rests": [torch.zeros(3)]}, "n_in must be given with rests"),
        ({"n_in": [0]}, r"n_in\[0\] must be positive"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "weights": [torch.ones(3, 4)],
        "thresholds": [torch.zeros(3)],
        "scores": [torch.zeros(3)],
        "masks": [torch.zeros(3, dtype=torch.bool)],
    }
    with pytest.raises(ValueError, match=message):
        ops.threshold_pass(**(arguments | change))


def test_strided_weights_take_the_twin(extension):
    weights, thresholds = [torch.randn(4, 6).t()], [torch.zeros(6)]
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.threshold_pass(weights, thresholds, *buffers(weights), backend="native")
    scores, masks = buffers(weights)
    ops.threshold_pass(weights, thresholds, scores, masks)
    torch.testing.assert_close(scores[0], reference.filter_scores(weights[0]))

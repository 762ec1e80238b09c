"""Threshold pass and active lists against the definition in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pass_cases import DTYPES, NAN, POISON, check_lists, cohort, poisoned

from spafl_kernels import reference
from spafl_kernels.gpu import cuda_ops


@pytest.mark.parametrize("density", [0.0, "one", 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("clients", [1, 3])
def test_float64_equals_the_reference(schedule, density, clients):
    weights, thresholds = cohort(clients, density)
    state = poisoned(weights, pad_to=8)
    before = schedule.emu_launches()
    cuda_ops.threshold_pass(weights, thresholds, state, compare=False)
    assert schedule.emu_launches() - before == 2
    masks = []
    for l, (weight, threshold) in enumerate(zip(weights, thresholds)):
        scores = torch.stack([reference.filter_scores(w) for w in weight])
        torch.testing.assert_close(state.layer(state.scores, l), scores, rtol=1e-14, atol=0)
        masks.append(torch.stack([reference.filter_mask(w, t) for w, t in zip(weight, threshold)]).bool())
        assert torch.equal(state.layer(state.mask, l), masks[-1])
        if density != "one":
            assert masks[-1].sum() == clients * round(density * weight.shape[1])
    check_lists(state, weights, masks)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("density", ["one", 0.5])
def test_lower_precision_rounds_the_score_once(one_schedule, dtype, density):
    weights, thresholds = cohort(3, density, DTYPES[dtype])
    state = poisoned(weights, pad_to=4)
    cuda_ops.threshold_pass(weights, thresholds, state, compare=False)
    masks = []
    for l, (weight, threshold) in enumerate(zip(weights, thresholds)):
        scores, exact = state.layer(state.scores, l), weight.double().flatten(2).abs().mean(2)
        # fp32 sums of these lengths err by less than 1e-6; one rounding to the dtype of the weights by half a unit.
        error = 1e-6 if dtype == "float32" else torch.finfo(DTYPES[dtype]).eps / 2 * 1.001 + 1e-6
        torch.testing.assert_close(scores.double(), exact, rtol=error, atol=0)
        masks.append(scores > threshold)  # in the dtype of the weights
        assert torch.equal(masks[-1], exact > threshold.double())
        assert torch.equal(state.layer(state.mask, l), masks[-1])
    check_lists(state, weights, masks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tie_is_pruned_and_the_next_number_is_not(one_schedule, dtype):
    # Scores are exact here: any order of summation gives them.
    weight = torch.tensor(
        [[0.5, -0.5, 0.5], [1.0, -0.25, 0.25], [0.0, -0.0, 0.0], [0.5, 0.5, -0.5]], dtype=DTYPES[dtype]
    )
    below = torch.nextafter(torch.tensor(0.5, dtype=DTYPES[dtype]), torch.tensor(0.0, dtype=DTYPES[dtype])).item()
    threshold = torch.tensor([0.5, 0.5, 0.0, below], dtype=DTYPES[dtype])
    state = poisoned([weight[None]])
    cuda_ops.threshold_pass([weight[None]], [threshold[None]], state, compare=False)
    assert state.mask.tolist() == [[False, False, False, True]]
    assert torch.equal(state.mask[0], reference.filter_mask(weight, threshold).bool())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_comparison_is_made_after_rounding(one_schedule, dtype):
    # The exact mean lies above the threshold, its nearest number in the dtype on it: pruned, as in the definition.
    threshold, half_unit = 1.0, torch.finfo(DTYPES[dtype]).eps / 2
    weight = torch.full((1, 1, 16), 1.0, dtype=DTYPES[dtype])
    weight[..., 0] = 1.0 + 2 * half_unit
    assert weight.double().mean() > threshold
    state = poisoned([weight])
    cuda_ops.threshold_pass([weight], [torch.ones(1, 1, dtype=DTYPES[dtype])], state, compare=False)
    assert state.scores.item() == 1.0 and not state.mask.item()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_cover_the_range_of_the_dtype(one_schedule, dtype):
    # Rows of one element: the score is |w|, bit for bit, for every finite number of the dtype and for infinity.
    bits = torch.arange(0, 2**15, 37, dtype=torch.int32).to(torch.int16)
    values = bits.view(DTYPES[dtype])
    weight = (-values).view(1, -1, 1)
    state = poisoned([weight])
    cuda_ops.threshold_pass([weight], [torch.zeros(1, len(values), dtype=values.dtype)], state, compare=False)
    assert torch.equal(state.scores[0].isnan(), values.isnan())
    known = ~values.isnan()
    assert torch.equal(state.scores[0].view(torch.int16)[known], bits[known])


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_numbers(one_schedule, dtype):
    inf = float("inf")
    weight = torch.tensor([[1.0, NAN], [1.0, -inf], [1.0, 1.0], [1.0, 1.0], [inf, inf]], dtype=DTYPES[dtype])
    threshold = torch.tensor([0.0, 5.0, NAN, -inf, inf], dtype=DTYPES[dtype])
    state = poisoned([weight[None]])
    cuda_ops.threshold_pass([weight[None]], [threshold[None]], state, compare=False)
    assert state.mask.tolist() == [[False, True, False, True, False]]
    assert torch.equal(state.mask[0], reference.filter_mask(weight, threshold).bool())


def test_flips_and_changed_layers(schedule):
    weights, thresholds = cohort(2, 0.5)
    state = poisoned(weights, pad_to=1)
    cuda_ops.threshold_pass(weights, thresholds, state, compare=False)
    former = [state.layer(state.mask, l).clone() for l in range(len(weights))]
    for packed in state.packed:
        packed.fill_(NAN)
    cuda_ops.threshold_pass(weights, thresholds, state)
    check_lists(state, weights, former, former)
    assert not state.changed.any()
    for l, filter in ((0, 36), (-1, 0)):  # flip one filter of client 1 in the first layer and one in the last
        thresholds[l][1, filter] = 100.0 if former[l][1, filter] else -100.0
    for packed in state.packed:
        packed.fill_(NAN)
    cuda_ops.threshold_pass(weights, thresholds, state)
    masks = [
        torch.stack([reference.filter_mask(w, t) for w, t in zip(*pair)]).bool() for pair in zip(weights, thresholds)
    ]
    check_lists(state, weights, masks, former)
    assert state.changed.nonzero().tolist() == [[1, 0], [1, len(weights) - 1]]


@pytest.mark.parametrize("pad_to", [1, 5, 8, 64])
def test_lists_read_only_active_rows(schedule, pad_to):
    weights, thresholds = cohort(2, 0.3, torch.float32)
    state = poisoned(weights, pad_to)
    cuda_ops.threshold_pass(weights, thresholds, state, compare=False)
    masks = [state.layer(state.mask, l).clone() for l in range(len(weights))]
    for weight, mask in zip(weights, masks):
        weight[~mask] = NAN  # after the mask was made
    for tensor in (state.active, state.inverse, state.counts):
        tensor.fill_(POISON)
    for packed in state.packed:
        packed.fill_(NAN)
    state.changed.view(torch.uint8).fill_(0xCB)
    cuda_ops.active_lists(weights, state)
    check_lists(state, weights, masks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_does_not_depend_on_where_the_weight_lies(one_schedule, dtype):
    row = torch.randn(1, 1, 1031, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DTYPES[dtype])
    bits = {torch.float64: torch.int64, torch.float32: torch.int32}.get(row.dtype, torch.int16)
    seen = set()
    for shift in range(16):
        storage = torch.full((1031 + 32,), NAN, dtype=row.dtype)
        weight = storage[shift : shift + 1031].view(1, 1, 1031)
        weight.copy_(row)
        state = poisoned([weight])
        cuda_ops.threshold_pass([weight], [torch.zeros(1, 1, dtype=row.dtype)], state, compare=False)
        seen.add(state.scores.view(bits).item())
    assert len(seen) == 1


def test_channels_last_weights(one_schedule):
    weight = torch.randn(2, 11, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    last = torch.empty_strided(weight.shape, (11 * 54, 54, 1, 18, 6), dtype=torch.float64).copy_(weight)
    assert not last[0].is_contiguous() and last[0].is_contiguous(memory_format=torch.channels_last)
    threshold = torch.full((2, 11), 0.8, dtype=torch.float64)
    state = poisoned([last], pad_to=4)
    cuda_ops.threshold_pass([last], [threshold], state, compare=False)
    assert state.packed[0].stride()[2:] == last.stride()[2:]
    check_lists(state, [last], [last.flatten(2).abs().mean(2) > threshold])


def test_more_layers_than_one_launch_holds(one_schedule):
    shapes = [(1 + i % 11, 1 + i % 5) for i in range(150)]
    weights, thresholds = cohort(2, 0.5, shapes=shapes)
    state = poisoned(weights, pad_to=2)
    before = one_schedule.emu_launches()
    cuda_ops.threshold_pass(weights, thresholds, state, compare=False)
    assert one_schedule.emu_launches() - before == 4
    check_lists(state, weights, [w.flatten(2).abs().mean(2) > t for w, t in zip(weights, thresholds)])


def test_layers_longer_than_many_blocks(one_schedule):
    weights, thresholds = cohort(1, 0.4, torch.float32, shapes=[(1500, 2), (3, 5000)])
    state = poisoned(weights, pad_to=8)
    cuda_ops.threshold_pass(weights, thresholds, state, compare=False)
    check_lists(state, weights, [w.flatten(2).abs().mean(2) > t for w, t in zip(weights, thresholds)])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=4),
    clients=st.integers(1, 3),
    density=st.sampled_from([0.0, "one", 0.1, 0.5, 0.97, 1.0]),
    dtype=st.sampled_from(sorted(DTYPES)),
    pad_to=st.integers(1, 40),
    schedule=st.integers(0, 1000),
)
def test_any_shapes_and_masks(library, shapes, clients, density, dtype, pad_to, schedule):
    library.emu_seed(schedule)
    weights, thresholds = cohort(clients, density, DTYPES[dtype], shapes)
    state = poisoned(weights, pad_to)
    cuda_ops.threshold_pass(weights, thresholds, state, compare=False)
    check_lists(state, weights, [w.double().flatten(2).abs().mean(2) > t.double() for w, t in zip(weights, thresholds)])

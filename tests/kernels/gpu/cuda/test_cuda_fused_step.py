"""The fused step against torch: autograd of the penalty, clip_grad_norm_, SGD, then the definition of scores and
masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from spafl_kernels import reference
from spafl_kernels.gpu import cuda_ops

SHAPES = [(13, 3, 3, 3), (1, 1), (9, 530), (33, 8)]
OTHERS = [(1,), (13,), (1025,), (40, 51)]
NAN = float("nan")


class Cohort:
    """Parameters and gradients of a few clients, in one arena each, so that clients are far apart in memory."""

    def __init__(self, clients, dtype, shapes=SHAPES, others=OTHERS, seed=5):
        generator = torch.Generator().manual_seed(seed)
        groups = [shapes, [s[:1] for s in shapes], others]
        size = sum(torch.Size(s).numel() for group in groups for s in group)

        def arena(scale):
            values = scale * torch.randn(clients, size + 5, dtype=torch.float64, generator=generator)
            start, out = 0, []
            for group in groups:
                out.append([])
                for shape in group:
                    end = start + torch.Size(shape).numel()
                    out[-1].append(values.to(dtype)[:, start:end].view(clients, *shape))
                    start = end
            return out

        self.weights, self.thresholds, self.others = arena(1.0)
        self.grads = arena(0.3)
        for weight, threshold in zip(self.weights, self.thresholds):
            scores = weight.flatten(2).abs().mean(2)
            threshold.copy_(scores * (0.5 + torch.rand(scores.shape, generator=generator)))

    def tensors(self):
        return [*self.weights, *self.thresholds, *self.others]


class Torch:
    """The same optimiser written with torch, one client at a time."""

    def __init__(self, cohort, rates, penalty, momentum, weight_decay, max_norm):
        self.penalty, self.max_norm, self.layers = penalty, max_norm, len(cohort.weights)
        self.parameters = [[t[c].clone().requires_grad_() for t in cohort.tensors()] for c in range(len(rates))]
        self.optimisers = [
            # foreach=False: one operation per rounding, on every version of torch.
            torch.optim.SGD(p, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=False)
            for p, lr in zip(self.parameters, rates)
        ]

    def step(self, grads):
        norms = []
        for c, (parameters, optimiser) in enumerate(zip(self.parameters, self.optimisers)):
            optimiser.zero_grad()
            thresholds = parameters[self.layers : 2 * self.layers]
            if self.penalty:
                (self.penalty * sum(torch.exp(-t).sum() for t in thresholds)).backward()
            for p, g in zip(parameters, [g for group in grads for g in group]):
                p.grad = g[c].clone() if p.grad is None else p.grad + g[c]
            if self.max_norm is not None:
                norms.append(clip_grad_norm_(parameters, self.max_norm).item())
            optimiser.step()
        return norms


def run(cohort, rates, penalty, momentum, weight_decay, max_norm, steps, check):
    masks = cuda_ops.mask_state(cohort.weights)
    cuda_ops.threshold_pass(cohort.weights, cohort.thresholds, masks, compare=False)
    state = cuda_ops.step_state(
        cohort.weights,
        cohort.thresholds,
        cohort.others,
        learning_rate=rates[0],
        penalty=penalty,
        momentum=momentum,
    )
    if len(set(rates)) > 1:
        rates = torch.tensor(rates, dtype=torch.float64)
        state = cuda_ops.StepState(**{**vars(state), "learning_rate": rates})
    expected = Torch(cohort, [float(r) for r in rates], penalty, momentum, weight_decay, max_norm)
    for i in range(steps):
        former = masks.mask.clone()
        masks.scores.fill_(NAN)
        masks.flipped.view(torch.uint8).fill_(0xCB)
        state.partials.fill_(NAN)
        grads = [[g * (1 - 0.4 * i) for g in group] for group in cohort.grads]
        kept = [[g.clone() for g in group] for group in grads]
        cuda_ops.fused_step(
            cohort.weights,
            grads[0],
            cohort.thresholds,
            grads[1],
            cohort.others,
            grads[2],
            state,
            masks,
            momentum=momentum,
            weight_decay=weight_decay,
            max_norm=max_norm,
        )
        norms = expected.step(grads)
        assert all(torch.equal(a, b) for g, k in zip(grads, kept) for a, b in zip(g, k)), "gradients are read only"
        if norms:
            torch.testing.assert_close(state.norms, torch.tensor(norms, dtype=torch.float64), rtol=1e-6, atol=0)
        for k, tensor in enumerate(cohort.tensors()):
            check(tensor, torch.stack([p[k].detach() for p in expected.parameters]))
        if momentum:
            buffers = [*state.weight_momenta, *state.threshold_momenta, *state.other_momenta]
            for k, buffer in enumerate(buffers):
                wanted = [o.state[p[k]]["momentum_buffer"] for o, p in zip(expected.optimisers, expected.parameters)]
                check(buffer, torch.stack(wanted))
        fresh = cuda_ops.mask_state(cohort.weights)
        cuda_ops.threshold_pass(cohort.weights, cohort.thresholds, fresh, compare=False)
        assert torch.equal(masks.scores, fresh.scores), "bitwise the scores of the threshold pass"
        assert torch.equal(masks.mask, fresh.mask)
        assert torch.equal(masks.flipped.view(torch.uint8).bool(), masks.mask != former)
        assert masks.flipped.view(torch.uint8).max() <= 1
        for l, (weight, threshold) in enumerate(zip(cohort.weights, cohort.thresholds)):
            for c in range(len(weight)):
                wanted = reference.filter_mask(weight[c], threshold[c]).bool()
                assert torch.equal(masks.layer(masks.mask, l)[c], wanted)
    return masks, state


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)


def bitwise(actual, expected):
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize("momentum, weight_decay", [(0.9, 0.0), (0.9, 0.01), (0.0, 0.01)])
def test_three_float64_steps_equal_torch(schedule, momentum, weight_decay, max_norm):
    cohort = Cohort(1, torch.float64)
    run(cohort, [0.05], 0.02, momentum, weight_decay, max_norm, 3, close)


def test_clients_have_their_own_norms_and_learning_rates(schedule):
    cohort = Cohort(3, torch.float64)
    for group in cohort.grads:
        for grad in group:
            grad[1].mul_(100.0)
    _, state = run(cohort, [0.1, 0.02, 0.3], 0.05, 0.9, 0.001, 2.0, 3, close)
    assert state.norms[1] > 50 * state.norms[0]


@pytest.mark.parametrize("momentum, weight_decay", [(0.9, 0.0), (0.9, 0.01), (0.0, 0.0), (0.0, 0.01)])
def test_float32_without_clipping_is_bitwise_sgd(one_schedule, momentum, weight_decay):
    cohort = Cohort(2, torch.float32)
    run(cohort, [0.05, 0.05], 0.0, momentum, weight_decay, None, 3, bitwise)


def test_float32_with_clipping_and_penalty(one_schedule):
    # The norm is summed in float64 here and in float32 by torch: relative error of the factor below 1e-6.
    cohort = Cohort(2, torch.float32)
    run(
        cohort,
        [0.05, 0.05],
        0.02,
        0.9,
        0.01,
        0.5,
        3,
        lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=3e-6, atol=1e-7),
    )


def test_the_penalty_moves_thresholds_alone(one_schedule):
    cohort = Cohort(1, torch.float64)
    for group in cohort.grads:
        for grad in group:
            grad.zero_()
    before = [t.clone() for t in cohort.tensors()]
    run(cohort, [1.0], 0.25, 0.0, 0.0, None, 1, close)
    layers = len(SHAPES)
    for k, (old, new) in enumerate(zip(before, cohort.tensors())):
        if layers <= k < 2 * layers:
            torch.testing.assert_close(new, old + 0.25 * torch.exp(-old), rtol=1e-14, atol=0)
        else:
            assert torch.equal(old, new)


def test_without_a_penalty_a_threshold_may_be_as_low_as_it_likes(one_schedule):
    """``exp(100)`` is no float32, and infinity times 0 is NaN."""
    cohort = Cohort(1, torch.float32)
    for threshold in cohort.thresholds:
        threshold[..., 0] = -100.0
    run(cohort, [0.05], 0.0, 0.9, 0.0, None, 2, bitwise)
    assert all(t.isfinite().all() for t in cohort.tensors())


def test_a_nan_gradient_stays_with_its_client(one_schedule):
    cohort = Cohort(3, torch.float64)
    cohort.grads[0][2][1, 4, 7] = NAN
    masks = cuda_ops.mask_state(cohort.weights)
    cuda_ops.threshold_pass(cohort.weights, cohort.thresholds, masks, compare=False)
    state = cuda_ops.step_state(cohort.weights, cohort.thresholds, cohort.others, learning_rate=0.1, momentum=0.9)
    parameters = (cohort.weights, cohort.grads[0], cohort.thresholds, cohort.grads[1], cohort.others, cohort.grads[2])
    cuda_ops.fused_step(*parameters, state, masks, momentum=0.9, max_norm=1.0)
    assert state.norms.isnan().tolist() == [False, True, False]
    for tensor in cohort.tensors():
        assert tensor[1].isnan().all()  # as clip_grad_norm_ leaves it: the factor is NaN
        assert tensor[0].isfinite().all() and tensor[2].isfinite().all()
    assert not masks.mask[1].any()


def test_more_parameters_than_one_launch_holds(one_schedule):
    cohort = Cohort(2, torch.float64, shapes=[(3, 5)] * 120, others=[(7,)] * 90)
    before = one_schedule.emu_launches()
    run(cohort, [0.1, 0.1], 0.01, 0.9, 0.0, 0.3, 1, close)
    passes = 2 * 2 * 2  # two threshold passes of two kernels, 120 layers in two launches each
    assert one_schedule.emu_launches() - before == passes + 2 * 3


@pytest.mark.parametrize("max_norm, launches", [(None, 1), (1.0, 2)])
def test_number_of_launches(one_schedule, max_norm, launches):
    cohort = Cohort(2, torch.float32)
    masks = cuda_ops.mask_state(cohort.weights)
    cuda_ops.threshold_pass(cohort.weights, cohort.thresholds, masks, compare=False)
    state = cuda_ops.step_state(cohort.weights, cohort.thresholds, learning_rate=0.1)
    before = one_schedule.emu_launches()
    cuda_ops.fused_step(
        cohort.weights, cohort.grads[0], cohort.thresholds, cohort.grads[1], [], [], state, masks, max_norm=max_norm
    )
    assert one_schedule.emu_launches() - before == launches


def test_channels_last_parameters(one_schedule):
    shape, strides = (2, 7, 5, 3, 3), (7 * 45, 45, 1, 15, 5)
    cohort = Cohort(2, torch.float64, shapes=[shape[1:]], others=[])
    dense = [cohort.weights[0].clone(), cohort.grads[0][0].clone()]
    cohort.weights[0], cohort.grads[0][0] = (
        torch.empty_strided(shape, strides, dtype=torch.float64).copy_(t) for t in dense
    )
    masks = cuda_ops.mask_state(cohort.weights)
    cuda_ops.threshold_pass(cohort.weights, cohort.thresholds, masks, compare=False)
    state = cuda_ops.step_state(cohort.weights, cohort.thresholds, learning_rate=0.1, momentum=0.5)
    cuda_ops.fused_step(
        cohort.weights, cohort.grads[0], cohort.thresholds, cohort.grads[1], [], [], state, masks, momentum=0.5
    )
    torch.testing.assert_close(cohort.weights[0], dense[0] - 0.1 * dense[1], rtol=1e-14, atol=1e-16)

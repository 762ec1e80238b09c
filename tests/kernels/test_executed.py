"""Executed multiply-accumulates of threshold layers against numbers worked out by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spafl_kernels import ThresholdLinear, executed
from spafl_kernels.gpu.narrow import narrow
from spafl_kernels.training import MaskedTrainer, SGDOptions

SPAFL = torch.ops.spafl


class ByOperator(ThresholdLinear):
    """Runs the operator of the packed kernels, whose CPU implementation defines them."""

    def forward(self, input):
        return SPAFL.threshold_linear(
            input[None], self.weight[None], self.threshold[None], None, self.estimator, self.mask_bias
        )[0][0]


class ByNarrow(ThresholdLinear):
    """Runs dense operators on the active filters."""

    def forward(self, input):
        return narrow(input, self.weight, self.threshold, None, self.estimator, self.mask_bias, None)


def prune(layer, keep, far=0):
    """``keep`` filters stay active. Pruned ones are .5 below their threshold, the last ``far`` of them 2 below."""
    with torch.no_grad():
        scores = layer.weight.abs().mean(1)
        margin = torch.full_like(scores, -0.5)
        margin[:keep], margin[len(margin) - far :] = 0.5, -2.0
        layer.threshold.copy_(scores - margin)


def net(kind, estimator="identity"):
    torch.manual_seed(0)
    first = kind(6, 8, bias=False, estimator=estimator)
    return nn.Sequential(first, nn.ReLU(), kind(8, 5, bias=False, estimator=estimator), nn.Linear(5, 3))


def batch(n):
    return torch.randn(n, 6), torch.randint(0, 3, (n,))


# first, second: active filters; rows: of the weight gradients. The ReLU keeps gradients from the first one's pruned
# filters. All of the second one's get one: all pass the identity, and those 2 below their threshold the window.
@pytest.mark.parametrize(
    ("estimator", "first", "second", "far", "rows"),
    [
        ("identity", 8, 5, 0, (8, 5)),
        ("identity", 4, 2, 0, (4, 5)),
        ("identity", 0, 0, 0, (0, 5)),
        ("window", 8, 5, 0, (8, 5)),
        ("window", 4, 2, 1, (4, 3)),
        ("window", 3, 0, 4, (3, 4)),
        ("window", 0, 0, 0, (0, 0)),
    ],
)
def test_a_training_counts_what_its_layers_compute(estimator, first, second, far, rows):
    model = net(ByOperator, estimator)
    prune(model[0], first)
    prune(model[2], second, far)
    trainer = MaskedTrainer(model)
    for _ in range(2):  # a second training begins at 0
        trainer.begin(SGDOptions(lr=0.0))
        for n in (4, 4, 2):
            trainer.step(*batch(n))
        result = trainer.finish()
        # Forward and weight gradient of the first layer, whose input needs none; all three of the second; a dense head.
        products = 6 * (first + rows[0]) + 8 * (2 * second + rows[1]) + 3 * 15
        assert result.macs == 10 * products


def test_masks_that_change_between_steps_change_the_count():
    model = net(ByOperator)
    trainer = MaskedTrainer(model)
    trainer.begin(SGDOptions(lr=0.0))
    want = 0
    for keep in (8, 4, 1):
        prune(model[0], keep)
        prune(model[2], 5)
        trainer.step(*batch(4))
        want += 4 * (6 * 2 * keep + 8 * 15 + 45)
    assert trainer.finish().macs == want


def test_dense_operators_on_active_filters_count_the_rows_that_they_compute():
    model = net(ByNarrow)
    trainer = MaskedTrainer(model)
    trainer.begin(SGDOptions(lr=0.0))
    want = 0
    # Rows are computed in multiples of 8 as far as there are filters; those of the gradient of the input are not.
    for first, rows, second in ((8, 8, 5), (4, 8, 2), (0, 0, 2)):
        prune(model[0], first)
        prune(model[2], second)
        trainer.step(*batch(4))
        want += 4 * (6 * 2 * rows + 8 * (5 + second + 5) + 45)
    assert trainer.finish().macs == want


def test_a_step_that_raises_leaves_nothing_behind():
    counter, selection = executed.Executed(), torch.tensor([3], dtype=torch.int32)
    with pytest.raises(KeyError), counter.counting():
        executed.note(selection, 10, 2)
        raise KeyError
    assert not executed.counting()
    executed.note(selection, 10, 2)  # nobody counts
    with counter.counting():
        executed.note(selection, 100, 1)
        executed.note(selection, 1, torch.tensor([7], dtype=torch.int32))
        executed.note_number(5000)
    assert counter.total() == 300 + 21 + 5000


def test_sums_do_not_overflow_and_do_not_round():
    counter, selection = executed.Executed(), torch.tensor([2**30, 1], dtype=torch.int32)
    for _ in range(3):
        with counter.counting():
            executed.note(selection, 2**31 + 1, 1)
    assert counter.total() == 3 * (2**30 + 1) * (2**31 + 1)


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_the_flop_counter_counts_the_layer_with_all_filters(needs):
    """As for the dense operator of the same sizes, forward and backward."""
    threshold, steps = torch.full((1, 7), -1.0), ((2, 1), (1, 0), (1, 2))
    sizes = [((1, 5, 6), (1, 7, 6)), ((1, 2, 3, 9, 8), (1, 7, 3, 3, 2))]
    for x_size, w_size in sizes:
        x, w = torch.randn(x_size, requires_grad=needs[0]), torch.randn(w_size, requires_grad=needs[1])
        linear = len(w_size) == 3
        with FlopCounterMode(display=False) as ours:
            if linear:
                y = SPAFL.threshold_linear(x, w, threshold, None, "identity", False)[0]
            else:
                y = SPAFL.threshold_conv2d(x, w, threshold, None, *steps, "identity", False)[0]
            y.sum().backward()
        with FlopCounterMode(display=False) as dense:
            z = F.linear(x[0], w[0]) if linear else F.conv2d(x[0], w[0], None, *steps)
            z.sum().backward()
        assert ours.get_total_flops() == dense.get_total_flops() > 0

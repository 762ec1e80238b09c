"""The definition itself: autograd through the step against the closed form of the gradients."""

import pytest
import torch

from spafl_kernels import reference


@pytest.mark.parametrize("estimator", reference.ESTIMATORS)
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 2), (1, 1), (3, 7, 1, 1)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_closed_form_gradients_equal_autograd(estimator, shape, scale):
    generator = torch.Generator().manual_seed(7)
    weight = (scale * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()
    with torch.no_grad():
        weight.view(-1)[0] = 0.0  # sign(0) = 0
    scores = reference.filter_scores(weight).detach()
    threshold = (scores * torch.linspace(0.2, 1.8, len(scores), dtype=torch.float64)).requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64, generator=generator)
    masked, _ = reference.mask_weight_and_bias(weight, threshold, None, estimator, False)
    masked.backward(grad)
    grad_weight, grad_threshold = reference.mask_gradients(weight.detach(), threshold.detach(), grad, estimator)
    torch.testing.assert_close(weight.grad, grad_weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(threshold.grad, grad_threshold, rtol=1e-12, atol=1e-14)


def test_a_tie_is_pruned():
    weight = torch.tensor([[0.5, -0.5], [0.5, -0.5]])
    threshold = torch.tensor([0.5, 0.4999])
    assert reference.filter_mask(weight, threshold).tolist() == [0.0, 1.0]


def test_window_passes_only_far_from_the_threshold():
    weight = torch.tensor([[3.0, 3.0], [1.5, 1.5]])
    _, near = reference.mask_gradients(weight, torch.ones(2), torch.ones(2, 2), "window")
    assert near.tolist() == [-6.0, 0.0]


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="estimator must be one of identity, window; got 'sigmoid'"):
        reference.filter_mask(torch.ones(1, 1), torch.zeros(1), "sigmoid")

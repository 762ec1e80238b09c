"""The fused step against torch.optim.SGD, clip_grad_norm_ and an autograd penalty."""

import itertools

import pytest
import torch
from torch import library

from spafl_kernels import ops

SIZES = [(20, 25), (20,), (7, 3, 5, 5), (7,), (1,), (2500,)]
IS_THRESHOLD = [0, 1, 0, 1, 0, 0]


def tensors(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=dtype, generator=generator) for s in SIZES]


def torch_steps(params, grads, lr, momentum, weight_decay, penalty, max_norm):
    """Three steps; returns the norms. The penalty's gradient comes from autograd."""
    params = [torch.nn.Parameter(p) for p in params]
    optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    norms = []
    for step in grads:
        optimizer.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(params, step))
        loss = loss + penalty * sum(torch.exp(-p).sum() for p, t in zip(params, IS_THRESHOLD) if t)
        loss.backward()
        if max_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(params, max_norm))
        optimizer.step()
    buffers = [optimizer.state[p]["momentum_buffer"] for p in params] if momentum else []
    return params, buffers, [p.grad for p in params], norms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("momentum", "weight_decay", "penalty", "max_norm"),
    list(itertools.product([0.0, 0.9], [0.0, 5e-4], [0.0, 0.3], [None, 1.0, 1e6])),
)
def test_equals_torch(momentum, weight_decay, penalty, max_norm, dtype, backend):
    params, grads = tensors(dtype, 0), [tensors(dtype, s) for s in (1, 2, 3)]
    options = (0.05, momentum, weight_decay, penalty, max_norm)
    want, buffers, clipped, norms = torch_steps([p.clone() for p in params], grads, *options)
    momenta = [torch.zeros_like(p) for p in params] if momentum else []
    tolerance = {"rtol": 1e-13, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-7}
    for i, step in enumerate(grads):
        step = [g.clone() for g in step]
        norm = ops.sgd_step(params, step, momenta, IS_THRESHOLD, *options, write_grad=True, backend=backend)
        if max_norm is not None:
            torch.testing.assert_close(norm, norms[i], **tolerance)
    for have, expected in zip([*params, *momenta, *step], [*want, *buffers, *clipped]):
        torch.testing.assert_close(have, expected.detach(), **tolerance)


def test_unwritten_gradients_give_the_same_step(backend):
    runs = []
    for write_grad in (True, False):
        params, grads, momenta = (tensors(torch.float64, s) for s in (0, 1, 2))
        ops.sgd_step(
            params, grads, momenta, IS_THRESHOLD, 0.1, 0.9, 1e-3, 0.2, 0.5, write_grad=write_grad, backend=backend
        )
        runs.append([*params, *momenta])
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=1e-16)


def test_extra_norm_counts(backend):
    """Leaving a tensor out and giving its squared norm is the same as having it in."""
    params, grads = tensors(torch.float64, 0), tensors(torch.float64, 1)
    part, part_grads = [p.clone() for p in params[:-1]], [g.clone() for g in grads[:-1]]
    extra = float(grads[-1].square().sum())
    ops.sgd_step(params, grads, [], IS_THRESHOLD, 0.1, max_norm=1.0, backend=backend)
    ops.sgd_step(part, part_grads, [], IS_THRESHOLD[:-1], 0.1, max_norm=1.0, extra_norm2=extra, backend=backend)
    for a, b in zip(part, params):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_a_gradient_that_is_not_a_number_reaches_every_parameter_when_clipping(backend):
    params, grads = tensors(torch.float32, 0), tensors(torch.float32, 1)
    grads[4][0] = float("nan")
    norm = ops.sgd_step(params, grads, [], IS_THRESHOLD, 0.1, max_norm=1.0, backend=backend)
    assert norm.isnan() and all(p.isnan().all() for p in params)


def test_opcheck(extension):
    params, grads, momenta = (tensors(torch.float32, s) for s in (0, 1, 2))
    ops.sgd_step(params, grads, momenta, IS_THRESHOLD, 0.1, 0.9, backend="native")
    library.opcheck(
        extension.sgd_step.default, (params, grads, momenta, IS_THRESHOLD, 0.1, 0.9, 0.0, 0.1, 1.0, 0.0, True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and not negative; got -1.0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"penalty": float("inf")}, "penalty must be finite"),
        ({"max_norm": -1.0}, "max_norm must not be negative"),
        ({"params": []}, "at least one tensor"),
        ({"grads": []}, "grads must have one entry per parameter, 1; got 0"),
        ({"grads": [torch.zeros(2)]}, r"grads\[0\] must have shape \(3,\); got \(2,\)"),
        ({"momentum": 0.9}, "momenta must be given exactly when momentum is not 0"),
        ({"momenta": [torch.zeros(3)]}, "momenta must be given exactly when momentum is not 0"),
    ],
)
def test_bad_input(change, message):
    arguments = {"params": [torch.zeros(3)], "grads": [torch.zeros(3)], "momenta": [], "is_threshold": [0], "lr": 0.1}
    with pytest.raises(ValueError, match=message):
        ops.sgd_step(**(arguments | change))

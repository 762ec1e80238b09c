"""Inputs of layers with a chosen set of active filters, and what the definition makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spafl_kernels import reference
from spafl_kernels.gpu import closed_form
from spafl_kernels.gpu.geometry import Geometry
from spafl_kernels.gpu.packing import Selection
from spafl_kernels.gpu.triton import layer_backward, layer_forward, select_layer


@dataclasses.dataclass
class Case:
    geometry: Geometry
    x: Tensor
    weight: Tensor
    threshold: Tensor
    bias: Tensor
    grad: Tensor
    keep: Tensor

    def selection(self, estimator: str = "identity") -> tuple[Selection, Tensor]:
        data, packed = closed_form.selection_and_packed(self.weight, self.threshold, estimator, self.x.dtype)
        return Selection(data, self.weight.shape[1]), packed


def counts(out: int) -> list[int]:
    """Active filters at densities 0, 1/out, .1, .5, .97 and 1, each number once."""
    return sorted({0, 1, round(0.1 * out), out // 2, int(0.97 * out), out})


def make(
    out: int,
    geometry: Geometry,
    n: int,
    count: int | None = None,
    clients: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    dead_gradient: bool = False,
    weight_dtype: torch.dtype | None = None,
) -> Case:
    """A layer with ``count`` active filters per client (all different), margins far from 0 and from the window.

    ``dead_gradient``: dL/dy of pruned filters is 0, as behind a ReLU; otherwise of about half of them.
    """
    g = torch.Generator().manual_seed(seed)
    weight_dtype = weight_dtype or dtype

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g)

    weight = (3 * randn(clients, out, geometry.channels, *geometry.kernel)).to(weight_dtype)
    scores = torch.stack([reference.filter_scores(w) for w in weight]).float()
    keep = rand(clients, out).argsort(1) < (out // 2 if count is None else count)
    distance = torch.where(rand(clients, out) < 0.5, 0.5, 1.5)
    threshold = torch.where(keep, scores - distance, scores + distance).to(weight_dtype)
    grad = randn(clients, n, out, *geometry.output).to(dtype)
    zero = ~keep if dead_gradient else ~keep & (rand(clients, out) < 0.5)
    grad[zero[:, None].expand(-1, n, -1)] = 0
    x = randn(clients, n, geometry.channels, geometry.height, geometry.width).to(dtype)
    return Case(geometry, x, weight, threshold, randn(clients, out).to(weight_dtype), grad, keep)


def expected_output(case: Case, bias: bool, mask_bias: bool) -> Tensor:
    """The definition in float64 on the same numbers, the mask given."""
    weight = torch.where(case.keep[..., None, None, None], case.weight.double(), 0)
    b = case.bias.double() * (case.keep if mask_bias else 1)
    g = case.geometry
    return torch.stack(
        [
            torch.nn.functional.conv2d(x.double(), w, c if bias else None, g.stride, g.padding, g.dilation)
            for x, w, c in zip(case.x, weight, b, strict=True)
        ]
    )


def expected_gradients(case: Case, selection: Selection, bias: bool, mask_bias: bool) -> tuple[Tensor, ...]:
    """The closed form in float64 on the same numbers and the same selection."""
    return closed_form.backward(
        case.grad.double(), case.x.double(), case.weight.double(), selection, case.bias.double() if bias else None,
        mask_bias, case.geometry,
    )  # fmt: skip


def definition(case: Case, estimator: Any, mask_bias: bool) -> tuple[Tensor, ...]:
    """Output and gradients of the masked reference itself, in float64: what not even 0 makes finite is there."""
    leaves = [t.double().requires_grad_() for t in (case.x, case.weight, case.threshold, case.bias)]
    g, rest = case.geometry, (estimator, mask_bias)
    y = torch.stack(
        [
            reference.threshold_conv2d(x, w, t, b, g.stride, g.padding, g.dilation, 1, *rest)
            for x, w, t, b in zip(*leaves, strict=True)
        ]
    )
    return y.detach(), *torch.autograd.grad(y, leaves, case.grad.double())


def spoil(case: Case, what: str, value: float) -> None:
    """Put ``value`` into the weight, or the bias, of a pruned filter of each client, and no gradient behind it.

    ``what``: ``"weight"``, ``"bias"``, or ``"both"``, of two filters.
    """
    for client, keep in enumerate(case.keep):
        first, second = (~keep).nonzero()[client : client + 2, 0].tolist()
        if what != "bias":
            case.weight[client, first, 1, -1, 0], case.grad[client, :, first] = value, 0
        if what != "weight":
            case.bias[client, second], case.grad[client, :, second] = value, 0


def run(
    case: Case, estimator: str, bias: bool, mask_bias: bool, tf32: bool, forward: Any = None, backward: Any = None
) -> tuple[Selection, Tensor, Tensor, tuple[Tensor | None, ...]]:
    """``(selection, packed, y, gradients)``, through the launchers; ``forward`` and ``backward``: tiles."""
    b, g = case.bias if bias else None, case.geometry
    selection, packed, _ = select_layer(case.weight, case.threshold, estimator, case.x.dtype)
    y = layer_forward(case.x, packed, selection, b, g, mask_bias, tf32, forward)
    return selection, packed, y, layer_backward(
        case.grad, case.x, case.weight, packed, selection, b, g, mask_bias, tf32, tile=backward
    )  # fmt: skip


def check(
    case: Case,
    selection: Selection,
    y: Tensor,
    gradients: Sequence[Tensor | None],
    tolerance: float,
    bias: bool,
    mask_bias: bool,
) -> None:
    """Mask, output and gradients are those of the definition."""
    assert torch.equal(selection.mask, case.keep)
    assert error(y, expected_output(case, bias, mask_bias)) < tolerance
    kept_bias = case.bias.to(y.dtype)[:, None, :, None, None] if bias and not mask_bias else torch.zeros(())
    pruned = ~case.keep[:, None, :, None, None].expand_as(y)
    assert torch.equal(y[pruned], kept_bias.expand_as(y)[pruned])  # exactly the bias, or exactly 0
    want = expected_gradients(case, selection, bias, mask_bias)
    # Sums may cancel to next to nothing: then one rounding, in float32, of what was added up is as good.
    added_up = expected_gradients(_absolute(case), selection, bias, mask_bias)
    for name, got, expected, added in zip(("dx", "dw", "dtau", "dbias"), gradients, want, added_up, strict=True):
        if got is not None and not error(got, expected) < tolerance:
            assert error(got, expected, added) < ROUNDING, name


ROUNDING = 2.0**-24


def _absolute(case: Case) -> Case:
    """The layer in which nothing cancels: magnitudes of input, weight and gradient."""
    return dataclasses.replace(case, x=case.x.abs(), weight=case.weight.abs(), grad=case.grad.abs())


def error(got: Tensor, want: Tensor, beside: Tensor | None = None) -> float:
    """Root mean square of the difference over that of ``beside``, by default ``want``; infinite where ``got`` is not
    finite."""
    difference = got.double() - want.double()
    if not difference.isfinite().all():
        return float("inf")
    size = (want if beside is None else beside).double().square().mean().sqrt()
    return float(difference.square().mean().sqrt() / size) if size > 0 else float(difference.abs().max())

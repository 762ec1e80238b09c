"""Threshold layers on a CPU by PyTorch's own operators on the active filters alone.

The same function as the reference: the output has full width, pruned channels hold 0 (or their bias), and only rows of
the weight are gathered, never activations. Backward, the gradient of the input and the rows of ``G`` of active filters
come from the gathered channels of the incoming gradient. A pruned filter needs its row of ``G`` too where the estimator
lets a gradient through that is not 0, which is asked at run time.

What is not finite must not get lost: the reference computes ``0 * NaN``. Weights and masked biases are looked at in the
forward pass and the gradients of pruned channels in the backward pass; where one is not finite the reference runs.

It pays where enough filters are pruned in a layer with enough work, see :func:`pays`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backend, eager, executed, reference
from ..reference import Estimator
from ..some_filters import MULTIPLE, Steps, gradients, listed, of_rows, product
from . import compiled

__all__ = ["Layer", "Steps", "convolution", "explain", "linear", "pays", "run"]

Masked = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Layer(NamedTuple):
    """What a layer is, apart from its tensors.

    ``masked`` is the reference with the layer's own arguments; ``steps`` is None for a linear layer, and for what is
    not ``possible`` here.
    """

    masked: Masked
    steps: Steps | None
    estimator: Estimator
    mask_bias: bool
    possible: bool = True

    @property
    def dim(self) -> int:
        """The dimension of the weight that counts its filters."""
        return int(self.steps is not None and self.steps.transposed)


def linear(masked: Masked, estimator: Estimator, mask_bias: bool) -> Layer:
    """A linear layer."""
    return Layer(masked, None, estimator, mask_bias)


def convolution(
    masked: Masked, weight: Tensor, stride: tuple[int, ...], padding: Any, dilation: tuple[int, ...], groups: int,
    estimator: Estimator, mask_bias: bool, output_padding: tuple[int, ...] | None = None,
) -> Layer:  # fmt: skip
    """A convolution; a transposed one has an output padding."""
    impossible = Layer(masked, None, estimator, mask_bias, possible=False)
    if groups != 1:
        return impossible
    if padding == "valid":
        padding = 0
    elif padding == "same":
        both = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        if any(n % 2 for n in both) or any(s != 1 for s in stride):
            return impossible
        padding = tuple(n // 2 for n in both)
    pads = padding if isinstance(padding, tuple) else (padding,) * len(stride)
    pads = pads * len(stride) if len(pads) == 1 else pads
    steps = Steps(stride, pads, dilation, output_padding is not None, output_padding or ())
    return Layer(masked, steps, estimator, mask_bias)


# ------------------------------------------------------------------------------------------------------------ choice
# Seconds by which skipping is dearer whatever it skips, by the number of products that are sure to shrink: the forward
# pass alone; it and the gradient of the input under ``identity``, whose other terms cost as well; all under ``window``.
FIXED = {1: 1e-4, 2: 5e-4, 3: 2.5e-4}
# Seconds for each number of the output, which is gathered and spread; seconds of a multiply-accumulate.
PER_OUTPUT, PER_MAC = 1.5e-9, 2.5e-11
# Gains below this share of the dense time are left, and so are layers that oneDNN computes in one or two blocks.
MARGIN, NARROWEST = 0.05, 32


def pays(products: int, macs: int, outputs: int, width: int, filters: int) -> bool:
    """Whether skipping takes less time than the dense operator. The constants were fitted on one machine to
    benchmarks/results/layer.csv; one that is faster or slower in all of them decides alike.

    Args:
        products: that are sure to shrink: 1 forward alone, 2 training under ``identity``, 3 under ``window``.
        macs: multiply-accumulates of the dense forward pass.
        outputs: numbers in the result, pruned channels included.
        width: filters of the layer.
        filters: those that are active.
    """
    share = min(width, -(-filters // MULTIPLE) * MULTIPLE) / width
    dense = macs * PER_MAC
    gain = products * dense * (1 - share) - FIXED[products] - outputs * PER_OUTPUT
    return width >= NARROWEST and gain > MARGIN * dense * (1 if products == 1 else 3)


def _work(x: Tensor, weight: Tensor, steps: Steps | None) -> tuple[int, int]:
    """``(macs, outputs)`` of the dense forward pass for a batch."""
    if steps is None:
        return len(x) * weight.numel(), len(x) * len(weight)
    size = _output_size(x.shape[2:], weight.shape[2:], steps)
    places = x.shape[2:] if steps.transposed else size
    outputs = len(x) * weight.shape[steps.transposed] * math.prod(size)
    return len(x) * weight.numel() * math.prod(places), outputs


def _output_size(size: Any, kernel: Any, steps: Steps) -> list[int]:
    rest = zip(size, kernel, steps.stride, steps.padding, steps.dilation, strict=True)
    if steps.transposed:
        sizes = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in rest]
        return [n + extra for n, extra in zip(sizes, steps.output_padding, strict=True)]
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in rest]


def _unfit(x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None) -> str | None:
    """Why the reference has to run whatever is pruned, or None."""
    if not eager.plain(x, weight, threshold, bias) or forward_ad._current_level >= 0:
        return "something listens to operators (a transform, a mode, a tracer or a tensor subclass)"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast"
    dtype = weight.dtype
    if dtype not in (torch.float32, torch.float64):
        return f"{dtype} runs the dense operator"
    tensors = (x, threshold) if bias is None else (x, threshold, bias)
    if any(t.dtype != dtype or t.device != weight.device for t in tensors) or not x.numel() or not weight.numel():
        return "tensors do not fit or are empty"
    return None


class Choice(NamedTuple):
    """What a layer would do with its filters as they are; ``active`` is None where the dense operator is to run."""

    reason: str
    active: Tensor | None = None
    margin: Tensor | None = None
    filters: int = 0


def _choose(x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, layer: Layer) -> Choice:
    reason = _unfit(x, weight, threshold, bias)
    if reason is not None:
        return Choice(reason)
    always, width = backend.REQUESTED == "narrow", len(threshold)
    given = (x, weight, threshold) if bias is None else (x, weight, threshold, bias)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    products = 1 if not trains else 3 if layer.estimator == "window" else 2
    work = _work(x, weight, layer.steps)
    # Looking at the filters costs a pass over the weights: not where even skipping all of them would not pay.
    if not always and not pays(products, *work, width, 0):
        return Choice("the layer is too small for skipping to pay")
    with torch.no_grad():
        scores = reference.filter_scores(weight, 1 if layer.dim else None)
        margin = scores - threshold
        active = margin > 0
        filters = int(active.sum())
        masked = [scores] if bias is None or not layer.mask_bias else [scores, bias]
        if not math.isfinite(float(torch.cat(masked).sum())):
            return Choice("a weight or a masked bias is not finite")
    if filters in (0, width) or not (always or pays(products, *work, width, filters)):
        return Choice(f"{filters} of {width} filters are active, where skipping does not pay")
    return Choice(f"{filters} of {width} filters are active and computed, the others skipped", active, margin, filters)


def _batch(x: Tensor, weight: Tensor, layer: Layer) -> Tensor | None:
    """``x`` as a batch, or None where the layer or its arguments are the reference's to compute or to refuse."""
    if not layer.possible or backend.REQUESTED == "reference" or x.dim() == 0:
        return None
    if layer.steps is None:
        return x.reshape(-1, x.shape[-1]) if weight.dim() == 2 and x.shape[-1] == weight.shape[1] else None
    dims = len(layer.steps.stride) + 2
    if x.dim() == dims - 1:
        x = x.unsqueeze(0)
    return x if x.dim() == weight.dim() == dims and x.shape[1] == weight.shape[1 - layer.dim] else None


def explain(layer: Layer, x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None) -> tuple[bool, str]:
    """Whether :func:`run` would skip with these tensors now, and why; nothing is computed but the scores."""
    if backend.REQUESTED == "reference":
        return False, "SPAFL_BACKEND=reference asks for it"
    batch = _batch(x, weight, layer)
    if batch is None:
        return False, "groups, and padding that differs from side to side, run the dense operator"
    choice = _choose(batch, weight, threshold, bias, layer)
    return choice.active is not None, choice.reason


def run(layer: Layer, x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
    """A threshold layer on a CPU: operators on its active filters where that pays, else the masked dense operator.

    Args:
        layer: what it is.
        x, weight, threshold, bias: as its function in :mod:`spafl_kernels.functional` takes them, and checked.

    Returns:
        What the reference returns; channels last where ``x`` is. Derivatives of any order.
    """
    batch = _batch(x, weight, layer)
    choice = None if batch is None else _choose(batch, weight, threshold, bias, layer)
    if batch is None or choice is None or choice.active is None:
        return layer.masked(x, weight, threshold, bias)
    passes = None
    if layer.estimator == "window":
        assert choice.margin is not None
        far = choice.margin.abs() > reference.WINDOW
        passes = far if bool(far.any()) else choice.active.new_zeros(())
    y: Tensor = _ActiveRows.apply(batch, weight, threshold, bias, choice.active, passes, choice.filters, layer)
    if layer.steps is None:
        return y.reshape(*x.shape[:-1], len(threshold))
    return y if batch.dim() == x.dim() else y.squeeze(0)


# --------------------------------------------------------------------------------------------------------- channels
def _order(x: Tensor) -> torch.memory_format:
    """The order of a tensor in memory that is kept; anything else is copied into the usual one."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _take(x: Tensor, rows: Tensor, stored: int) -> Tensor:
    """Channels ``rows`` of ``x``; with the extension zeros behind them, up to ``stored`` channels."""
    if compiled.ready():
        dense = x.contiguous(memory_format=_order(x))
        return torch.ops.spafl.collect_channels(dense, rows, stored, 1, False)[0]  # type: ignore[no-any-return]
    return x.index_select(1, rows)


def _put(y: Tensor, rows: Tensor, width: int, others: Tensor | None) -> Tensor:
    """The first channels of ``y`` as channels ``rows`` of ``width``; the rest is ``others``, or 0."""
    order = _order(y)
    if compiled.ready():
        dense = y.contiguous(memory_format=order)
        return torch.ops.spafl.expand_channels(dense, rows, width, 1, others, None)  # type: ignore[no-any-return]
    out = y.new_zeros((len(y), width, *y.shape[2:]))
    out = out.contiguous(memory_format=order)
    if others is not None:
        rest = torch.ones(width, dtype=torch.bool).index_fill_(0, rows, False)
        row = others.new_zeros(width).masked_scatter_(rest, others)
        out += row.view(1, -1, *(1,) * (y.dim() - 2))
    return out.index_copy_(1, rows, y.narrow(1, 0, len(rows)))


# ---------------------------------------------------------------------------------------------------------- product
class _ActiveRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, threshold: Tensor, bias: Tensor | None, active: Tensor,
        passes: Tensor | None, count: int, layer: Layer,
    ) -> Tensor:  # fmt: skip
        width, dim = len(active), layer.dim
        rows = listed(active, count)
        executed.note_skipped((width - len(rows)) * (_work(x, weight, layer.steps)[0] // width))
        narrow = product(x, weight.index_select(dim, rows), None if bias is None else bias[rows], layer.steps)
        others = None if bias is None or layer.mask_bias else bias[~active]
        ctx.save_for_backward(x, weight, threshold, bias, active, passes, rows)
        ctx.count, ctx.layer = count, layer
        return _put(narrow, rows[:count], width, others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, threshold, bias, active, passes, rows = ctx.saved_tensors
        layer, count, needs = ctx.layer, ctx.count, ctx.needs_input_grad
        steps, dim, width = layer.steps, layer.dim, len(active)
        need_weight, some_pass = any(needs[1:4]), passes is None or bool(passes.dim())
        places = [d for d in range(grad.dim()) if d != 1]
        with torch.no_grad():  # a norm would take ten times as long as these
            high = grad.amax(places) if some_pass else grad.sum()
            low = grad.amin(places) if some_pass else high
        # Second derivatives, and gradients that are not finite, are the reference's.
        if torch.is_grad_enabled() or not math.isfinite(float(high.sum() + low.sum())):
            return *_by_reference(layer, needs, grad, x, weight, threshold, bias), None, None, None, None
        need_input = needs[0]
        rows, stored, of_one = rows[:count], len(rows), _work(x, weight, steps)[0] // width
        # Pruned filters whose r_i is not certainly 0 need their row of G too.
        wanted, more = active, 0
        if need_weight and some_pass:
            arrives = (high != 0) | (low != 0)
            arrives = arrives if passes is None else passes & arrives
            wanted = active | arrives
            more = int(wanted.sum()) - count
        taken = _take(grad, rows, stored)
        weights = weight.index_select(dim, rows if taken.shape[1] == count else listed(active, count))
        dx, g = gradients(taken, x, weights, steps, need_input, need_weight and not more)
        executed.note_skipped((width - taken.shape[1]) * of_one * (need_input + (need_weight and not more)))
        if not need_weight:
            return dx, None, None, None, None, None, None, None
        if more:
            rows, count = wanted.nonzero().flatten(), count + more
            taken = _take(grad, rows, min(width, -(-count // MULTIPLE) * MULTIPLE))
            weights = weight.index_select(dim, listed(wanted, count)[: taken.shape[1]])
            g = gradients(taken, x, weights, steps, False, True)[1]
            executed.note_skipped((width - taken.shape[1]) * of_one)
        assert g is not None
        g, weights = g.narrow(dim, 0, count), weights.narrow(dim, 0, count)
        total = None if bias is None else grad.sum(places)
        dtau = torch.zeros_like(threshold)
        if some_pass:
            of_bias = None
            if bias is not None and layer.mask_bias:
                assert total is not None
                of_bias = total[rows] * bias[rows]
            g, r = of_rows(
                g, weights, dim, active[rows] if more else None, None if passes is None else passes[rows], of_bias
            )
            dtau.index_copy_(0, rows, -r)
        dw = torch.zeros_like(weight).index_copy_(dim, rows, g)
        db = total
        if total is not None and layer.mask_bias:
            db = total * active
        return dx, dw, dtau, db, None, None, None, None


def _by_reference(
    layer: Layer, needs: tuple[bool, ...], grad: Tensor, x: Tensor, weight: Tensor, threshold: Tensor,
    bias: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    again = torch.is_grad_enabled()
    given = [x, weight, threshold, bias]
    with torch.enable_grad():
        # Without a second derivative nothing behind the saved tensors is to be touched.
        inputs = [t if again or t is None else t.detach().requires_grad_() for t in given]
        y = layer.masked(*inputs)  # type: ignore[arg-type]
        wanted = [t for t, need in zip(inputs, needs) if need and t is not None]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again, allow_unused=True))
    return [next(found) if need and t is not None else None for t, need in zip(inputs, needs)]

"""Export: the plain small dense model that a pruned model is at inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..training import Given, Unsupported, arguments_of, samples_of
from .graph.flow import Flow
from .graph.follow import follow_inputs
from .graph.inputs import Form, Input, inputs_of
from .graph.trace import check_traceable, copy_of, kept_random_state
from .kinds.base import Op
from .kinds.ends import Output
from .kinds.grouped import Depthwise, Grouped
from .kinds.layers import Layer
from .kinds.norms import BatchNorm
from .plan.plan import Plan
from .plan.rows import Rows
from .small import Small, Value
from .verify import compared, differs

__all__ = ["export"]


def export(model: nn.Module, image: tuple[int, ...] | Given) -> nn.Module:
    """A small dense model that computes what ``model`` computes in eval mode.

    Pruned filters and the input columns that read them are gone; BatchNorm behind a layer and the constants of pruned
    channels are folded into weights and biases. The result is a ``torch.fx.GraphModule`` of plain ``torch.nn`` layers:
    nothing of this package is needed to load or run it. It is in eval mode and has its own memory.

    Args:
        model: a model with threshold layers; not changed.
        image: shape of one input sample, without the batch. Where a constant meets zero padding its map is stored for
            this size, and other sizes are refused when the model runs. Of a model that is called otherwise than with
            one tensor of its own dtype, a batch: a tensor, a tuple or list of its arguments, or a dictionary of them by
            name. Arguments that are no tensors stay what they are.

    Returns:
        The model; ``(N, *image)`` gives the output of ``model.eval()`` up to rounding. It takes the tensors of the
        batch one by one, in this order or by the names that they have in ``forward``, and returns what the model does.

    The result is compared with the model before it is returned, and so are exports of float64 copies under random
    masks, at two batch sizes.

    Raises:
        Unsupported: the model cannot be traced (:func:`spafl_kernels.to_dense` still gives a dense model), or what
            comes out is not what the model computes; a parameter or buffer is not finite.
        TypeError, ValueError: ``image`` is neither a shape nor a batch.
    """
    with kept_random_state():
        return _compared(model, image)


def _compared(model: nn.Module, image: tuple[int, ...] | Given) -> nn.Module:
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise Unsupported(f"{name!r} is not finite")
    form, examples = _example(model, image)
    flow = _flow(model, form, examples)
    try:
        small = _small(flow)
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"cannot be exported: {error}") from error
    trace = flow.trace

    def ours(twin: nn.Module, tensors: list[Tensor]) -> Any:
        inputs = tuple(i.like(t) for i, t in zip(flow.inputs, tensors))
        return _small(follow_inputs(twin, inputs, trace.on(twin), flow.batch, stored=True))(*tensors)

    for round, batch in enumerate((3, 1)):
        tensors = [_some(i, t, batch) for i, t in zip(flow.inputs, examples)]
        if (found := differs(flow, tensors, ours, gradients=False, rounds=(round,))) is not None:
            raise Unsupported(f"the exported model is not the model: {found}")
    with torch.no_grad():
        twin = copy_of(model).eval()
        tensors = [t.to(i.dtype) for i, t in zip(flow.inputs, tensors)]
        args, kwargs = trace.form.call(tensors)
        dtype = next(model.parameters()).dtype
        tolerance = 1e-9 if dtype == torch.float64 else max(1e-3, 8 * torch.finfo(dtype).eps)
        if (found := compared(lambda: small(*tensors), lambda: twin(*args, **kwargs), tolerance)) is not None:
            raise Unsupported(f"the exported model is not the model: {found}")
    return small


def _example(model: nn.Module, image: tuple[int, ...] | Given) -> tuple[Form | None, list[Tensor]]:
    """How a model is called, where that is known, and tensors for it."""
    if isinstance(image, (tuple, list)) and all(isinstance(size, int) for size in image):
        like = next(model.parameters())
        return None, [like.detach().new_zeros(2, *image)]
    samples_of(image)
    if isinstance(image, Tensor):
        return None, [image]
    return Form.of(*arguments_of(image))


def _flow(model: nn.Module, form: Form | None, examples: list[Tensor]) -> Flow:
    inputs, batch = inputs_of(examples)
    return follow_inputs(model, inputs, check_traceable(model, "eval", False, form=form), batch, stored=True)


def _some(i: Input, example: Tensor, batch: int) -> Tensor:
    """Random numbers for one of the inputs; of whole numbers and booleans the example's own, which the model takes."""
    t = example.detach()
    if i.batched:
        t = t[torch.arange(batch, device=t.device) % len(t)]
    return torch.randn(t.shape, dtype=torch.float64, device=t.device) if t.is_floating_point() else t


def _exported(model: nn.Module, image: tuple[int, ...]) -> nn.Module:
    return _small(_flow(model, *_example(model, image)))


def _small(flow: Flow) -> nn.Module:
    # Layers draw initial weights when they are made.
    with torch.inference_mode(False), torch.no_grad(), kept_random_state():
        keep = Rows(flow).of_model(gradients=False).keep
        keep |= _rows_that_cost_less_than_a_gather(flow, keep)
        small = Small(flow, Plan(flow, keep, multiple=1), _folded(flow))
        for op in flow.ops.values():
            if not isinstance(op, Output) and op.name not in small.values:
                small.values[op.name] = value = op.export(small)
                if _is_map(value) and not any(_is_map(small.values[name]) for name in op.sources):
                    assert op.layout is not None
                    small.of_one_size(value.node, op.shape or (), op.layout.dim)
        return small.finished()


def _is_map(value: Value) -> bool:
    """Whether its constants are other ones at other positions."""
    return value.constants is not None and value.constants.dim() > 1


def _folded(flow: Flow) -> dict[str, BatchNorm]:
    """By the name of a layer's operation: the norm that disappears into it."""
    found = {}
    for norm in flow.norms.values():
        layer = flow.source(norm)
        if (
            isinstance(layer, Layer)
            and not isinstance(layer, Grouped)
            and flow.single_reader(layer)
            and norm.reads == layer.layout
        ):
            found[layer.name] = norm
    return found


# A number gathered along the last dimension costs about as much time as this many multiply-adds (measured: 3 to 5 ns).
_GATHER_MACS = 256


def _rows_that_cost_less_than_a_gather(flow: Flow, keep: dict[str, Tensor]) -> dict[str, Tensor]:
    """All rows, for linear layers whose result is only read at full width, where that is cheaper than to expand it.

    Their pruned rows become rows of zeros. Convolutions gather along a dimension in front of others, which is a copy.
    """
    plan, whole = Plan(flow, keep, multiple=1), {}
    for name, op in flow.layers.items():
        if name not in keep or not isinstance(op.module, nn.Linear) or not _only_read_whole(flow, op):
            continue
        inputs = op.module.in_features if op.columns is None else plan.channels(op.columns).stored
        if inputs * (1 - keep[name].double().mean().item()) <= _GATHER_MACS:
            whole[name] = torch.ones_like(keep[name])
    return whole


def _only_read_whole(flow: Flow, op: Op) -> bool:
    """Whether nobody works on the kept channels of a result alone."""
    seen, pending = {op.name}, [op]
    while pending:
        for user in flow.users(pending.pop()):
            if isinstance(user, (Layer, BatchNorm)):
                if user.reads is not None or isinstance(user, (Depthwise, Grouped)):
                    return False
            elif user.layout is not None and user.name not in seen:
                seen.add(user.name)
                pending.append(user)
    return True

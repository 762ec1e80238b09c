"""Export: the plain small dense model that a pruned model is at inference."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..convert import to_dense
from ..layers import ThresholdLayer
from ..training import Unsupported
from .calls import Bound
from .flow import Flow, Op
from .follow import trace_flow
from .fusion import single_user
from .plan import Channels, Plan
from .trace import check_traceable, copy_of, kept_random_state
from .verify import compared, differs

__all__ = ["export"]


def export(model: nn.Module, image: tuple[int, ...]) -> nn.Module:
    """A small dense model that computes what ``model`` computes in eval mode.

    Pruned filters and the input columns that read them are gone; BatchNorm behind a layer and the constants of pruned
    channels are folded into weights and biases. The result is a ``torch.fx.GraphModule`` of plain ``torch.nn`` layers:
    nothing of this package is needed to load or run it. It is in eval mode and has its own memory.

    Args:
        model: a model with threshold layers; not changed.
        image: shape of one input sample, without the batch. Where a constant meets zero padding its map is stored for
            this size, so other sizes are refused by the addition.

    Returns:
        The model; ``(N, *image)`` gives the output of ``model.eval()`` up to rounding.

    The result is compared with the model before it is returned, and so are exports of float64 copies under random
    masks, at two batch sizes.

    Raises:
        Unsupported: the model cannot be traced (:func:`spafl_kernels.to_dense` still gives a dense model), or what
            comes out is not what the model computes; a parameter or buffer is not finite.
    """
    with kept_random_state():
        return _compared(model, tuple(image))


def _compared(model: nn.Module, image: tuple[int, ...]) -> nn.Module:
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise Unsupported(f"{name!r} is not finite")
    flow = trace_flow(model, image, check_traceable(model, "eval", gradients=False))
    try:
        small = _small(flow)
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"cannot be exported: {error}") from error
    trace = flow.trace
    assert trace is not None
    for round, batch in enumerate((3, 1)):
        x = torch.randn(batch, *image, dtype=torch.float64, device=next(model.parameters()).device)

        def ours(twin: nn.Module, t: Tensor) -> Any:
            return _small(trace_flow(twin, image, trace.on(twin)))(t)

        if (found := differs(flow, x, ours, gradients=False, rounds=(round,))) is not None:
            raise Unsupported(f"the exported model is not the model: {found}")
    with torch.no_grad():
        twin = copy_of(model).eval()
        x = x.to(next(model.parameters()).dtype)
        tolerance = 1e-9 if x.dtype == torch.float64 else 1e-3
        if (found := compared(lambda: small(x), lambda: twin(x), tolerance)) is not None:
            raise Unsupported(f"the exported model is not the model: {found}")
    return small


def _exported(model: nn.Module, image: tuple[int, ...]) -> nn.Module:
    return _small(trace_flow(model, image, check_traceable(model, "eval", gradients=False)))


def _small(flow: Flow) -> nn.Module:
    # Layers draw initial weights when they are made.
    with torch.inference_mode(False), torch.no_grad(), kept_random_state():
        return _Exporter(flow).run()


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
        inputs = op.module.in_features if op.data is None else plan.channels(op.data).stored
        if inputs * (1 - keep[name].double().mean().item()) <= _GATHER_MACS:
            whole[name] = torch.ones_like(keep[name])
    return whole


def _only_read_whole(flow: Flow, op: Op) -> bool:
    """Whether nobody works on the kept channels of a result alone."""
    for user in (flow.ops[u.name] for u in op.node.users):
        if user.kind in ("layer", "depthwise", "norm"):
            if user.data is not None or user.kind == "depthwise":
                return False
        elif user.layout is not None and not _only_read_whole(flow, user):
            return False
    return True


@dataclass
class _Value:
    """A node of the new graph; ``constants`` are those of the dropped channels (None: all 0)."""

    node: fx.Node
    channels: Channels | None
    constants: Tensor | None = None


class _Exporter:
    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.names = {id(m): name for name, m in flow.model.named_modules()}
        keep = {}
        for name, op in flow.layers.items():
            m = op.module
            if isinstance(m, ThresholdLayer):
                keep[name] = m.mask()
        keep |= _rows_that_cost_less_than_a_gather(flow, keep)
        self.plan = Plan(flow, keep, multiple=1)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[str, _Value] = {}
        self.wide: dict[str, fx.Node] = {}
        self.moved = 0
        # Norms that disappear into the layer in front of them.
        self.folded: dict[str, Op] = {}
        for op in flow.norms.values():
            source = flow.ops[op.sources[0]]
            if source.kind in ("layer", "depthwise") and single_user(flow, source) and op.data == source.layout:
                self.folded[source.name] = op

    def run(self) -> nn.Module:
        for op in self.flow.ops.values():
            if op.kind == "output":
                self.graph.output(fx.node.map_arg(self.flow.outputs, lambda node: self.full(node.name)))
            elif op.name not in self.values:
                getattr(self, f"emit_{op.kind}", self.emit_channelwise)(op)
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        module = fx.GraphModule(self.root, self.graph, class_name=f"{type(self.flow.model).__name__}Small")
        module.delete_all_unused_submodules()
        return module.eval()

    # -- helpers ---------------------------------------------------------------------------------------------------

    def channels(self, op: Op) -> Channels | None:
        return None if op.layout is None else self.plan.channels(op.layout)

    def module(self, name: str, m: nn.Module, *args: fx.Node) -> fx.Node:
        target = name.replace(".", "_") or "layer"
        self.root.add_module(target, m)
        return self.graph.call_module(target, args)

    def buffer(self, name: str, value: Tensor) -> fx.Node:
        target = name.replace(".", "_")
        self.root.register_buffer(target, value.clone())
        return self.graph.get_attr(target)

    def first(self, op: Op) -> _Value:
        return self.values[op.sources[0]]

    def full(self, name: str) -> fx.Node:
        """The value at full width."""
        value = self.values[name]
        if value.channels is None or value.channels.full:
            return value.node
        if name not in self.wide:
            everything = torch.arange(value.channels.width, device=value.channels.kept.device)
            self.wide[name] = self.relayout(name, everything)
        return self.wide[name]

    def relayout(self, name: str, wanted: Tensor, zeros: int = 0) -> fx.Node:
        """The channels ``wanted``: kept ones moved, dropped ones filled with their constants; then so many zeros."""
        op, value = self.flow.ops[name], self.values[name]
        channels, layout = value.channels, op.layout
        assert channels is not None and layout is not None
        ndim = len(op.shape or ())
        # One more channel of zeros is where dropped channels are read from.
        place = torch.full((channels.width,), channels.stored, device=channels.kept.device)
        place[channels.kept] = torch.arange(len(channels.kept), device=place.device)
        pads = [0, 0] * (ndim - 1 - layout.dim) + [0, 1]
        node = self.graph.call_function(F.pad, (value.node, pads))
        self.moved += 1
        index = F.pad(place[wanted], (0, zeros), value=channels.stored)
        node = self.graph.call_function(
            torch.index_select, (node, layout.dim, self.buffer(f"{name}_channels_{self.moved}", index))
        )
        if value.constants is not None:
            base = value.constants.new_zeros(channels.width).index_copy(0, channels.dropped, value.constants)[wanted]
            shape = [-1 if d == layout.dim else 1 for d in range(ndim)]
            constant = self.buffer(f"{name}_constants_{self.moved}", F.pad(base, (0, zeros)).view(shape))
            node = self.graph.call_function(torch.add, (node, constant))
        return node

    # -- one method per kind of op ---------------------------------------------------------------------------------

    def emit_input(self, op: Op) -> None:
        self.values[op.name] = _Value(self.graph.placeholder("x"), None)

    def emit_layer(self, op: Op) -> None:
        m, source = op.module, self.first(op)
        name, conv = self.names[id(m)], isinstance(m, nn.Conv2d)
        rows, columns = self.plan.rows.get(name), None if op.data is None else self.plan.channels(op.data)
        weight, bias = m.weight.detach(), None if m.bias is None else m.bias.detach()
        if isinstance(m, ThresholdLayer):
            mask = m.mask().to(weight.dtype)
            weight = weight * mask.view(-1, *(1,) * (weight.dim() - 1))
            if bias is not None and m.mask_bias:
                bias = bias * mask
        dropped_bias = None
        if rows is not None:
            if bias is not None and not m.mask_bias and len(rows.dropped):
                dropped_bias = bias[rows.dropped]
            weight = _rows(weight, rows)
            bias = None if bias is None else _rows(bias, rows)
        if op.kind == "depthwise":
            node = self.depthwise_input(op, rows)
            columns, constants = None, None
        else:
            node = self.full(op.sources[0]) if columns is None else source.node
            constants = source.constants if columns is not None else None
        border: Tensor | None = None
        if columns is not None:
            if constants is not None:
                lost = weight.index_select(1, columns.dropped)
                if conv and m.padding_mode == "zeros" and m.padding not in ("valid", 0, (0, 0)):
                    shape = self.flow.ops[op.sources[0]].shape or ()
                    maps = constants.view(1, -1, 1, 1).expand(1, -1, *shape[2:])
                    border = F.conv2d(maps, lost, None, m.stride, m.padding, m.dilation)
                else:
                    shift = lost.flatten(2).sum(2) @ constants if conv else lost @ constants
                    bias = shift if bias is None else bias + shift
            weight = weight.index_select(1, columns.kept)
            if columns.pads:
                weight = F.pad(weight, [0, 0] * (weight.dim() - 2) + [0, columns.pads])
        result, out_constants = op, dropped_bias
        if (norm := self.folded.get(op.name)) is not None:
            result = norm
            scale, shift, out_constants = self.norm_numbers(norm, rows, dropped_bias)
            weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
            bias = shift if bias is None else bias * scale + shift
            border = None if border is None else border * scale.view(1, -1, 1, 1)
        small: Any
        if conv:
            groups = m.groups if op.kind == "layer" else weight.shape[0]
            padding: Any = m.padding
            if isinstance(padding, str):
                # In numbers: ONNX Runtime refuses "same" with dilation.
                total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(m.dilation, m.kernel_size)]
                padding = tuple(t // 2 for t in total)
                if any(t % 2 for t in total):
                    (top, left), padding = padding, 0
                    sides = [left, total[1] - left, top, total[0] - top]
                    mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
                    node = self.graph.call_function(F.pad, (node, sides, mode))
            small = nn.Conv2d(
                weight.shape[1] * groups, weight.shape[0], m.kernel_size, m.stride, padding, m.dilation, groups,
                bias is not None, m.padding_mode, weight.device, weight.dtype,
            )  # fmt: skip
        else:
            small = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
        small.weight.copy_(weight)
        if bias is not None:
            small.bias.copy_(bias)
        out = self.module(name, small, node)
        if border is not None:
            out = self.graph.call_function(torch.add, (out, self.buffer(f"{name}_border", border)))
        channels = self.channels(result)
        self.values[op.name] = self.values[result.name] = _Value(out, channels, out_constants)

    emit_depthwise = emit_layer

    def depthwise_input(self, op: Op, rows: Channels | None) -> fx.Node:
        source, name = self.first(op), op.sources[0]
        if rows is None:
            return self.full(name)
        before = source.channels
        if before is not None and torch.equal(before.kept, rows.kept) and before.pads == rows.pads:
            return source.node
        if before is not None and not before.full:
            node = self.relayout(name, rows.kept)
        else:
            index = self.buffer(f"{op.name}_inputs", rows.kept)
            node = self.graph.call_function(torch.index_select, (source.node, 1, index))
        if rows.pads:
            node = self.graph.call_function(F.pad, (node, [0, 0, 0, 0, 0, rows.pads]))
        return node

    def norm_numbers(
        self, op: Op, channels: Channels | None, constants: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(scale, shift)`` of the kept channels, 0 for pads, and what becomes of the constants."""
        m = op.module
        assert m.running_mean is not None and m.running_var is not None
        scale = torch.rsqrt(m.running_var + m.eps)
        if m.weight is not None:
            scale = scale * m.weight.detach()
        shift = -m.running_mean * scale
        if m.bias is not None:
            shift = shift + m.bias.detach()
        after = None
        if channels is not None and len(channels.dropped):
            after = shift[channels.dropped]
            if constants is not None:
                after = after + constants * scale[channels.dropped]
        if channels is not None:
            scale, shift = _rows(scale, channels), _rows(shift, channels)
        return scale, shift, after

    def emit_norm(self, op: Op) -> None:
        m, source = op.module, self.first(op)
        channels = None if op.data is None else self.plan.channels(op.data)
        node = self.full(op.sources[0]) if channels is None else source.node
        *_, after = self.norm_numbers(op, channels, source.constants if channels is not None else None)
        width = m.num_features if channels is None else channels.stored
        assert m.running_mean is not None
        small = type(m)(width, m.eps, m.momentum, m.affine, True, m.running_mean.device, m.running_mean.dtype)
        for key, value in m.state_dict().items():
            target = getattr(small, key)
            target.copy_(_rows(value, channels) if channels is not None and value.dim() else value)
        self.values[op.name] = _Value(self.module(self.names[id(m)], small, node), channels, after)

    def emit_channelwise(self, op: Op) -> None:
        """relu, unary, pool, same, and split (items are cut where they are read)."""
        source = self.first(op)
        channels, constants = self.channels(op), source.constants
        if op.kind in ("same", "split"):
            node = source.node
        elif op.module is not None:
            node = self.module(op.name, _out_of_place(op.module), source.node)
        else:
            function, arguments = _function(op.apply)
            node = self.graph.call_function(function, (source.node,), arguments)
        if op.kind in ("relu", "unary") and constants is not None:
            assert op.apply is not None
            constants = op.apply(constants)
        self.values[op.name] = _Value(node, source.channels if op.kind == "split" else channels, constants)

    def emit_flatten(self, op: Op) -> None:
        source = self.first(op)
        before, after, shape = source.channels, self.channels(op), self.flow.ops[op.sources[0]].shape or ()
        assert before is not None and after is not None
        repeat = 1
        for size in shape[2:]:
            repeat *= size
        node = source.node
        if before.pads and not after.pads:
            node = self.graph.call_function(torch.narrow, (node, 1, 0, len(before.kept)))
        node = self.graph.call_function(torch.flatten, (node, 1))
        if after.pads:
            # All channels are pruned: one zero feature stands for them.
            node = self.graph.call_function(torch.narrow, (node, 1, 0, after.pads))
        constants = None if source.constants is None else source.constants.repeat_interleave(repeat)
        self.values[op.name] = _Value(node, after, constants)

    def emit_add(self, op: Op) -> None:
        names, after = [s.name for s in op.node.args], self.channels(op)
        if after is None:
            node = self.graph.call_function(torch.add, tuple(self.full(n) for n in names))
            self.values[op.name] = _Value(node, None)
            return
        nodes, constants = [], None
        for name in names:
            value = self.values[name]
            assert value.channels is not None
            same = torch.equal(value.channels.kept, after.kept) and value.channels.pads == after.pads
            nodes.append(value.node if same else self.relayout(name, after.kept, after.pads))
            if value.constants is not None and len(after.dropped):
                left = value.constants[torch.isin(value.channels.dropped, after.dropped)]
                constants = left if constants is None else constants + left
        node = self.graph.call_function(torch.add, tuple(nodes))
        self.values[op.name] = _Value(node, after, constants)

    def emit_cat(self, op: Op) -> None:
        after, parts, constants = self.channels(op), [], []
        assert after is not None
        known, like = False, next(self.flow.model.parameters())
        for s in op.node.args[0]:
            value = self.values[s.name]
            node, part = value.node, value.channels
            if part is not None:
                lost = value.constants
                known |= lost is not None
                constants.append(like.new_zeros(len(part.dropped)) if lost is None else lost)
                if part.pads and len(part.kept):
                    node = self.graph.call_function(torch.narrow, (node, op.data, 0, len(part.kept)))
                elif part.pads:
                    continue  # nothing of it is left
            parts.append(node)
        if not parts:
            parts = [self.values[op.node.args[0][0].name].node]
        node = self.graph.call_function(torch.cat, (parts, op.data))
        joined = torch.cat(constants) if known and len(after.dropped) else None
        self.values[op.name] = _Value(node, after, joined)

    def emit_item(self, op: Op) -> None:
        source, after = self.first(op), self.channels(op)
        before, (low, high) = source.channels, op.data
        assert before is not None and after is not None and op.layout is not None
        node, constants = source.node, source.constants
        if high - low < before.width:
            if len(after.kept):
                start = int((before.kept < low).sum())
                node = self.graph.call_function(torch.narrow, (node, op.layout.dim, start, len(after.kept)))
            else:
                # One channel of zeros.
                node = self.graph.call_function(torch.narrow, (node, op.layout.dim, 0, 1))
                node = self.graph.call_function(torch.mul, (node, 0.0))
            if constants is not None:
                start = int((before.dropped < low).sum())
                constants = constants[start : start + len(after.dropped)]
        self.values[op.name] = _Value(node, after, constants)

    def emit_dropout(self, op: Op) -> None:
        """Nothing, unless it is on in eval mode; then the same numbers are drawn as at full width."""
        source = self.first(op)
        p, (on,) = op.data
        if not on:
            self.values[op.name] = _Value(source.node, self.channels(op), source.constants)
            return
        assert op.layout is not None
        node = self.graph.call_function(F.dropout, (self.full(op.sources[0]), p, True))
        self.narrow(op, node, op.layout.dim)

    def emit_other(self, op: Op) -> None:
        node = op.node

        def read(source: fx.Node) -> fx.Node:
            return self.full(source.name)

        args, kwargs = (fx.node.map_arg(part, read) for part in (node.args, node.kwargs))
        if op.writes:
            first = args[0] if args else kwargs["input"]
            first = self.graph.call_method("clone", (first,))
            args, kwargs = ((first, *args[1:]), kwargs) if args else (args, {**kwargs, "input": first})
        if node.op == "get_attr":
            trace = self.flow.trace
            assert trace is not None
            parent, _, leaf = str(node.target).rpartition(".")
            value = trace.constants.get(str(node.target))
            value = getattr(self.flow.model.get_submodule(parent), leaf) if value is None else value
            new = self.buffer(str(node.target), value.detach())
        elif node.op == "call_module":
            assert self.flow.trace is not None
            if self.flow.trace.of(op.module)[0]:  # whoever calls eval() on the result would switch it off
                if type(op.module) is not nn.Dropout:
                    raise Unsupported(f"{node.target!r} is in training mode though the model is in eval mode")
                new = self.graph.call_function(F.dropout, (*args, *kwargs.values(), op.module.p, True))
            else:
                new = self.call(op.name, _dense(op.module), args, kwargs)
        else:
            new = self.graph.node_copy(node, read)
            new.args, new.kwargs = args, kwargs
            if node.op == "call_method" and node.target == "view":
                values = (*node.args, *node.kwargs.values())
                dtypes = [a for a in values if isinstance(a, torch.dtype) or _asks_dtype(a)]
                if not dtypes:
                    new.target = "reshape"  # here a tensor may lie in memory otherwise
                    new.kwargs = {"shape" if k == "size" else k: v for k, v in kwargs.items()}
        self.values[op.name] = _Value(new, None)

    def call(self, name: str, m: nn.Module, args: Any, kwargs: Any) -> fx.Node:
        target = name.replace(".", "_")
        self.root.add_module(target, m)
        return self.graph.call_module(target, args, kwargs)

    emit_shape = emit_inner = emit_other

    def emit_attention(self, op: Op) -> None:
        """As it stands, at full width; then the channels that are kept."""
        self.emit_other(op)
        self.narrow(op, self.values[op.name].node, 2)

    def narrow(self, op: Op, node: fx.Node, dim: int) -> None:
        """The channels of ``op`` that are kept, of a value at full width."""
        channels = self.channels(op)
        if channels is not None and not channels.full:
            index = self.buffer(f"{op.name}_channels", channels.kept)
            node = self.graph.call_function(torch.index_select, (node, dim, index))
            if channels.pads:
                pads = [0, 0] * (len(op.shape or ()) - 1 - dim) + [0, channels.pads]
                node = self.graph.call_function(F.pad, (node, pads))
        self.values[op.name] = _Value(node, channels)


def _asks_dtype(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is getattr and value.args[1] == "dtype"


def _out_of_place(module: nn.Module) -> nn.Module:
    """A copy that does not write to its input, which others may read."""
    small = copy.deepcopy(module)
    if getattr(small, "inplace", False):
        small.inplace = False  # type: ignore[assignment]
    return small


def _dense(module: nn.Module) -> nn.Module:
    """A copy that needs nothing of this package, with its mask burnt in."""
    return to_dense(_out_of_place(module))


def _function(apply: Any) -> tuple[Any, dict[str, Any]]:
    """A function and its arguments behind the tensor."""
    if isinstance(apply, Bound):
        return apply.function, dict(apply.rest)
    if isinstance(apply, functools.partial):
        return apply.func, dict(apply.keywords)
    return apply, {}


def _rows(full: Tensor, rows: Channels) -> Tensor:
    """The kept rows, then zero rows."""
    return F.pad(full.index_select(0, rows.kept), [0, 0] * (full.dim() - 1) + [0, rows.pads])

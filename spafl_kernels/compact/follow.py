"""Follows channels through the ops of a trace: what an op is, and what becomes of its layout."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..layers import ThresholdConv2d, ThresholdLayer, ThresholdLinear
from ..training import Unsupported
from .attention import find_attention
from .flow import Flow, Op
from .layout import Layout, Segment
from .trace import Shapes, check_traceable, target_of

_RELU: dict[Any, Callable[..., Tensor]] = {nn.ReLU: F.relu, nn.ReLU6: F.relu6}
_UNARY: dict[type, Callable[[Any], Callable[..., Tensor]]] = {
    nn.GELU: lambda m: partial(F.gelu, approximate=m.approximate),
    nn.SiLU: lambda m: F.silu,
    nn.Tanh: lambda m: torch.tanh,
    nn.LeakyReLU: lambda m: partial(F.leaky_relu, negative_slope=m.negative_slope),
    nn.ELU: lambda m: partial(F.elu, alpha=m.alpha),
    nn.Hardswish: lambda m: F.hardswish,
    nn.Mish: lambda m: F.mish,
    nn.Softsign: lambda m: F.softsign,
}
_RELU_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    F.relu: F.relu, torch.relu: F.relu, F.relu6: F.relu6, F.relu_: F.relu, torch.relu_: F.relu,
}  # fmt: skip
_UNARY_FUNCTIONS = {F.gelu, F.silu, F.tanh, torch.tanh, F.leaky_relu, F.elu, F.hardswish, F.mish, F.softsign}
_POOL_FUNCTIONS = {F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
_ADD = {operator.add, operator.iadd, torch.add}
_IN_PLACE = {operator.setitem, operator.imul, operator.isub, operator.itruediv, operator.iadd}


def trace_flow(model: nn.Module, image: tuple[int, ...]) -> Flow:
    """Trace ``model`` and follow its channels.

    Args:
        model: the model; not changed.
        image: shape of one input sample, without the batch.

    Raises:
        Unsupported: the model cannot be traced, or does something a compact engine cannot do exactly.
    """
    graph = check_traceable(model)
    flow = Flow(model, tuple(image))
    _Follower(flow, graph).run()
    return flow


class _Follower:
    def __init__(self, flow: Flow, graph: fx.Graph) -> None:
        self.flow, self.graph, self.model = flow, graph, flow.model
        self.modules = dict(self.model.named_modules())
        # A module registered under two names is one module: name it as named_modules does.
        self.names = {id(m): name for name, m in self.modules.items()}

    def run(self) -> None:
        flow = self.flow
        reference = next(self.model.parameters(), torch.zeros(()))
        zeros = torch.zeros((2, *flow.image), dtype=reference.dtype, device=reference.device)
        modes = {m: m.training for m in self.model.modules()}
        shapes = Shapes(fx.GraphModule(self.model, self.graph))
        try:
            self.model.eval()
            with torch.no_grad():
                shapes.run(zeros)
        except Exception as error:
            raise Unsupported(
                f"input of shape {tuple(flow.image)} does not fit: {str(error).splitlines()[0]}"
            ) from error
        finally:
            for module, training in modes.items():
                module.training = training
        for node in self.graph.nodes:
            op = self.classify(node)
            op.shape, op.macs = shapes.shapes[node.name], shapes.macs[node.name]
            op.sources = tuple(n.name for n in node.all_input_nodes)
            flow.ops[node.name] = op
        for name, attention in find_attention(self.graph, shapes.shapes, self.model).items():
            for inner in attention.inner:
                flow.ops[inner].kind, flow.ops[inner].sources = "inner", ()
            op = flow.ops[name]
            op.kind, op.data, op.sources = "attention", attention, (attention.q, attention.k, attention.v)
        for op in flow.ops.values():
            op.grad = op.grad or any(flow.ops[s].grad for s in op.sources)
            getattr(self, f"follow_{op.kind}", self.follow_channelwise)(op)
        self.check_coverage()
        for name, op in flow.layers.items():
            if isinstance(op.module, ThresholdLayer):
                flow.proofs[name] = self.proof(op)

    # -- what a node is -------------------------------------------------------------------------------------------

    def classify(self, node: fx.Node) -> Op:
        if node.op == "placeholder":
            return Op(node, "input")
        if node.op == "output":
            return Op(node, "output")
        if node.op == "get_attr":
            return Op(node, "other", grad=isinstance(self.attribute(str(node.target)), nn.Parameter))
        if node.op == "call_module":
            return self.classify_module(node, self.model.get_submodule(str(node.target)))
        target = target_of(node)
        in_place_method = node.op == "call_method" and str(target).endswith("_") and not str(target).endswith("__")
        if in_place_method and target != "relu_":
            raise Unsupported(f"in-place operation .{target}() at {node.name}")
        if target in _IN_PLACE or target in ("relu_", F.relu_, torch.relu_) or node.kwargs.get("inplace"):
            first = node.args[0] if node.args else None
            shared = isinstance(first, fx.Node) and (len(first.users) > 1 or first.op in ("placeholder", "get_attr"))
            if target in _IN_PLACE - {operator.iadd} or shared:
                raise Unsupported(f"in-place operation at {node.name}")
        return self.classify_function(node, target)

    def classify_module(self, node: fx.Node, m: nn.Module) -> Op:
        name, kind = self.names[id(m)], type(m)
        grad = any(True for _ in m.parameters())
        if kind in (nn.Conv2d, ThresholdConv2d, nn.Linear, ThresholdLinear):
            if name in self.flow.layers:
                raise Unsupported(f"layer {name!r} is used twice")
            op = Op(node, "layer", module=m, grad=True)
            if isinstance(m, nn.Conv2d) and m.groups > 1 and m.groups == m.in_channels == m.out_channels:
                op.kind = "depthwise"
            self.flow.layers[name] = op
            return op
        if isinstance(m, ThresholdLayer):
            raise Unsupported(f"layer {name!r} is a {kind.__name__}; only the plain threshold layers are known")
        if kind in (nn.BatchNorm1d, nn.BatchNorm2d) and m.track_running_stats and m.momentum is not None:
            if name in self.flow.norms:
                raise Unsupported(f"layer {name!r} is used twice")
            self.flow.norms[name] = op = Op(node, "norm", module=m, grad=grad)
            return op
        if getattr(m, "inplace", False) and len(node.all_input_nodes[0].users) > 1:
            raise Unsupported(f"in-place module {name!r} on a tensor that is used elsewhere")
        if kind in _RELU:
            return Op(node, "relu", module=m, apply=_RELU[kind])
        if kind in _UNARY:
            return Op(node, "unary", module=m, apply=_UNARY[kind](m))
        if kind is nn.MaxPool2d and not m.return_indices:
            return Op(node, "pool", module=m, apply=m, data="max")
        if kind is nn.AvgPool2d and (m.padding in (0, (0, 0)) or not m.count_include_pad):
            return Op(node, "pool", module=m, apply=m, data="avg")
        if kind in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d) and not getattr(m, "return_indices", False):
            return Op(node, "pool", module=m, apply=m)
        if kind is nn.Flatten and m.start_dim == 1 and m.end_dim == -1:
            return Op(node, "flatten", module=m)
        if kind is nn.Identity or (kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d) and m.p == 0):
            return Op(node, "same", module=m)
        if kind is nn.Dropout:
            return Op(node, "dropout", module=m, data=m.p)
        return Op(node, "other", module=m, grad=grad)

    def classify_function(self, node: fx.Node, target: Any) -> Op:
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
        plain = not any(isinstance(a, fx.Node) for a in (*node.args[1:], *kwargs.values()))
        rest = node.args[1:]
        one = len(node.all_input_nodes) == 1 and plain and bool(node.args)
        if one and target in ("relu", "relu_"):
            return Op(node, "relu", apply=F.relu)
        if one and target in _RELU_FUNCTIONS and not any(rest):
            return Op(node, "relu", apply=_RELU_FUNCTIONS[target])
        if one and target in _UNARY_FUNCTIONS and (not rest or target is F.leaky_relu):
            return Op(node, "unary", apply=partial(_call, target, rest[:1], kwargs))
        if one and target in _POOL_FUNCTIONS and not kwargs.get("return_indices"):
            padding = kwargs.get("padding", rest[2] if len(rest) > 2 else 0)
            if target is not F.avg_pool2d or padding in (0, (0, 0)):
                return Op(node, "pool", apply=partial(_call, target, rest, kwargs))
        if one and target in ("mean", torch.mean):
            dims: Any = kwargs.get("dim", rest[0] if rest else None)
            keep = kwargs.get("keepdim", rest[1] if len(rest) > 1 else False)
            if dims is not None and set(kwargs) <= {"dim", "keepdim"}:
                dims = (dims,) if isinstance(dims, int) else tuple(dims)
                return Op(node, "pool", apply=partial(torch.mean, dim=dims, keepdim=keep), data=("mean", dims, keep))
        if one and target in ("flatten", torch.flatten):
            start = kwargs.get("start_dim", rest[0] if rest else 0)
            end = kwargs.get("end_dim", rest[1] if len(rest) > 1 else -1)
            return Op(node, "flatten" if (start, end) == (1, -1) else "other")
        if target in ("view", "reshape", torch.reshape):
            return Op(node, "flatten", data="reshape")
        if target in ("contiguous", "clone"):
            return Op(node, "same")
        if target is F.dropout:
            p = kwargs.get("p", rest[0] if rest else 0.5)
            if p == 0:
                return Op(node, "same")
            return Op(node, "dropout", data=p) if len(rest) < 2 else Op(node, "other")
        if target in _ADD and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not kwargs:
            return Op(node, "add")
        if target in (torch.cat, torch.concat) and isinstance(node.args[0], (list, tuple)):
            return Op(node, "cat", data=kwargs.get("dim", rest[0] if rest else 0))
        if target in ("chunk", torch.chunk):
            return Op(node, "split", data=kwargs.get("dim", rest[1] if len(rest) > 1 else 0))
        if target is operator.getitem:
            return Op(node, "item")
        if (target is getattr and rest == ("shape",)) or (target == "size" and not node.kwargs):
            return Op(node, "shape")
        return Op(node, "other")

    def attribute(self, path: str) -> Any:
        parent, _, name = path.rpartition(".")
        return getattr(self.model.get_submodule(parent), name)

    # -- how channels pass a node ---------------------------------------------------------------------------------

    def stop(self, op: Op, reason: str) -> None:
        """The inputs of ``op`` are expanded to full width, and its result is at full width."""
        for source in op.sources:
            layout = self.flow.ops[source].layout
            if layout is not None:
                names = ", ".join(filter(None, layout.sources))
                self.flow.stops.append((f"{names} -> {op.name}", reason))
        op.kind = "other" if op.kind not in ("layer", "depthwise", "norm", "output", "add") else op.kind

    def first(self, op: Op) -> Op:
        return self.flow.ops[op.sources[0]]

    def follow_input(self, op: Op) -> None:
        pass

    def follow_shape(self, op: Op) -> None:
        pass

    def follow_inner(self, op: Op) -> None:
        pass

    def follow_attention(self, op: Op) -> None:
        """q and k are read where both keep a channel; the result has the channels of v."""
        sources = [self.flow.ops[name] for name in op.sources]
        known = [s.layout.sources for s in sources if s.layout is not None and s.const]
        if known:
            edge = f"{', '.join(dict.fromkeys(filter(None, sum(known, ()))))} -> {op.name}"
            self.flow.stops.append((edge, "attention over pruned channels that are not zero"))
        v = sources[2]
        if v.layout is not None and not v.const:
            op.layout = v.layout

    def follow_output(self, op: Op) -> None:
        if len(op.sources) != 1 or not isinstance(op.node.args[0], fx.Node) or self.first(op).shape is None:
            raise Unsupported("forward must return one tensor")
        self.flow.output = op.sources[0]

    def follow_other(self, op: Op) -> None:
        target = op.node.target
        what = type(op.module).__name__ if op.module is not None else getattr(target, "__name__", str(target))
        self.stop(op, f"{what} is not followed")

    def follow_channelwise(self, op: Op) -> None:
        before = self.first(op)
        op.layout, op.const = before.layout, before.const
        if before.layout is None:
            return
        if op.kind == "pool" and isinstance(op.data, tuple):
            _, dims, keep = op.data
            dims = sorted(d % len(before.shape or ()) for d in dims)
            if 0 in dims or before.layout.dim in dims:
                op.layout, op.const = None, False
                self.stop(op, "mean over channels or batch")
            elif not keep:
                op.layout = Layout(before.layout.dim - sum(d < before.layout.dim for d in dims), before.layout.segments)

    def follow_dropout(self, op: Op) -> None:
        before = self.first(op)
        if before.layout is None:
            op.kind = "other"
        elif before.const:
            self.stop(op, "dropout of pruned channels that are not zero")
        else:
            op.layout = before.layout

    def follow_layer(self, op: Op) -> None:
        m, before = op.module, self.first(op)
        ndim = len(op.shape or ())
        dim = 1 if isinstance(m, nn.Conv2d) else ndim - 1
        if before.layout is not None:
            if isinstance(m, nn.Conv2d) and m.groups > 1 and op.kind != "depthwise":
                self.stop(op, "grouped convolution")
            elif before.layout.dim != dim:
                self.stop(op, "channels are not where the layer reads them")
            else:
                op.data = before.layout
        if isinstance(m, nn.Conv2d) and ndim != 4:
            raise Unsupported(f"layer {op.node.target!r} gets an input without a batch dimension")
        if isinstance(m, ThresholdLayer):
            rows = m.weight.shape[0]
            op.layout = Layout(dim, (Segment(((self.names[id(m)], 0),), rows),))
            op.const = op.module.bias is not None and not op.module.mask_bias

    follow_depthwise = follow_layer

    def follow_norm(self, op: Op) -> None:
        before = self.first(op)
        if before.layout is not None and before.layout.dim != 1:
            self.stop(op, "channels are not where the norm reads them")
            return
        op.data = op.layout = before.layout
        op.const = before.layout is not None

    def follow_flatten(self, op: Op) -> None:
        before = self.first(op)
        if op.data == "reshape" and len(op.sources) > 1 and before.shape is None:
            op.kind = "other"
        shape, result = before.shape or (), op.shape or ()
        rest = 1
        for size in shape[2:]:
            rest *= size
        if before.layout is None:
            op.kind = "other"
        elif result == shape:
            op.kind, op.layout, op.const = "same", before.layout, before.const
        elif len(result) == 2 and result[0] == shape[0] and before.layout.dim == 1:
            op.layout, op.const = before.layout.repeated(rest, 1), before.const
        elif len(shape) > 2 and len(result) == 2 and before.layout.dim == len(shape) - 1 and rest == shape[-1]:
            self.stop(op, "flattened with tokens in front of channels")
        else:
            self.stop(op, "reshape cuts through channels")

    def follow_add(self, op: Op) -> None:
        a, b = (self.flow.ops[n.name] for n in op.node.args)
        if a.shape is None or b.shape is None:
            op.kind = "other"
            return
        if a.layout is None and b.layout is None:
            return
        if a.shape != b.shape:
            self.stop(op, "addition with broadcasting")
            op.kind = "other"
        elif a.layout is None or b.layout is None:
            self.stop(op, "addition to a tensor at full width")
        elif a.layout != b.layout and not self.read_compact(op):
            self.stop(op, "addition of different channels, which nobody reads apart")
        elif (layout := a.layout.plus(b.layout)) is None:
            self.stop(op, "addition of channels that are not repeated alike")
        else:
            op.layout, op.const = layout, a.const or b.const

    def read_compact(self, op: Op) -> bool:
        """Whether a layer or norm can read the channels of ``op`` that are kept, through whatever follows channels."""
        users = [self.flow.ops[u.name] for u in op.node.users]
        return any(
            u.kind in ("layer", "depthwise", "norm")
            or (u.kind in ("relu", "unary", "pool", "same", "flatten", "cat", "add") and self.read_compact(u))
            for u in users
        )

    def follow_cat(self, op: Op) -> None:
        parts = [self.flow.ops[n.name] for n in op.node.args[0]]
        layouts = [p.layout for p in parts]
        if all(layout is None for layout in layouts):
            op.kind = "other"
            return
        dim = op.data % len(parts[0].shape or (0,))
        if any(layout is not None and layout.dim != dim for layout in layouts) or dim == 0:
            self.stop(op, "concatenation along another dimension")
            return
        segments: list[Segment] = []
        for part, layout in zip(parts, layouts):
            width = (part.shape or ())[dim]
            segments += layout.segments if layout is not None else (Segment((), width),)
        op.layout, op.const, op.data = Layout(dim, tuple(segments)), any(p.const for p in parts), dim

    def follow_split(self, op: Op) -> None:
        before = self.first(op)
        if before.layout is None:
            op.kind = "other"
        elif op.data % len(before.shape or (0,)) != before.layout.dim:
            self.stop(op, "chunks along another dimension")
        elif not all(target_of(user) is operator.getitem and isinstance(user.args[1], int) for user in op.node.users):
            self.stop(op, "chunks that are not taken one by one")
        else:
            width = before.layout.width
            count = op.node.kwargs.get("chunks", op.node.args[1] if len(op.node.args) > 1 else 0)
            size = -(-width // int(count))
            op.data = [(low, min(low + size, width)) for low in range(0, width, size)]
            if any(before.layout.narrow(*piece) is None for piece in op.data):
                self.stop(op, "a chunk cuts through a flattened channel")

    def follow_item(self, op: Op) -> None:
        before, index = self.first(op), op.node.args[1]
        if before.kind == "split" and isinstance(index, int):
            whole = self.first(before)
            assert whole.layout is not None
            piece = before.data[index]
            op.layout, op.const, op.data = whole.layout.narrow(*piece), whole.const, piece
        else:
            op.kind = "other"
            if before.layout is not None:
                self.follow_other(op)

    # -- conclusions ----------------------------------------------------------------------------------------------

    def proof(self, layer: Op) -> tuple[tuple[str, Layout | None], ...] | None:
        """See :attr:`Flow.proofs`: walks from the layer to the ReLUs that block the gradient of a pruned row."""
        found: list[tuple[str, Layout | None]] = []

        def walk(op: Op, norm: tuple[str, Layout | None]) -> bool:
            for user in op.node.users:
                after = self.flow.ops[user.name]
                if after.kind == "relu":
                    found.append(norm)
                elif after.kind == "norm" and not norm[0] and after.layout is not None:
                    if not walk(after, (self.names[id(after.module)], after.layout)):
                        return False
                elif after.kind == "shape":
                    continue
                elif after.kind not in ("pool", "same", "flatten", "split", "item", "cat") or not walk(after, norm):
                    return False
            return bool(op.node.users)

        return tuple(dict.fromkeys(found)) if walk(layer, ("", None)) else None

    def check_coverage(self) -> None:
        """Every parameter is used, and those of followed layers are used by their layer alone."""
        flow, owned = self.flow, set()
        for name, op in (*flow.layers.items(), *flow.norms.items()):
            owned |= {f"{name}.{p}" if name else p for p, _ in op.module.named_parameters(recurse=False)}
        used: set[int] = set()
        for op in flow.ops.values():
            if op.node.op == "get_attr":
                value = self.attribute(str(op.node.target))
                used.add(id(value))
                if any(value is p for n, p in self.model.named_parameters() if n in owned):
                    raise Unsupported(f"parameter {op.node.target!r} is also used outside its layer")
            elif op.module is not None:
                used |= {id(p) for p in op.module.parameters()}
        reached: set[str] = set()
        pending = [flow.output]
        while pending:
            op = flow.ops[pending.pop()]
            if op.name not in reached and op.kind != "shape":
                reached.add(op.name)
                pending += op.sources
        for name, op in (*flow.layers.items(), *flow.norms.items()):
            if op.name not in reached:
                raise Unsupported(f"the result of layer {name!r} is not used")
        for name, p in self.model.named_parameters():
            if id(p) not in used:
                raise Unsupported(f"parameter {name!r} is not used in forward")
            if name not in owned:
                flow.loose.append(name)


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Any:
    return function(x, *args, **kwargs)

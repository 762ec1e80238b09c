"""Follows channels through the ops of a trace: what an op is, and what becomes of its layout."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..layers import ThresholdConv1d, ThresholdConv2d, ThresholdConvTranspose2d, ThresholdLayer, ThresholdLinear
from ..training import Unsupported
from .aliases import give_writes_a_value
from .attention import find_attention
from .calls import bind, bound, is_literal, target_of
from .flow import Flow, Op
from .layout import Layout, Segment
from .trace import Shapes, Trace, check_traceable, copy_of, kept_random_state

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
_RELU_FUNCTIONS: dict[str, Callable[..., Tensor]] = {"relu": F.relu, "relu6": F.relu6}
_UNARY_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "leaky_relu": F.leaky_relu, "elu": F.elu,
    "hardswish": F.hardswish, "mish": F.mish, "softsign": F.softsign,
}  # fmt: skip
_POOL_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max_pool2d": F.max_pool2d, "avg_pool2d": F.avg_pool2d, "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "adaptive_max_pool2d": F.adaptive_max_pool2d,
}  # fmt: skip
_FOLLOWED_LAYERS = (nn.Conv2d, ThresholdConv2d, nn.Linear, ThresholdLinear)
_WHOLE_LAYERS = (ThresholdConv1d, ThresholdConvTranspose2d)
# Their results depend on how a tensor lies in memory, which is not the engine's to keep.
_OF_MEMORY = {
    "as_strided",
    "stride",
    "storage_offset",
    "is_contiguous",
    "data_ptr",
    "untyped_storage",
    "storage",
    "set_",
}


def trace_flow(
    model: nn.Module, image: tuple[int, ...], trace: Trace | None = None, dtype: torch.dtype | None = None
) -> Flow:
    """Trace ``model`` and follow its channels.

    Args:
        model: the model; not changed, and its ``forward`` does not run.
        image: shape of one input sample, without the batch.
        trace: of this model; by default one for training and evaluation is made.
        dtype: of the input; by default that of the parameters.

    Raises:
        Unsupported: the model cannot be traced, or does something a compact engine cannot do exactly.
    """
    trace = check_traceable(model) if trace is None else trace
    with torch.inference_mode(False):
        flow = Flow(model, tuple(image), trace=trace)
        _Follower(flow, trace.graph, dtype).run()
    return flow


def check_has_thresholds(model: nn.Module) -> None:
    """Raises Unsupported for a model that has nothing to prune."""
    if not any(isinstance(m, ThresholdLayer) for m in model.modules()):
        raise Unsupported("the model has no threshold layers")


def trace_thresholds(model: nn.Module, image: tuple[int, ...], trace: Trace, dtype: torch.dtype) -> Flow:
    """:func:`trace_flow`; raises Unsupported too where no threshold layer can be followed."""
    flow = trace_flow(model, image, trace, dtype)
    if not any(isinstance(op.module, ThresholdLayer) for op in flow.layers.values()):
        reasons = "; ".join(f"{name}: {why}" for name, why in flow.apart.items())
        raise Unsupported(f"no threshold layer can be followed ({reasons})")
    return flow


class _Follower:
    def __init__(self, flow: Flow, graph: fx.Graph, dtype: torch.dtype | None = None) -> None:
        self.flow, self.graph, self.model, self.dtype = flow, graph, flow.model, dtype
        assert flow.trace is not None
        self.trace: Trace = flow.trace
        self.modules = dict(self.model.named_modules())
        # A module registered under two names is one module: name it as named_modules does.
        self.names = {id(m): name for name, m in self.modules.items()}
        self.writers: set[str] = set()

    def run(self) -> None:
        flow = self.flow
        shapes = self.shapes()
        self.writers = give_writes_a_value(self.graph, shapes.places, self.model)
        self.apart = self.parts_at_full_width()
        for node in self.graph.nodes:
            op = self.classify(node)
            op.shape, op.macs = shapes.shapes[node.name], shapes.macs[node.name]
            op.sources = tuple(n.name for n in node.all_input_nodes)
            flow.ops[node.name] = op
        for name, attention in find_attention(self.graph, shapes.shapes, self.model).items():
            inner = [flow.ops[n] for n in attention.inner]
            if any("otherwise" in op.node.meta for op in (*inner, flow.ops[name])):
                continue
            for op in inner:
                op.kind, op.sources = "inner", ()
            op = flow.ops[name]
            op.kind, op.data, op.sources = "attention", attention, (attention.q, attention.k, attention.v)
        for op in flow.ops.values():
            op.grad = op.grad or any(flow.ops[s].grad for s in op.sources)
            getattr(self, f"follow_{op.kind}", self.follow_channelwise)(op)
        self.check_coverage()
        for name, op in flow.layers.items():
            if isinstance(op.module, ThresholdLayer):
                flow.proofs[name] = self.proof(op)

    def shapes(self) -> Shapes:
        """Run the trace on a copy of the model."""
        reference = next(self.model.parameters(), torch.zeros(()))
        dtype = self.dtype or reference.dtype
        zeros = torch.zeros((2, *self.flow.image), dtype=dtype, device=reference.device)
        with kept_random_state(), torch.no_grad():
            twin = copy_of(self.model).eval()
            for name, value in self.trace.constants.items():
                setattr(twin, name, value)
            shapes = Shapes(fx.GraphModule(twin, self.graph))
            try:
                shapes.run(zeros)
            except Exception as error:
                text = str(error).splitlines() or [type(error).__name__]
                raise Unsupported(f"input of shape {tuple(self.flow.image)} does not fit: {text[0]}") from error
        return shapes

    def parts_at_full_width(self) -> dict[str, str]:
        """Modules that run as they are, and why, though their kind is known."""
        apart: dict[str, str] = {}
        calls: dict[str, int] = {}
        self.live = self.reached()
        for node in self.graph.nodes:
            if node.op == "call_module":
                name = self.names[id(self.model.get_submodule(str(node.target)))]
                calls[name] = calls.get(name, 0) + 1
                if node not in self.live and any(True for _ in self.modules[name].parameters()):
                    apart[name] = "its result is not used"
        owners: dict[int, list[str]] = {}
        for name, m in self.modules.items():
            if calls.get(name, 0) > 1 and any(True for _ in m.parameters()):
                apart.setdefault(name, "it is used twice")
            for key, p in m._parameters.items():
                if p is None:
                    continue
                owners.setdefault(id(p), []).append(name)
                if type(m) in _WHOLE_LAYERS:
                    apart.setdefault(name, f"channels are not followed through a {type(m).__name__}")
                if not p.requires_grad and self.trace.trains:
                    apart.setdefault(name, f"its {key} is frozen")
        read = {id(self.attribute(str(n.target))) for n in self.graph.nodes if n.op == "get_attr"}
        for key, names in owners.items():
            if len(names) > 1:
                apart |= {name: "it shares a parameter with another module" for name in names if name not in apart}
            if key in read:
                apart |= {name: "its parameter is read outside it" for name in names if name not in apart}
        return apart

    def reached(self) -> set[fx.Node]:
        """Nodes whose values, not their sizes alone, can be in the result."""
        found: set[fx.Node] = set()
        pending = [node for node in self.graph.nodes if node.op == "output"]
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                if target_of(node) != "size" and not (target_of(node) is getattr and node.args[1] == "shape"):
                    pending += node.all_input_nodes
        return found

    # -- what a node is -------------------------------------------------------------------------------------------

    def classify(self, node: fx.Node) -> Op:
        if node.op == "placeholder":
            return Op(node, "input")
        if node.op == "output":
            return Op(node, "output")
        if node.op == "get_attr":
            value = self.attribute(str(node.target))
            return Op(node, "other", grad=isinstance(value, nn.Parameter) and value.requires_grad)
        writes = node.name in self.writers
        if node.op == "call_module":
            op = self.classify_module(node, self.model.get_submodule(str(node.target)))
        else:
            target = target_of(node)
            if (target if isinstance(target, str) else getattr(target, "__name__", "")) in _OF_MEMORY:
                raise Unsupported(f"{node.name} asks how a tensor lies in memory")
            op = self.classify_function(node, target)
        op.writes = writes and op.kind == "other"
        return op

    def classify_module(self, node: fx.Node, m: nn.Module) -> Op:
        name, kind = self.names[id(m)], type(m)
        grad = any(p.requires_grad for p in m.parameters())
        whole = Op(node, "other", module=m, grad=grad)
        one = len(node.args) + len(node.kwargs) == 1 and len(node.all_input_nodes) == 1 and "otherwise" not in node.meta
        one = one and isinstance((*node.args, *node.kwargs.values())[0], fx.Node)
        if isinstance(m, ThresholdLayer) and kind not in (*_FOLLOWED_LAYERS, *_WHOLE_LAYERS):
            raise Unsupported(f"layer {name!r} is a {kind.__name__}; only the plain threshold layers are known")
        if name in self.apart or not one:
            whole.data = self.apart.get(name)
            return whole
        if kind in _FOLLOWED_LAYERS:
            op = Op(node, "layer", module=m, grad=True)
            if isinstance(m, nn.Conv2d) and m.groups > 1 and m.groups == m.in_channels == m.out_channels:
                op.kind = "depthwise"
            self.flow.layers[name] = op
            return op
        if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
            if not m.track_running_stats or m.momentum is None or m.running_mean is None or m.running_var is None:
                return whole
            # Where gradients are asked for, a constant channel is beta; with fixed statistics it would be another.
            modes = self.trace.of(m)
            if modes != (True, False) if len(modes) == 2 else self.trace.gradients[0] and not modes[0]:
                whole.data = "its statistics are fixed in training"
                return whole
            self.flow.norms[name] = op = Op(node, "norm", module=m, grad=grad)
            return op
        if kind in _RELU:
            return Op(node, "relu", module=m, apply=_RELU[kind])
        if kind in _UNARY:
            return Op(node, "unary", module=m, apply=_UNARY[kind](m))
        if kind is nn.MaxPool2d and not m.return_indices:
            return Op(node, "pool", module=m, apply=m, data="max")
        if kind is nn.AvgPool2d:
            keeps = m.divisor_override is None and (m.padding in (0, (0, 0)) or not m.count_include_pad)
            return Op(node, "pool", module=m, apply=m, data="avg" if keeps else "linear")
        if kind in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d) and not getattr(m, "return_indices", False):
            return Op(node, "pool", module=m, apply=m)
        if kind is nn.Flatten and m.start_dim == 1 and m.end_dim == -1:
            return Op(node, "flatten", module=m)
        if kind is nn.Identity or (kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d) and m.p == 0):
            return Op(node, "same", module=m)
        if kind is nn.Dropout:
            return Op(node, "dropout", module=m, data=(m.p, self.trace.of(m)))
        return whole

    def classify_function(self, node: fx.Node, target: Any) -> Op:
        whole = Op(node, "other")
        if target in ("view", "reshape", torch.reshape):
            return Op(node, "flatten", data="reshape") if self.is_plain_reshape(node) else whole
        if target is operator.getitem:
            return Op(node, "item") if "otherwise" not in node.meta else whole
        if target is getattr and node.args[1:] == ("shape",):
            return Op(node, "shape")
        call = bind(node)
        if call is None:
            return whole
        word, values = call
        if word == "dropout":
            return self.classify_dropout(node, values)
        if "otherwise" in node.meta:
            return whole
        if word == "add":
            a, b = values["input"], values["other"]
            if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or values["alpha"] != 1:
                return whole
            node.args, node.kwargs = (a, b), {}
            return Op(node, "add")
        if word == "cat":
            parts, dim = values["tensors"], values["dim"]
            if not isinstance(parts, (list, tuple)) or not all(isinstance(p, fx.Node) for p in parts):
                return whole
            if not isinstance(dim, int) or not parts:
                return whole
            node.args, node.kwargs = (list(parts), dim), {}
            return Op(node, "cat", data=dim)
        first = values.pop("input")
        if not isinstance(first, fx.Node) or not is_literal(list(values.values())):
            return whole
        if word in _RELU_FUNCTIONS:
            return Op(node, "relu", apply=_RELU_FUNCTIONS[word])
        if word in _UNARY_FUNCTIONS:
            return Op(node, "unary", apply=bound(word, values, _UNARY_FUNCTIONS[word]))
        if word in _POOL_FUNCTIONS:
            if values.get("return_indices"):
                return whole
            keeps = values.get("divisor_override") is None and (
                values.get("padding", 0) in (0, (0, 0), [0, 0]) or not values.get("count_include_pad", False)
            )
            data = None if keeps else "linear"
            return Op(node, "pool", apply=bound(word, values, _POOL_FUNCTIONS[word]), data=data)
        if word == "mean":
            dims = (values["dim"],) if isinstance(values["dim"], int) else values["dim"]
            if not dims or values["dtype"] is not None or not all(isinstance(d, int) for d in dims):
                return whole
            dims, keep = tuple(dims), bool(values["keepdim"])
            return Op(node, "pool", apply=partial(torch.mean, dim=dims, keepdim=keep), data=("mean", dims, keep))
        if word == "flatten":
            return Op(node, "flatten") if (values["start_dim"], values["end_dim"]) == (1, -1) else whole
        if word in ("contiguous", "clone"):
            return Op(node, "same")
        if word == "chunk":
            if not isinstance(values["chunks"], int) or not isinstance(values["dim"], int):
                return whole
            node.args, node.kwargs = (first, values["chunks"], values["dim"]), {}
            return Op(node, "split", data=values["dim"])
        if word == "size":
            node.args, node.kwargs = (first, *(() if values["dim"] is None else (values["dim"],))), {}
            return Op(node, "shape")
        return whole

    def classify_dropout(self, node: fx.Node, values: dict[str, Any]) -> Op:
        whole = Op(node, "other")
        calls = [values]
        if len(self.trace.modes) == 2:
            second = bind(node, otherwise=True)
            if second is None:
                return whole
            calls.append(second[1])
        p = values["p"]
        if not isinstance(values["input"], fx.Node) or not isinstance(p, (int, float)):
            return whole
        if any(c["p"] != p or not isinstance(c["training"], bool) for c in calls):
            return whole
        if p == 0 or not any(c["training"] for c in calls):
            return Op(node, "same")
        return Op(node, "dropout", data=(p, tuple(c["training"] for c in calls)))

    def is_plain_reshape(self, node: fx.Node) -> bool:
        """Sizes only, and no number for the batch."""
        if node.kwargs or len(node.args) < 2 or "otherwise" in node.meta or not isinstance(node.args[0], fx.Node):
            return False
        sizes: Any = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = sizes[0]
        if not sizes or not all(type(s) is int or isinstance(s, fx.Node) for s in sizes):
            return False
        if any(isinstance(s, fx.Node) and target_of(s) is getattr and s.args[1] == "dtype" for s in sizes):
            return False
        return isinstance(sizes[0], fx.Node) or sizes[0] == -1

    def attribute(self, path: str) -> Any:
        if path in self.trace.constants:
            return self.trace.constants[path]
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
        if not op.sources:
            raise Unsupported("forward returns nothing that depends on its input")
        self.flow.outputs, self.flow.output = op.node.args[0], op.sources[0]

    def follow_other(self, op: Op) -> None:
        target = op.node.target
        what = type(op.module).__name__ if op.module is not None else getattr(target, "__name__", str(target))
        self.stop(
            op, f"{what} runs at full width: {op.data}" if isinstance(op.data, str) else f"{what} is not followed"
        )

    def follow_channelwise(self, op: Op) -> None:
        before = self.first(op)
        op.layout, op.const = before.layout, before.const
        if before.layout is None:
            return
        if op.data == "linear" and before.const:
            op.layout, op.const = None, False
            self.stop(op, "a pool that does not keep constants")
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
        """Which parameters are used at full width, and which not at all; threshold layers that run as they are."""
        flow, owned = self.flow, set()
        for name, op in (*flow.layers.items(), *flow.norms.items()):
            owned |= {f"{name}.{p}" if name else p for p, _ in op.module.named_parameters(recurse=False)}
        used: set[int] = set()
        for op in flow.ops.values():
            if op.node not in self.live:
                continue
            if op.node.op == "get_attr":
                used.add(id(self.attribute(str(op.node.target))))
            elif op.module is not None:
                used |= {id(p) for p in op.module.parameters()}
        for name, p in self.model.named_parameters():
            if name not in owned and id(p) in used and p.requires_grad:
                flow.loose.append(name)
        parameters = dict(self.model.named_parameters())
        stepped = {id(parameters[name]) for name in flow.loose}
        for name, m in self.modules.items():
            if isinstance(m, ThresholdLayer) and name not in flow.layers:
                flow.apart[name] = self.apart.get(name) or "it is not called with one tensor alone"
                key = f"{name}.threshold" if name else "threshold"
                if id(m.threshold) not in stepped and m.threshold.requires_grad:
                    stepped.add(id(m.threshold))
                    flow.unused.append(key)

"""Follows channels through the ops of a trace: what an op is, and what becomes of its layout."""

from __future__ import annotations

import torch
from torch import fx, nn

from ...layers import ThresholdLayer
from ...training import Unsupported
from ..kinds import KINDS, recognise
from ..kinds.base import Op, Sign, Stop
from ..kinds.ends import Inner
from ..kinds.layers import Layer
from ..kinds.norms import BatchNorm
from ..kinds.whole import Whole
from .aliases import give_writes_a_value
from .calls import target_of
from .flow import Flow
from .inputs import Input
from .layout import Layout
from .trace import Shapes, Trace, check_traceable, copy_of, kept_random_state


def trace_flow(
    model: nn.Module,
    image: tuple[int, ...],
    trace: Trace | None = None,
    dtype: torch.dtype | None = None,
    stored: bool = False,
) -> Flow:
    """Trace ``model``, which takes one tensor, and follow its channels.

    Args:
        model: the model; not changed, and its ``forward`` does not run.
        image: shape of one input sample, without the batch.
        trace: of this model; by default one for training and evaluation is made.
        dtype: of the input; by default that of the parameters.
        stored: see :class:`~spafl_kernels.compact.Flow`.

    Raises:
        Unsupported: the model cannot be traced, or does something a compact engine cannot do exactly.
    """
    trace = check_traceable(model) if trace is None else trace
    dtype = next(model.parameters(), torch.zeros(())).dtype if dtype is None else dtype
    return follow_inputs(model, (Input(tuple(image), dtype),), trace, stored=stored)


def follow_inputs(
    model: nn.Module, inputs: tuple[Input, ...], trace: Trace, batch: int = 2, stored: bool = False
) -> Flow:
    """:func:`trace_flow` of a model that is called with these tensors.

    ``batch``: the number of samples they have, which is taken where the model does not run with two: tensors that have
    as many rows as there are samples by chance are taken to be by sample.
    """
    with torch.inference_mode(False):
        flow = Flow(model, inputs, trace, stored=stored, batch=batch)
        _Follower(flow, trace.graph).run()
    return flow


def follow_thresholds(model: nn.Module, inputs: tuple[Input, ...], trace: Trace, batch: int) -> Flow:
    """:func:`follow_inputs`; raises Unsupported too where there are threshold layers and none can be followed."""
    flow = follow_inputs(model, inputs, trace, batch)
    followed = (op.module for op in flow.layers.values())
    if any(map(_prunes, model.modules())) and not any(map(_prunes, followed)):
        reasons = "; ".join(f"{name}: {why}" for name, why in flow.apart.items())
        raise Unsupported(f"no threshold layer can be followed ({reasons})")
    return flow


def _prunes(module: nn.Module) -> bool:
    return isinstance(module, ThresholdLayer)


def whole(op: Op) -> Whole:
    return Whole(op.node, module=op.module, sources=tuple(n.name for n in op.node.all_input_nodes))


class _Follower:
    def __init__(self, flow: Flow, graph: fx.Graph) -> None:
        self.flow, self.graph, self.model = flow, graph, flow.model
        self.trace = flow.trace
        self.modules = dict(self.model.named_modules())
        self.inside: dict[str, tuple[str, ...]] = {}  # the nodes of what is several

    def run(self) -> None:
        flow = self.flow
        shapes = self.shapes()
        flow.writers = give_writes_a_value(self.graph, shapes.places, self.model)
        flow.whole = self.parts_at_full_width()
        for node in self.graph.nodes:
            flow.ops[node.name] = op = recognise(node, flow)
            op.shape, op.macs = shapes.shapes[node.name], shapes.macs[node.name]
            op.order = shapes.orders.get(node.name)
            op.sources = tuple(n.name for n in node.all_input_nodes)
        for kind in KINDS:
            for op, inner in kind.in_graph(flow):
                if not any(isinstance(flow.ops[name], Inner) for name in (op.name, *inner)):
                    self.put(op)
                    self.inside[op.name] = inner
                    for name in inner:
                        was = flow.ops[name]
                        self.put(Inner(was.node, module=was.module))
        for op in list(flow.ops.values()):
            op.grad = op.grad or any(flow.ops[s].grad for s in op.sources)
            self.follow(op)
        self.check_coverage()
        for name, layer in flow.layers.items():
            if isinstance(layer.module, ThresholdLayer):
                flow.proofs[name] = self.proof(layer)

    def put(self, op: Op) -> None:
        """``op`` in the place of what its node was taken for."""
        was = self.flow.ops[op.name]
        op.shape, op.macs, op.grad, op.order = was.shape, was.macs, was.grad, was.order
        self.flow.ops[op.name] = op

    def follow(self, op: Op) -> None:
        flow = self.flow
        if (refined := op.refine(flow)) is not op:
            refined.sources = op.sources
            self.put(refined)
            op = refined
        try:
            op.follow(flow)
        except Stop as stop:
            if str(stop):
                flow.stop(op, str(stop))
            if not isinstance(op, Whole):
                self.put(whole(op))
            # What it was made of runs as it stands too.
            for name in self.inside.get(op.name, ()):
                self.put(whole(flow.ops[name]))

    def shapes(self) -> Shapes:
        """Run the trace on a copy of the model: with two samples, else with as many as there are."""
        given, flow = self.flow.batch, self.flow
        for flow.batch in dict.fromkeys((2, given)):
            try:
                return self.shapes_of(flow.batch)
            except Exception as error:
                text = str(error).splitlines() or [type(error).__name__]
                sizes = ", ".join(str(tuple(i.shape)) for i in flow.inputs)
                refusal = Unsupported(f"input of shape {sizes} does not fit: {text[0]}")
                refusal.__cause__ = error
        raise refusal

    def shapes_of(self, batch: int) -> Shapes:
        device = next(self.model.parameters(), torch.zeros(())).device
        with kept_random_state(), torch.no_grad():
            twin = copy_of(self.model).eval()
            for name, value in self.trace.constants.items():
                setattr(twin, name, value)
            shapes = Shapes(fx.GraphModule(twin, self.graph), batch)
            shapes.run(*(i.zeros(batch, device) for i in self.flow.inputs))
        return shapes

    def parts_at_full_width(self) -> dict[str, str]:
        """See :attr:`Flow.whole`."""
        flow = self.flow
        apart: dict[str, str] = {}
        calls: dict[str, int] = {}
        self.live = self.reached()
        for node in self.graph.nodes:
            if node.op == "call_module":
                name = flow.names[id(self.model.get_submodule(str(node.target)))]
                calls[name] = calls.get(name, 0) + 1
                if node not in self.live and any(True for _ in self.modules[name].parameters()):
                    apart[name] = "its result is not used"
        owners: dict[int, list[str]] = {}
        for name, m in self.modules.items():
            if calls.get(name, 0) > 1 and any(True for tensors in (m.parameters(), m.buffers()) for _ in tensors):
                apart.setdefault(name, "it is used twice")
            for key, p in m._parameters.items():
                if p is None:
                    continue
                owners.setdefault(id(p), []).append(name)
                if not p.requires_grad and self.trace.trains:
                    apart.setdefault(name, f"its {key} is frozen")
        read = {id(self.flow.attribute(str(n.target))) for n in self.graph.nodes if n.op == "get_attr"}
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

    # -- conclusions ----------------------------------------------------------------------------------------------

    def proof(self, layer: Layer) -> tuple[tuple[str, Layout | None], ...] | None:
        """See :attr:`Flow.proofs`: walks from the layer to the ReLUs that block the gradient of a pruned row."""
        found: list[tuple[str, Layout | None]] = []
        seen: set[tuple[str, str]] = set()  # many ways may lead to one operation
        pending: list[tuple[Op, tuple[str, Layout | None]]] = [(layer, ("", None))]
        while pending:
            op, norm = pending.pop()
            if (op.name, norm[0]) in seen:
                continue
            seen.add((op.name, norm[0]))
            if not op.node.users:
                return None
            for after in self.flow.users(op):
                if after.sign is Sign.BLOCKS:
                    found.append(norm)
                elif isinstance(after, BatchNorm) and not norm[0] and after.layout is not None and after.levels:
                    pending.append((after, (self.flow.names[id(after.module)], after.layout)))
                elif after.sign is Sign.KEEPS:
                    pending.append((after, norm))
                elif after.sign is not Sign.UNREAD:
                    return None
        return tuple(dict.fromkeys(found))

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
                used.add(id(self.flow.attribute(str(op.node.target))))
            elif op.module is not None:
                used |= {id(p) for p in op.module.parameters()}
        for name, p in self.model.named_parameters():
            if name not in owned and id(p) in used and p.requires_grad:
                flow.loose.append(name)
        parameters = dict(self.model.named_parameters())
        stepped = {id(parameters[name]) for name in flow.loose}
        for name, m in self.modules.items():
            if isinstance(m, ThresholdLayer) and name not in flow.layers:
                flow.apart[name] = flow.whole.get(name) or "it is not called with one tensor alone"
                key = f"{name}.threshold" if name else "threshold"
                if id(m.threshold) not in stepped and m.threshold.requires_grad:
                    stepped.add(id(m.threshold))
                    flow.unused.append(key)

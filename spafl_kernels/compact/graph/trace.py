"""The graph of a model, read from a copy of it, and the shapes in it.

Nothing of the user's ``forward`` runs on the model itself. The copy is traced with ``torch.fx``; what ``forward`` asked
of its modules is noted (:mod:`.watch`), and a ``forward`` that writes something, or draws random numbers that a trace
would freeze, is refused.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
import os
import pickle
import random
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _module
from torch.nn.utils import parametrize

from ...computed import plain_kind
from ...convert import copy_of
from ...flops import Counter
from ...layers import ThresholdLayer
from ...training import Unsupported
from .calls import target_of, writes_in_place, written_at_
from .inputs import ONE, Form, usual_form
from .watch import HOOKS, Modes, Watch, frozen, modes_of, set_modes

__all__ = [
    "Patterns", "Shapes", "Trace", "Untraceable", "check_traceable", "copy_of", "kept_random_state", "plain",
    "random_state", "set_random_state", "target_of",
]  # fmt: skip

Patterns = Literal["training", "now", "eval"]

_CONSTANT = "_tensor_constant"


class _Proxy(fx.Proxy):
    """Knows that ``x += y`` writes to ``x``, and that setting something on a tensor is no part of a graph."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise Unsupported(f"forward sets {name!r} of a tensor")
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", written_at_, (self, index, value), {})

    def __len__(self) -> int:
        count = _parts(self.node)
        return super().__len__() if count is None else count  # type: ignore[return-value]


def _writing(operation: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _writing(getattr(operator, f"i{_name}")))


class Tracer(fx.Tracer):
    """Keeps threshold layers whole, and unpacks ``chunk`` and ``split`` in loops, whose length is known.

    Args:
        computed: keep layers whole whose weight is computed, too.
    """

    proxy_buffer_attributes = True

    def __init__(self, computed: bool = False) -> None:
        super().__init__()
        self.computed = computed
        self._around = _surroundings()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) is not dict:
            return self._dictionary(a)
        return super().create_arg(a)

    def _dictionary(self, a: dict[Any, Any]) -> Any:
        """A dictionary of a class of its own is made by a call, so that it is of that class again."""
        if type(a) is collections.OrderedDict:
            return self.create_node("call_function", type(a), (self.create_arg(list(a.items())),), {})
        fields = {k: self.create_arg(v) for k, v in a.items()}
        if dataclasses.is_dataclass(type(a)) and all(isinstance(k, str) for k in fields):
            return self.create_node("call_function", type(a), (), fields)
        if type(a).__module__.startswith("torch.fx."):
            return super().create_arg(a)
        raise Unsupported(f"forward makes a {type(a).__name__}")

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._around:
            raise Unsupported("forward switches gradients, autocast or the default dtype in some part")
        return super().create_node(*args, **kwargs)

    @contextmanager
    def plain_functions(self) -> Iterator[None]:
        """Refuse functions with a backward of their own, which a trace would unfold."""

        def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
            raise Unsupported(f"{cls.__name__} has a backward of its own")

        function = torch.autograd.Function
        before = function.__dict__["apply"]
        function.apply = classmethod(refuse)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            function.apply = before  # type: ignore[method-assign]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, ThresholdLayer) or (self.computed and plain_kind(m) is not None):
            return True
        inside = any(isinstance(child, ThresholdLayer) for child in m.modules())
        return super().is_leaf_module(m, module_qualified_name) and not inside

    def iter(self, obj: Any) -> Iterator[Any]:
        count = _parts(obj.node)
        return super().iter(obj) if count is None else iter([obj[i] for i in range(count)])


def _parts(node: fx.Node) -> int | None:
    """How many tensors ``chunk`` or ``split`` gives, where that does not depend on a size."""
    if target_of(node) in ("chunk", torch.chunk):
        count = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
        return count if isinstance(count, int) else None
    if target_of(node) in ("split", torch.split):
        return next((len(a) for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, (list, tuple))), None)
    return None


def _surroundings() -> tuple[Any, ...]:
    """What changes the meaning of operations and is not in a graph."""
    types = ("cpu", "cuda")
    autocast = tuple((torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), autocast


class Untraceable(Unsupported):
    """A model that cannot be read; ``watch`` is of all that this depends on."""

    def __init__(self, reason: str, watch: Watch) -> None:
        super().__init__(reason)
        self.watch = watch


@dataclass
class Trace:
    """A graph, and what it holds good for.

    Args:
        graph: ``node.meta["otherwise"]`` holds ``(args, kwargs)`` of the second pattern where those differ.
        modes: by pattern, the training flags of all modules. Two patterns are those of training and of evaluation.
        gradients: by pattern, whether gradients are asked for.
        constants: tensors that ``forward`` makes, by the name the graph has for them.
        watch: what else the graph depends on.
        reads: by module, the attributes that its ``forward`` was asked for.
        form: how the model is called.
    """

    graph: fx.Graph
    modes: tuple[Modes, ...]
    gradients: tuple[bool, ...]
    watch: Watch
    constants: dict[str, Tensor] = field(default_factory=dict)
    reads: Mapping[str, Collection[str]] = field(default_factory=dict)
    form: Form = ONE

    def on(self, twin: nn.Module) -> Trace:
        """The same for a copy of the model."""
        return dataclasses.replace(self, watch=Watch(twin, self.reads, self.modes))

    def text(self) -> str:
        """Graph and flags; of a copy of the model, the same."""
        others = {n.name: n.meta["otherwise"] for n in self.graph.nodes if "otherwise" in n.meta}
        return f"{self.graph}\n{others}\n{self.modes}\n{self.gradients}"

    @property
    def trains(self) -> bool:
        """Whether an optimiser of this package steps the parameters; another one takes their gradients as they come."""
        return len(self.modes) == 2

    def of(self, module: nn.Module) -> tuple[bool, ...]:
        """Training flags of a module, by pattern."""
        place = next(i for i, m in enumerate(self.watch.modules) if m is module)
        return tuple(modes[place] for modes in self.modes)


class Shapes(fx.Interpreter):
    """Runs the trace once on zeros; keeps every shape, what memory a value has, and the MACs of what is not a layer.

    Args:
        module: the trace.
        batch: samples in the zeros.

    Attributes:
        orders: the dimensions of a tensor from the outermost to the innermost in memory, where that is not their own
            order.
        places: ``(storage, offset, shape, stride)`` of every tensor; a storage is one number as long as this lives.
    """

    def __init__(self, module: fx.GraphModule, batch: int) -> None:
        super().__init__(module)
        self.batch = batch
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        self.places: dict[str, tuple[Any, ...]] = {}
        self.macs: dict[str, int] = {}
        self.orders: dict[str, tuple[int, ...]] = {}
        self._held: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        with Counter() as counted:
            result = super().run_node(n)
        self.shapes[n.name] = tuple(result.shape) if isinstance(result, Tensor) else None
        self.macs[n.name] = counted.total() // (2 * self.batch)  # two FLOPs each
        if isinstance(result, Tensor) and result.layout is torch.strided and not result.is_contiguous():
            strides = result.stride()
            self.orders[n.name] = tuple(sorted(range(result.dim()), key=lambda d: -strides[d]))
        tensors = (
            [result]
            if isinstance(result, Tensor)
            else [t for t in result if isinstance(t, Tensor)]
            if isinstance(result, (tuple, list))
            else []
        )
        # Kept until the end, so that two storages never have one address.
        self._held += [t.untyped_storage() for t in tensors]
        if tensors:
            t = tensors[0]
            self.places[n.name] = t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape), t.stride()
        return result


def _check_model(model: nn.Module) -> None:
    params = dict(model.named_parameters())
    if len({(p.dtype, p.device) for p in params.values()}) > 1:
        raise Unsupported("parameters have different dtypes or devices")
    if params and not next(iter(params.values())).is_floating_point():
        raise Unsupported("parameters are not floating point")
    if isinstance(model, ThresholdLayer):
        raise Unsupported("the model is one layer alone, with nothing around it that could be compact")
    if _module._global_forward_hooks or _module._global_forward_pre_hooks or _module._global_backward_hooks:
        raise Unsupported("there are hooks on all modules")
    for name, module in model.named_modules():
        if getattr(module, "runs_compact", False):
            raise Unsupported(f"module {name!r} is a {type(module).__name__}, which reads its own model")
        if any(getattr(module, h, None) for h in HOOKS):
            raise Unsupported(f"module {name or type(model).__name__!r} has hooks")
        if parametrize.is_parametrized(module):
            raise Unsupported(f"module {name!r} has a parametrised tensor")
        if "forward" in module.__dict__:
            raise Unsupported(f"forward of module {name or type(model).__name__!r} was replaced")
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise Unsupported(f"module {name!r} is lazy and has not seen an input yet")


def random_state() -> tuple[Any, ...]:
    state: list[Any] = [torch.get_rng_state(), random.getstate()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state.append(torch.cuda.get_rng_state_all())
    else:
        state.append([])
    numpy = sys.modules.get("numpy")
    state.append(numpy.random.get_state() if numpy is not None else None)
    return tuple(state)


def set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    if state[2]:
        torch.cuda.set_rng_state_all(state[2])
    if state[3] is not None:
        sys.modules["numpy"].random.set_state(state[3])


def _same_random_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    same = torch.equal(a[0], b[0]) and a[1] == b[1] and len(a[2]) == len(b[2])
    same = same and all(torch.equal(x, y) for x, y in zip(a[2], b[2]))
    if a[3] is not None and b[3] is not None:
        same = same and a[3][2] == b[3][2] and bool((a[3][1] == b[3][1]).all())
    return same


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Whatever is drawn inside, the generators are afterwards as they were."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


class _Reader:
    """Lets the modules of a copy note what they are asked for."""

    def __init__(self, model: nn.Module, tracer: Tracer, form: Form | None) -> None:
        self.seen: dict[int, set[str]] = {}
        self.names = {id(m): name for name, m in model.named_modules()}
        self._inside = 0
        kinds: dict[type, type] = {}
        for name, m in model.named_modules():
            if name and tracer.is_leaf_module(m, name):
                continue
            self.seen[id(m)] = set()
            if type(m) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
                kinds.setdefault(type(m), self._kind(type(m)))
                m.__class__ = kinds[type(m)]
        if type(model) not in kinds.values():
            model.__class__ = self._kind(type(model))
        self.form = self._take_tensors(type(model), form)

    def reads(self) -> dict[str, set[str]]:
        return {self.names[i]: asked | {"forward"} for i, asked in self.seen.items()}

    def _kind(self, cls: type) -> type:
        reader = self

        def __getattribute__(self: Any, name: str) -> Any:
            if not reader._inside:
                asked = reader.seen.get(id(self))
                if asked is not None:
                    asked.add(name)
            return cls.__getattribute__(self, name)  # type: ignore[call-arg]

        def __getattr__(self: Any, name: str) -> Any:
            reader._inside += 1  # what nn.Module looks at itself to find a parameter
            try:
                return cls.__getattr__(self, name)  # type: ignore[attr-defined]
            finally:
                reader._inside -= 1

        space = {"__getattribute__": __getattribute__, "__getattr__": __getattr__}
        return type(cls.__name__, (cls,), {**space, "__module__": cls.__module__, "__qualname__": cls.__qualname__})

    def _take_tensors(self, cls: type, form: Form | None) -> Form:
        """Let the model's ``forward`` take the tensors of a call alone; all other arguments are what they were."""
        original: Any = cls.forward  # type: ignore[attr-defined]
        form = usual_form(original) if form is None else form
        names = ", ".join(form.names(original))
        space: dict[str, Any] = {"original": original, "call": form.call}
        lines = f"def forward(self, {names}):", f"    args, kwargs = call([{names}])"
        exec("\n".join((*lines, "    return original(self, *args, **kwargs)")), space)
        cls.forward = space["forward"]  # type: ignore[attr-defined]
        return form


class _Before:
    """What a copy holds, so that it shows whether ``forward`` writes to it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.fields: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self.objects: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[str, Tensor, int]] = []
        self.states: list[tuple[str, Any, bytes]] = []
        for name, m in model.named_modules():
            path = f"{name}." if name else ""
            for space in (m.__dict__, m._parameters, m._buffers, m._modules):
                held = {k: frozen(v, self.objects) for k, v in space.items()}
                self.fields.append((path, space, held))
                for k, v in space.items():
                    if isinstance(v, Tensor):
                        self.tensors.append((f"{path}{k}", v, v._version))
                    elif (state := _state(v)) is not None:
                        self.states.append((f"{path}{k}", v, state))

    def written(self) -> str | None:
        skip = ("training", "_parameters", "_buffers", "_modules")
        for path, space, then in self.fields:
            for key in [*space, *then]:
                if key in skip or key.startswith(_CONSTANT):
                    continue
                if key not in space or key not in then or not _equal(space[key], then[key]):
                    return f"{path}{key}"
        for name, tensor, version in self.tensors:
            if tensor._version != version:
                return name
        for name, value, state in self.states:
            if _state(value) != state:
                return name
        if any(not _equal(now, then) for now, then in self.objects):
            return "a field of an object that it holds"
        return None


def _state(value: Any) -> bytes | None:
    """Of a random generator or an iterator, something that is another after it was asked for a number."""
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, (random.Random, Iterator)) or type(value).__module__.startswith("numpy.random"):
        with suppress(Exception):  # what cannot be pickled cannot be copied either, mostly
            return pickle.dumps(value)
    return None


def _equal(now: Any, then: Any) -> bool:
    try:
        return now is then or (not isinstance(now, (Tensor, fx.Proxy)) and bool(now == then))
    except Exception:
        return False


def check_traceable(
    model: nn.Module,
    patterns: Patterns = "training",
    gradients: bool = True,
    modes: Modes | None = None,
    form: Form | None = None,
) -> Trace:
    """The trace of ``model``, as far as it is known without an input; raises :class:`Unsupported`.

    Args:
        model: not changed, and not run.
        patterns: ``"training"``: the modes that ``train()`` and, second, ``eval()`` give; ``"now"``: those the modules
            have; ``"eval"``: those of ``eval()``.
        gradients: whether gradients will be asked for; under ``"training"`` they are in the first pattern.
        modes: instead of those that ``train()`` gives.
        form: how the model is called; by default with one tensor.
    """
    _check_model(model)
    with torch.inference_mode(False), kept_random_state():
        try:
            twin = copy_of(model)
        except Exception as error:
            raise Unsupported(f"the model cannot be copied: {_first_line(error)}") from error
        found: list[Modes] = []
        if patterns == "training":
            found.append(modes_of(twin.train()) if modes is None else modes)
        found.append(modes_of(model) if patterns == "now" else modes_of(twin.eval()))
        return _traced(model, twin, tuple(found), (True, False) if len(found) == 2 else (gradients,), form)


def _traced(
    model: nn.Module, twin: nn.Module, modes: tuple[Modes, ...], gradients: tuple[bool, ...], form: Form | None
) -> Trace:
    before = _Before(twin)
    reader = _Reader(twin, _tracer(twin, modes), form)
    try:
        graph, constants = _graph(twin, modes, before)
    except Exception as error:  # whatever user code does with a proxy
        reason = str(error) if isinstance(error, Unsupported) else f"cannot be traced: {_first_line(error)}"
        reason += _place(error)
        raise Untraceable(reason, Watch(model, reader.reads(), modes)) from error
    reads = reader.reads()
    return Trace(graph, modes, gradients, Watch(model, reads, modes), constants, reads, reader.form)


def _tracer(model: nn.Module, modes: tuple[Modes, ...]) -> Tracer:
    """For an engine that trains a model without threshold layers, which asks layers for the weight of each forward, a
    tracer that keeps them whole where it is computed."""
    return Tracer(len(modes) == 2 and not any(isinstance(m, ThresholdLayer) for m in model.modules()))


def _graph(twin: nn.Module, modes: tuple[Modes, ...], before: _Before) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph of a copy in these modes, and the tensors that ``forward`` makes."""
    drawn = random_state()
    constants: list[dict[str, Tensor]] = []
    graphs = []
    for pattern in modes:
        set_modes(twin, pattern)
        tracer = _tracer(twin, modes)
        with tracer.plain_functions():
            graphs.append(tracer.trace(twin))
        found = {k: v for k, v in vars(twin).items() if k.startswith(_CONSTANT)}
        constants.append(found)
        for key in found:
            delattr(twin, key)
    if (name := before.written()) is not None:
        raise Unsupported(f"forward writes to {name!r}")
    if not _same_random_state(drawn, random_state()):
        raise Unsupported("forward draws random numbers in a way that a trace would freeze")
    graph = graphs[0]
    for node in graph.nodes:
        module = twin.get_submodule(str(node.target)) if node.op == "call_module" else None
        first = node.args[0] if node.args else None
        if writes_in_place(node, module) and isinstance(first, fx.Node) and first.op in ("placeholder", "get_attr"):
            raise Unsupported(f"forward writes to {str(first.target)!r}")
    if len(graphs) == 2:
        _merge(graph, graphs[1])
        a, b = constants
        if a.keys() != b.keys() or any(not torch.equal(v, b[k]) for k, v in a.items()):
            raise Unsupported(f"{_DIFFERENT}, with other constants")
    for key, value in constants[0].items():
        if value.requires_grad:
            raise Unsupported(f"forward computes {key!r} from a parameter where a trace does not see it")
    return graph, constants[0]


def _place(error: Exception) -> str:
    """Where a trace ended: the last line of the user's code, else of a module of PyTorch's; nothing outside both."""
    found, own = "", False
    for frame, line in traceback.walk_tb(error.__traceback__):
        name, code = str(frame.f_globals.get("__name__", "")), frame.f_code
        users = name.split(".")[0] not in ("torch", "spafl_kernels") and "<" not in code.co_filename
        layers = name.startswith("torch.nn.modules.") and name != "torch.nn.modules.module"
        if users or (layers and not own):
            found = f" (in {code.co_qualname}, {os.path.basename(code.co_filename)}:{line})"
            own = own or users
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0].rstrip(": ") if lines else type(error).__name__


def plain(value: Any, literals: bool = True) -> Any:
    """Arguments of a node as something that can be compared; without ``literals`` only what other nodes they read."""
    if isinstance(value, fx.Node):
        return ("node", value.name)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__ if literals else "", *(plain(v, literals) for v in value))
    if isinstance(value, Mapping):
        return ("dict", *((k, plain(v, literals)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", plain(value.start, literals), plain(value.stop, literals), plain(value.step, literals))
    return (type(value).__name__, value) if literals else "literal"


_DIFFERENT = "forward does different things in train and eval mode"


def _is(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, node.name


def _called(node: fx.Node) -> str:
    """What a node is, for a reader."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return {"output": "the end", "placeholder": "an input"}.get(node.op, repr(name))


def _merge(graph: fx.Graph, other: fx.Graph) -> None:
    """Note in ``graph`` the literals that ``other`` has instead; raises if that is not the only difference."""
    first, second = list(graph.nodes), list(other.nodes)
    here = {b.name: a for a, b in zip(first, second)}
    for a, b in zip(first, second):
        if plain(a.args) == plain(b.args) and plain(a.kwargs) == plain(b.kwargs) and _is(a) == _is(b):
            continue
        alike = plain(a.args, False) == plain(b.args, False) and plain(a.kwargs, False) == plain(b.kwargs, False)
        if _is(a) != _is(b) or not alike:
            raise Unsupported(f"{_DIFFERENT}, first {_called(a)} and {_called(b)}")
        a.meta["otherwise"] = tuple(fx.node.map_arg(part, lambda n: here[n.name]) for part in (b.args, b.kwargs))

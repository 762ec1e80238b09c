"""What a trace took from a model, compared with what the model is now.

A trace is a snapshot: attributes, flags and settings that ``forward`` read are numbers in it. :class:`Watch` keeps what
was read and says cheaply, before every use, whether it is still so. Compared by value: numbers, strings, tuples, lists,
dictionaries and sets of at most :data:`SMALL` entries, and the fields of plain objects (configurations) that a module
holds, two deep. Compared by identity: everything else, tensors with their version. Not seen: the contents of larger
containers, of arrays that are not tensors, and what a function reads from another module.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _module

__all__ = ["HOOKS", "Modes", "Watch", "frozen", "modes_of", "of_torch", "set_modes"]

Modes = tuple[bool, ...]  # the training flag of every module, in the order of ``model.modules()``

SMALL = 256
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Written by PyTorch or by this package at any time, without meaning for what a module computes.
_PASSING = {"planned", "known_density", "_compiled_call_impl", "_reversed_padding_repeated_twice"}
_PASSING |= nn.Module().__dict__.keys()
_OPAQUE = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def modes_of(model: nn.Module) -> Modes:
    return tuple([m.training for m in model.modules()])


def set_modes(model: nn.Module, modes: Modes) -> None:
    """Give every module its training flag, past whatever a class does when an attribute is set."""
    for m, training in zip(model.modules(), modes):
        m.__dict__["training"] = training


def of_torch(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "torch"


def frozen(value: Any, objects: list[tuple[Any, Any]] | None = None, depth: int = 2) -> Any:
    """A copy that stays equal to ``value`` as long as that does not change; of what is not copied, the thing itself.

    ``objects`` gets the fields of plain objects: what they are, and a copy of that.
    """
    kind = type(value)
    if kind in (list, tuple, set, frozenset, dict) and len(value) <= SMALL:
        if kind is dict:
            return {k: frozen(v, objects, depth) for k, v in value.items()}
        return kind(frozen(v, objects, depth) for v in value)
    if objects is not None and depth and not isinstance(value, _OPAQUE):
        fields = getattr(value, "__dict__", None)
        if isinstance(fields, dict) and fields and len(fields) <= SMALL:
            objects.append((fields, {k: frozen(v, objects, depth - 1) for k, v in fields.items()}))
    return value


def _same(now: Any, then: Any) -> bool:
    if now is then:
        return True
    try:
        return bool(now == then) and type(now) is type(then)
    except Exception:  # whatever an object's comparison does
        return False


class _Fields:
    """Some entries of one namespace, compared in one call."""

    def __init__(self, what: str, space: Any, names: Collection[str]) -> None:
        self.what, self.space = what, space
        self.names = tuple(names)
        self.get = itemgetter(*self.names, self.names[0])  # two names at least make a tuple
        self.objects: list[tuple[Any, Any]] = []
        self.then = tuple(frozen(v, self.objects) for v in self.get(space))

    def changed(self) -> str | None:
        try:
            if self.get(self.space) == self.then and all(now == then for now, then in self.objects):
                return None
        except Exception:  # an entry is gone, or cannot be compared
            pass
        for name, then in zip(self.names, self.then):
            if name not in self.space or not _same(self.space[name], then):
                return f"{self.what} {name!r}"
        if any(not _same(now, then) for now, then in self.objects):
            return f"{self.what} {' or '.join(map(repr, self.names))} (a field of an object)"
        return None


class Watch:
    """Everything of ``model`` that a trace depends on.

    What a model is made of is compared in one pass; only where that is not the same, it is looked for what has changed
    and whether it matters.

    Args:
        model: the model; only read.
        reads: by name of every module whose ``forward`` was traced, the attributes it was asked for. All attributes of
            other modules are watched.
        modes: the training flags that the trace holds good for; several patterns may be.
    """

    def __init__(self, model: nn.Module, reads: Mapping[str, Collection[str]], modes: Sequence[Modes]) -> None:
        self.model, self.modes = model, tuple(modes)
        self.modules = list(model.modules())
        self._modules: list[tuple[str, dict[str, Any], Collection[str] | None]] = []
        self._tensors: list[tuple[str, Tensor, int]] = []
        # Only what is watched is touched, in few calls: behind a step nothing of it is in the caches.
        self._spaces: list[Any] = []
        self._getters: list[itemgetter[Any]] = []
        kinds: dict[type, set[str]] = {}
        self._values: list[_Fields | None] = []  # of every module, then of classes and functions
        for name, m in model.named_modules():
            space, asked = m.__dict__, reads.get(name)
            where = f"{type(m).__name__} {name!r}: attribute" if name else f"{type(m).__name__}: attribute"
            self._modules.append((where, space, asked))
            names = [k for k in space if k not in _PASSING and (asked is None or k in asked)]
            self._values.append(_Fields(where, space, names) if names else None)
            self._spaces.append(space)
            self._getters.append(itemgetter(*names, "training", "training"))  # a tuple even of one
            if asked is not None:
                kinds.setdefault(type(m), set()).update(asked)
            self._tensors += [(f"{where} {k!r}", v, _version(v)) for k in names if isinstance(v := space[k], Tensor)]
        for fields in _of_classes(kinds):
            self._values.append(fields)
            self._spaces.append(fields.space)
            self._getters.append(fields.get)
        self._parameters = list(model.parameters())
        inside: list[Any] = [space for m in self.modules for space in (m._parameters, m._buffers, m._modules)]
        objects = [o for fields in self._values if fields is not None for o in fields.objects]
        self._inside = [space for space in inside if space] + [now for now, _ in objects]
        self._was_inside = [dict(space) for space in inside if space] + [then for _, then in objects]
        hooks = [m.__dict__[h] for m in self.modules for h in HOOKS if h in m.__dict__]
        everywhere = [
            _module._global_forward_hooks, _module._global_forward_pre_hooks, _module._global_backward_hooks,
            _module._global_backward_pre_hooks,
        ]  # fmt: skip
        empty: list[Any] = [*everywhere, *hooks, *(space for space in inside if not space)]
        self._sized = [*(m.__dict__ for m in self.modules), *empty]
        self._known = [(m._parameters, m._buffers, m._modules) for m in self.modules]
        self._members = [[list(space.items()) for space in spaces] for spaces in self._known]
        self._keys = [frozenset(m.__dict__) for m in self.modules]
        self._note()
        # Of hooks a copy: who removes one takes it out of the same dictionary.
        leaves = [_LEAF(p) for p in self._parameters]
        self._state = [(trains, *(None if h is None else dict(h) for h in hooks)) for trains, *hooks in leaves]
        self._kind = [*map(_KIND, self._parameters)]

    def _note(self) -> None:
        """Note how things are; what is compared by value has its copy already."""
        self._sizes = [*map(len, self._sized)]
        values = [() if fields is None else fields.then[:-1] for fields in self._values]
        self._then = []
        for pattern in self.modes:
            of_modules = [(*then, on, on) for then, on in zip(values, pattern)]
            elsewhere = [fields.then for fields in self._values[len(pattern) :] if fields is not None]
            self._then.append([*of_modules, *elsewhere])

    def hooked(self) -> str | None:
        """Name of a parameter that has a hook on its gradient."""
        for name, p in self.model.named_parameters():
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                return name
        return None

    def changed(self, pattern: int = 0, kinds: bool = True) -> str | None:
        """What is not as it was, in words; None if all is.

        Args:
            pattern: which of the modes the modules should have.
            kinds: dtypes and devices of parameters too.
        """
        try:
            same = [get(space) for get, space in zip(self._getters, self._spaces)] == self._then[pattern]
            same = same and self._inside == self._was_inside and [*map(len, self._sized)] == self._sizes
        except Exception:  # tensors, for one, do not compare to a truth value
            same = False
        if not same and (what := self._look(pattern)) is not None:
            return what
        for name, tensor, version in self._tensors:
            if _version(tensor) != version:
                return name
        if [*map(_LEAF, self._parameters)] != self._state:
            return "requires_grad of a parameter, or a hook on its gradient"
        if kinds and [*map(_KIND, self._parameters)] != self._kind:
            return "dtype or device of a parameter"
        return None

    def _look(self, pattern: int) -> str | None:
        """Compare by value what is not the same object, and forget the differences that mean nothing."""
        for m, training in zip(self.modules, self.modes[pattern]):
            if m.training != training:
                return f"mode of a {type(m).__name__}"
        for m, spaces, members in zip(self.modules, self._known, self._members):
            present: tuple[dict[str, Any], ...] = (m._parameters, m._buffers, m._modules)
            for space, now, then in zip(spaces, present, members):
                same = space is now and len(now) == len(then)
                if not same or any(name not in now or now[name] is not value for name, value in then):
                    return "a module, parameter or buffer was added, removed or replaced"
        for fields in self._values:
            if fields is not None and (what := fields.changed()) is not None:
                return what
        if _module._global_forward_hooks or _module._global_forward_pre_hooks or _module._global_backward_hooks:
            return "hooks on all modules"
        for (where, space, asked), keys in zip(self._modules, self._keys):
            new = space.keys() - keys
            if new := (new & set(asked)) if asked is not None else (new - _PASSING):
                return f"{where} {min(new)!r}"
            if any(space.get(h) for h in HOOKS):
                return "hooks on a module"
        self._note()
        return None


_LEAF = attrgetter("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_KIND = attrgetter("dtype", "device")


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _of_classes(kinds: Mapping[type, Collection[str]]) -> Iterator[_Fields]:
    """What the classes of traced modules hold of the attributes asked for, and what their functions read elsewhere."""
    functions: list[types.FunctionType] = []
    for kind, asked in kinds.items():
        for cls in kind.__mro__:
            if cls is object or of_torch(cls):
                continue
            space = vars(cls)
            if names := sorted(k for k in asked if k in space and not k.startswith("__")):
                yield _Fields(f"{cls.__name__}: class attribute", space, names)
            functions += [f for f in map(_function, space.values()) if f is not None]
    seen: set[int] = set()
    while functions:
        function = functions.pop()
        if id(function) in seen or len(seen) > 200:
            continue
        seen.add(id(function))
        space = types.MappingProxyType(function.__globals__)
        # Modules and classes are not looked into; other functions of the program are.
        names = [
            n for n in _names(function.__code__) if n in space and not isinstance(space[n], (types.ModuleType, type))
        ]
        names = [n for n in names if not isinstance(space[n], nn.Module)]
        if names:
            yield _Fields(f"{function.__qualname__}: global", space, names)
        cells = function.__closure__ or ()
        inside = {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, cells) if _filled(c)}
        for n, cell in zip(function.__code__.co_freevars, cells):
            if n in inside and n != "__class__" and not isinstance(inside[n], type):
                yield _Fields(f"{function.__qualname__}: variable {n!r}:", _Cell(cell), ("value",))
        for value in (*(space[n] for n in names), *inside.values()):
            found = _function(value)
            if found is not None and (found.__module__ or "").split(".")[0] not in ("torch", "spafl_kernels"):
                functions.append(found)


class _Cell:
    """A variable of a closure as a namespace of one entry."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, name: str) -> Any:
        return self.cell.cell_contents

    def __contains__(self, name: str) -> bool:
        return _filled(self.cell)


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _function(value: Any) -> types.FunctionType | None:
    value = getattr(value, "__func__", value)
    value = value.fget if isinstance(value, property) else value
    value = value.func if isinstance(value, functools.partial) else value
    return value if isinstance(value, types.FunctionType) else None


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)

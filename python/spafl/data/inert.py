"""Pickles read without a pickle machine: a small interpreter that builds lists, dicts and numbers, and calls nothing.

An unpickler calls what a file names and sets attributes of what it finds, and its opcodes can ask for gigabytes. Here a
name is a name, a call is a record of what would be called, and a state is kept beside its object. Only the opcodes that
data need are known; time and memory are bounded by the bytes of the file and by :data:`MAX_OPCODES`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

MAX_OPCODES = 1_000_000  # CIFAR-100's training file has about 200,000


class InertPickleError(ValueError):
    """Not a pickle of plain data: says which opcode, name or form is the reason."""


@dataclass(frozen=True)
class Name:
    """A name in a module, not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """What would be called with what, and the state that would be given to the result."""

    name: Name
    arguments: tuple
    state: Any = field(default=None)


# Opcodes whose argument is the value, as pickletools reads it (it never takes more bytes than the file has).
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    def __init__(self, allowed: Iterable[Name]) -> None:
        self.allowed = frozenset(allowed)
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise InertPickleError("it takes a value that is not there")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def name(self, module: Any, name: Any) -> Name:
        found = Name(str(module), str(name))
        if found not in self.allowed:
            raise InertPickleError(f"it names {found}, which no CIFAR file needs")
        return found

    def set_items(self, flat: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(flat) % 2:
            raise InertPickleError("items are set on what is no dict")
        for key, value in zip(flat[::2], flat[1::2]):
            if not isinstance(key, str | bytes):
                raise InertPickleError("a key is not a text")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise InertPickleError("values are appended to what is no list")
        target.extend(values)

    def call(self) -> None:
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise InertPickleError("it calls what is no name")
        self.stack.append(Call(name, arguments))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Call) or target.state is not None:
            raise InertPickleError("it gives a state to what takes none")
        target.state = state

    def step(self, opcode: str, argument: Any) -> None:
        """Carry out one opcode."""
        stack = self.stack
        if opcode in _VALUES:
            stack.append(argument)
        elif opcode in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            place = len(self.memo) if opcode == "MEMOIZE" else argument
            if not 0 <= place < 1 << 32:  # larger ones could be chosen to collide in the dict
                raise InertPickleError("it has a memo of impossible size")
            self.memo[place] = self.top()
        elif opcode in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode]())
        elif opcode in ("PROTO", "FRAME"):
            pass
        elif opcode == "MARK":
            self.marks.append(len(stack))
        elif opcode == "APPEND":
            value = self.pop()
            self.append([value])
        elif opcode == "APPENDS":
            self.append(self.pop_to_mark())
        elif opcode == "SETITEM":
            value, key = self.pop(), self.pop()
            self.set_items([key, value])
        elif opcode == "SETITEMS":
            self.set_items(self.pop_to_mark())
        elif opcode in _TUPLES:
            stack.append(tuple([self.pop() for _ in range(_TUPLES[opcode])][::-1]))
        elif opcode == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif opcode == "LIST":
            stack.append(self.pop_to_mark())
        elif opcode == "DICT":
            items = self.pop_to_mark()
            stack.append({})
            self.set_items(items)
        elif opcode == "GLOBAL":
            stack.append(self.name(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = self.pop(), self.pop()
            stack.append(self.name(module if isinstance(module, str) else "?", name if isinstance(name, str) else "?"))
        elif opcode == "REDUCE":
            self.call()
        elif opcode == "BUILD":
            self.build()
        else:
            raise InertPickleError(f"it has the opcode {opcode}, which no CIFAR file needs")


def load(raw: bytes, allowed: Iterable[Name]) -> Any:
    """The value a pickle of plain data describes: dicts with text keys, lists, tuples, numbers, texts, bytes.

    Args:
        raw: the pickle, any protocol. Texts of Python 2 become latin-1 strings, which map every byte to itself.
        allowed: names that may occur. A call of one becomes a :class:`Call`.

    Raises:
        InertPickleError: truncated, more than :data:`MAX_OPCODES` opcodes, an opcode or a name that is not known here.
    """
    machine = _Machine(allowed)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if count >= MAX_OPCODES:
                raise InertPickleError(f"it has more than {MAX_OPCODES} opcodes")
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except InertPickleError:
        raise
    except (KeyError, IndexError):
        raise InertPickleError("it takes a value that is not there") from None
    except (ValueError, OverflowError) as error:  # what pickletools says of what it cannot read
        raise InertPickleError(str(error)) from None
    raise InertPickleError("it ends too early")

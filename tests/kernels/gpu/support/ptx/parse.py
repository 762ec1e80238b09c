"""PTX text of one kernel -> instructions, labels, parameters and the widths of its registers."""

import dataclasses
import re

from .errors import Unsupported

WIDTHS = {"pred": 1, **{f"{sign}{bits}": bits for sign in "bsuf" for bits in (8, 16, 32, 64)}}
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_NAME = re.compile(r"[%\w$.]+")


@dataclasses.dataclass(frozen=True)
class Address:
    base: str
    offset: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str  # "ld.global.v4.b32"
    operands: tuple  # of names and numbers as text, tuples of them, and Address
    guard: str | None  # predicate register
    unless: bool  # the guard is negated
    line: int
    text: str


@dataclasses.dataclass(frozen=True)
class Program:
    name: str
    parameters: list  # (name, bytes)
    instructions: list
    labels: dict  # label -> index of an instruction
    registers: dict  # name -> bits, 1 for predicates


def _operand(text):
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text.strip("{} ").split(","))
    if text.startswith("["):
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise Unsupported(f"address {text}")
        return Address(found[1], int(found[2] or "0", 0))
    return text


def _operands(text):
    """Commas inside of braces and brackets separate nothing here."""
    parts, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            parts.append(text[begin:i])
            begin = i + 1
    return tuple(map(_operand, [*parts, text[begin:]])) if text.strip() else ()


class _Names:
    """Declared registers, by scope: inline assembly may declare its own between braces."""

    def __init__(self):
        self.scopes, self.numbered, self.opened = [{}], {}, 0

    def declare(self, width, names):
        for name in names.split(","):
            name = name.strip()
            if counted := re.fullmatch(r"([%\w$]+)<\d+>", name):
                self.numbered[counted[1]] = width
            else:
                self.scopes[-1][name] = f"{name}@{self.opened}", width

    def open(self):
        self.opened += 1
        self.scopes.append({})

    def own(self, name):
        """``(unique name, bits)`` of a register, None for what is none."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        prefix = name.rstrip("0123456789")
        return (name, self.numbered[prefix]) if prefix in self.numbered and prefix != name else None


def _body(text):
    """(line number, text without comments) of everything between the braces of the kernel, and its header."""
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{]*\{", text, re.S)
    if entry is None:
        raise Unsupported("no kernel in this text")
    number, depth, lines = text[: entry.end()].count("\n") + 1, 1, []
    for line in text[entry.end() :].split("\n"):
        line = line.split("//")[0].strip()
        depth += line.count("{") - line.count("}")
        if depth <= 0:
            return entry[1], entry[2], lines
        lines.append((number, line))
        number += 1
    raise Unsupported("the kernel has no end")


def parse(text):
    name, header, lines = _body(text)
    parameters = []
    for part in filter(None, map(str.strip, header.split(","))):
        found = re.fullmatch(r"\.param\s+\.(\w+)\s.*?([\w$]+)", re.sub(r"\s+", " ", part))
        if found is None or found[1] not in WIDTHS:
            raise Unsupported(f"parameter {part}")
        parameters.append((found[2], WIDTHS[found[1]] // 8))
    names, instructions, labels, registers = _Names(), [], {}, {}

    def rename(match):
        own = names.own(match[0])
        if own is None:
            return match[0]
        registers[own[0]] = own[1]
        return own[0]

    pending = ""
    for number, line in lines:
        if line.startswith(".") and not line.startswith(".reg"):  # where the source is, hints
            continue
        if label := re.fullmatch(r"([\w$]+):", line):
            labels[label[1]] = len(instructions)
            continue
        *statements, pending = f"{pending} {line}".split(";")
        for statement in [*statements, *([pending] if pending.strip() in ("{", "}") else [])]:
            statement = statement.strip()
            while statement[:1] in ("{", "}") and statement:  # no statement begins with a list of operands
                names.open() if statement[0] == "{" else names.scopes.pop()
                statement = statement[1:].strip()
            if declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement):
                names.declare(WIDTHS[declared[1]], declared[2])
            elif statement:
                found = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.S)
                if found is None:
                    raise Unsupported(f"line {number}: {statement}")
                guard = _NAME.sub(rename, found[2]) if found[2] else None
                operands = _operands(_NAME.sub(rename, found[4]))
                instructions.append(Instruction(found[3], operands, guard, bool(found[1]), number, statement))
        pending = "" if pending.strip() in ("{", "}") else pending
    return Program(name, parameters, instructions, labels, registers)

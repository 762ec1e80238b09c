"""Instructions between registers and memory, and asynchronous copies. Form and result as in ``scalar``."""

import numpy as np

from .errors import Unsupported
from .memory import ITEMS
from .parse import Address
from .registers import KINDS

# Hints for caches, which change no value.
CACHE = {"ca", "cg", "cs", "cv", "lu", "nc", "wb", "wt", "L1::evict_last", "L1::evict_first", "L1::evict_normal"}
VECTORS = {"v2": 2, "v4": 4}


def address(k, operand, kind):
    """What computes the addresses of all lanes."""
    base = k.registers.read(operand.base, kind)
    if not operand.offset:
        return lambda: base
    offset = np.array(operand.offset, np.int64).astype(kind)
    return lambda: base + offset


def _form(k, i, parts):
    """(memory, type of its addresses, type of one element, elements)"""
    space, *middle, kind = parts[1:]
    vector = [VECTORS[part] for part in middle if part in VECTORS]
    spaces = {"global": (lambda: k.memory, np.uint64), "shared": (lambda: k.shared, np.uint32)}
    if space not in spaces or kind not in KINDS or not set(middle) <= CACHE | set(VECTORS) or len(vector) > 1:
        raise Unsupported(i.opcode)
    return (*spaces[space], np.dtype(KINDS[kind]), vector[0] if vector else 1)


def load(k, i, parts):
    if parts[1] == "param":
        return _parameter(k, i, parts)
    (memory, width, kind, count), (to, source) = _form(k, i, parts), i.operands
    names = to if isinstance(to, tuple) else (to,)
    if not isinstance(source, Address) or len(names) != count:
        raise Unsupported(i.text)
    targets = [(j, k.registers.write(name, kind)) for j, name in enumerate(names) if name != "_"]
    where, size = address(k, source, width), kind.itemsize * count

    def step(m):
        addresses = where()
        items = memory().load(addresses if m is True else addresses[m], size).view(kind).reshape(-1, count)
        for j, target in targets:
            target[... if m is True else m] = items[:, j]

    return step


def _parameter(k, i, parts):
    to, source = i.operands
    kind = np.dtype(KINDS[parts[2]])
    target = k.registers.write(to, kind)
    if len(parts) != 3:
        raise Unsupported(i.text)

    def step(m):
        value = np.frombuffer(k.parameters[source.base], kind, 1, source.offset)
        np.copyto(target, value, where=m)

    return step


def store(k, i, parts):
    (memory, width, kind, count), (to, source) = _form(k, i, parts), i.operands
    names = source if isinstance(source, tuple) else (source,)
    if not isinstance(to, Address) or len(names) != count:
        raise Unsupported(i.text)
    values, where, size = [k.registers.read(name, kind) for name in names], address(k, to, width), kind.itemsize * count

    def step(m):
        addresses = where()
        items = np.stack(values, 1) if m is True else np.stack([v[m] for v in values], 1)
        memory().store(addresses if m is True else addresses[m], size, items.view(ITEMS[size])[:, 0])

    return step


def asynchronous(k, i, parts):
    """cp.async; a fourth operand of 0 reads nothing and writes zeros, but its address must be valid all the same."""
    if parts[1:2] != ["async"]:
        raise Unsupported(i.opcode)
    if parts[2] == "commit_group":
        return lambda m: k.copies.commit(m)
    if parts[2] == "wait_group":
        left = int(i.operands[0])
        return lambda m: k.copies.wait(m, left)
    if parts[2:] not in (["ca", "shared", "global"], ["cg", "shared", "global"]):
        raise Unsupported(i.opcode)
    to, source = address(k, i.operands[0], np.uint32), address(k, i.operands[1], np.uint64)
    size = int(i.operands[2], 0)
    take = k.registers.read(i.operands[3], np.uint32) if len(i.operands) > 3 else np.full(k.lanes, size, np.uint32)

    def step(m):
        lanes = k.every if m is True else np.flatnonzero(m)
        data = np.zeros((lanes.size, size), np.uint8)
        taken, addresses = take[lanes], source()[lanes]
        some = taken == size
        if taken[~some].any():
            raise Unsupported(f"a copy of {taken[~some].max()} of {size} bytes")
        k.memory.check(addresses[~some], size, "copy of none")
        if some.any():
            data[some] = k.memory.load(addresses[some], size).view(np.uint8).reshape(-1, size)
        k.copies.issue(lanes, to()[lanes], size, data)

    return step


# New value of memory from the old one and the operands of the thread.
ATOMIC = {
    "add": lambda old, new: old + new, "exch": lambda old, new: new,
    "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "cas": lambda old, expected, new: new if old == expected else old,
}  # fmt: skip


def atomic(k, i, parts):
    """atom and red, thread after thread: scopes and orders mean nothing where nothing runs at the same time."""
    memory, width, kind, _ = _form(k, i, [parts[0], parts[1], parts[-1]])
    name = parts[-2]
    if name not in ATOMIC or not set(parts[2:-2]) <= {"gpu", "cta", "sys", "relaxed", "acquire", "release", "acq_rel"}:
        raise Unsupported(i.opcode)
    old, (at, *operands) = (i.operands[0], i.operands[1:]) if parts[0] == "atom" else (None, i.operands)
    target = None if old in (None, "_") else k.registers.write(old, kind)
    where, values, size = address(k, at, width), [k.registers.read(o, kind) for o in operands], kind.itemsize

    def step(m):
        addresses = where()
        for lane in k.every if m is True else np.flatnonzero(m):
            one = addresses[lane : lane + 1]
            before = memory().load(one, size).view(kind)
            after = np.asarray(ATOMIC[name](before, *(v[lane : lane + 1] for v in values)), kind)
            memory().store(one, size, after.view(ITEMS[size]))
            if target is not None:
                target[lane] = before[0]

    return step


TRANSFER = {"ld": load, "st": store, "cp": asynchronous, "atom": atomic, "red": atomic}

"""Instructions of a warp: shuffles, reductions, matrices of 8 x 8 in shared memory, mma.sync. Form as in ``scalar``.

Lane t of a warp is (g, q) = (t / 4, t % 4). A fragment of a matrix has one or two neighbouring elements e per register,
in row g and columns q * e...; further registers are 8 rows below, then 4 * e columns to the right. Everything about
layouts here and in ``warpgroup`` is that one sentence, written as a permutation of axes.
"""

import numpy as np

from ..interpreter import bf16_to_f32
from .errors import Unsupported
from .memory import ITEMS
from .registers import KINDS
from .transfer import address

# Operand types: item in memory and registers, values in float32. Of tf32 the matrix units read 10 bits of the mantissa.
OPERANDS = {
    "bf16": (np.uint16, bf16_to_f32),
    "f16": (np.float16, lambda bits: bits.astype(np.float32)),
    "tf32": (np.uint32, lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32)),
}
FULL = 0xFFFFFFFF
REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def members(k, i, operand):
    """What checks that a mask names all lanes of a warp: nothing smaller is generated."""
    mask = k.registers.read(operand, np.uint32)
    if k.registers.is_number(operand) and mask[0] == FULL:
        return lambda m: None

    def check(m):
        if (mask[... if m is True else m] != FULL).any():
            raise Unsupported(f"{i.opcode} of a part of a warp")

    return check


def shuffle(k, i, parts):
    form = parts[2]
    if parts[1] != "sync" or parts[3] != "b32" or len(i.operands) != 5:
        raise Unsupported(i.opcode)
    d, a = k.registers.write(i.operands[0], np.uint32), k.registers.read(i.operands[1], np.uint32)
    b, c = (k.registers.read(o, np.int64 if k.registers.is_number(o) else np.int32) for o in i.operands[2:4])
    check, lane = members(k, i, i.operands[4]), k.every % 32
    sources = {
        "up": lambda by, low, free: lane - by, "down": lambda by, low, free: lane + by,
        "bfly": lambda by, low, free: lane ^ by, "idx": lambda by, low, free: low | (by & ~free),
    }  # fmt: skip
    source = sources[form]

    def step(m):
        k.whole_warps(m)
        check(m)
        segment = c >> 8 & 31
        low, last = lane & segment, (lane & segment) | (c & 31 & ~segment)
        at = source(b & 31, low, segment)
        at = np.where(at >= last if form == "up" else at <= last, at, lane)
        np.copyto(d, a[k.every - lane + at], where=m)

    return step


def reduction(k, i, parts):
    if parts[1] != "sync" or parts[2] not in REDUCTIONS:
        raise Unsupported(i.opcode)
    kind = KINDS[parts[3]]
    d, a = k.registers.write(i.operands[0], kind), k.registers.read(i.operands[1], kind)
    function, check = REDUCTIONS[parts[2]], members(k, i, i.operands[2])

    def step(m):
        k.whole_warps(m)
        check(m)
        np.copyto(d, np.repeat(function.reduce(a.reshape(-1, 32), axis=1, dtype=kind), 32), where=m)

    return step


def _matrix_addresses(where, lanes, count):
    """(warps, matrices, 8 rows): lanes 8 j to 8 j + 7 hold the rows of matrix j."""
    return where()[lanes].reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)


_TRANS = [], ["trans"]


def _matrix_form(i, parts):
    """(matrices, transposed) of ldmatrix and stmatrix."""
    sync, aligned, shape, count, *trans = parts[1:-2]
    if [sync, aligned, shape, *parts[-2:]] != ["sync", "aligned", "m8n8", "shared", "b16"] or trans not in _TRANS:
        raise Unsupported(i.opcode)
    return int(count[1:]), bool(trans)


def load_matrix(k, i, parts):
    count, transposed = _matrix_form(i, parts)
    _, write = k.registers.several(i.operands[0], np.uint32)
    where = address(k, i.operands[1], np.uint32)

    def step(m):
        lanes = k.whole_warps(m)
        rows = k.shared.load(_matrix_addresses(where, lanes, count).reshape(-1), 16).view(np.uint16)
        rows = rows.reshape(-1, count, 8, 8)
        if transposed:
            rows = rows.swapaxes(2, 3)
        pairs = np.ascontiguousarray(rows).view(np.uint32)  # (warps, matrices, g, q)
        write(lanes, pairs.swapaxes(0, 1).reshape(count, -1))

    return step


def store_matrix(k, i, parts):
    count, transposed = _matrix_form(i, parts)
    read, _ = k.registers.several(i.operands[1], np.uint32)
    where = address(k, i.operands[0], np.uint32)

    def step(m):
        lanes = k.whole_warps(m)
        pairs = read(lanes).reshape(count, -1, 32).swapaxes(0, 1)
        rows = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            rows = np.ascontiguousarray(rows.swapaxes(2, 3))
        items = rows.reshape(-1, 8).view(ITEMS[16])[:, 0]
        k.shared.store(_matrix_addresses(where, lanes, count).reshape(-1), 16, items)

    return step


def left_operand(registers, kind):
    """(4, lanes) registers -> (warps, 16, columns)."""
    items = registers.view(kind)
    e = items.shape[1] // registers.shape[1]
    parts = items.reshape(2, 2, -1, 8, 4, e)  # right, below, warp, g, q, e
    return parts.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 8 * e)


def right_operand(registers, kind):
    """(2, lanes) registers -> (warps, rows, 8): a row of a fragment is a column here."""
    items = registers.view(kind)
    e = items.shape[1] // registers.shape[1]
    parts = items.reshape(2, -1, 8, 4, e)  # below, warp, g, q, e
    return parts.transpose(1, 0, 3, 4, 2).reshape(-1, 8 * e, 8)


def from_accumulators(registers):
    """(n / 2, lanes) float32 -> (warps, 16, n)."""
    n = 2 * registers.shape[0]
    parts = registers.reshape(n // 8, 2, 2, -1, 8, 4)  # right, below, e, warp, g, q
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, n)


def to_accumulators(matrix):
    """The inverse of ``from_accumulators``."""
    n = matrix.shape[2]
    parts = matrix.reshape(-1, 2, 8, n // 8, 4, 2)  # warp, below, g, right, q, e
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, -1)


def multiply(k, i, parts):
    shape, kinds = parts[3], parts[6:]
    known = {"m16n8k16": ("bf16", "f16"), "m16n8k8": ("tf32",)}
    if (parts[1:3] != ["sync", "aligned"] or parts[4:6] != ["row", "col"] or kinds[1] != kinds[2]
            or kinds[1] not in known.get(shape, ()) or kinds[0::3] != ["f32", "f32"]):  # fmt: skip
        raise Unsupported(i.opcode)
    kind, decode = OPERANDS[kinds[1]]
    _, write = k.registers.several(i.operands[0], np.float32)
    (a, _), (b, _) = (k.registers.several(names, np.uint32) for names in i.operands[1:3])
    c, _ = k.registers.several(i.operands[3], np.float32)

    def step(m):
        lanes = k.whole_warps(m)
        left, right = left_operand(a(lanes), kind), right_operand(b(lanes), kind)
        write(lanes, to_accumulators(decode(left) @ decode(right) + from_accumulators(c(lanes))))

    return step


def synchronize(k, i, parts):
    """bar.warp.sync, and fences: no more than a check that warps are whole, for instructions run one after another."""
    return lambda m: k.whole_warps(m)


WARP = {
    "shfl": shuffle, "redux": reduction, "ldmatrix": load_matrix, "stmatrix": store_matrix, "mma": multiply,
}  # fmt: skip

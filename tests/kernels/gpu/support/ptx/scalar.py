"""Instructions in which every thread works for itself, on registers only.

Each function here takes the machine and an instruction, split at its dots, and returns what executes it: a function of
the mask of active lanes (True: all of them). Arithmetic is NumPy's, which wraps integers as the device does.
"""

import numpy as np

from ..interpreter import bf16_to_f32, f32_to_bf16
from .errors import Unsupported
from .registers import KINDS

BINARY = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
FLOATS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax, "div": np.true_divide}
UNARY = {"neg": np.negative, "not": np.invert, "abs": np.absolute, "popc": np.bitwise_count}
# abs of one or two half numbers: their type as bits, and all bits but the signs.
HALF_SIGNS = {
    "abs.bf16": (np.uint16, np.uint16(0x7FFF)), "abs.bf16x2": (np.uint32, np.uint32(0x7FFF7FFF)),
    "abs.f16": (np.uint16, np.uint16(0x7FFF)), "abs.f16x2": (np.uint32, np.uint32(0x7FFF7FFF)),
}  # fmt: skip
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
# What stands between the opcode and its type and changes nothing here: rounding to nearest is all that NumPy does, and
# the approximate division differs from it in the last bits.
ROUNDING = {"rn", "full"}
DOUBLE = {np.int16: np.int32, np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}
# Formats of cvt: how values are read from registers and made from float32.
DECODE = {"bf16": bf16_to_f32, "f16": lambda bits: bits.astype(np.float32)}
ENCODE = {"bf16": f32_to_bf16, "f16": lambda values: values.astype(np.float16)}


def _kind(i, parts, allowed=()):
    """NumPy's type of an instruction's last part; the parts between must be known."""
    if parts[-1] not in KINDS or not set(parts[1:-1]) <= set(allowed):
        raise Unsupported(i.opcode)
    return KINDS[parts[-1]]


def _fused(a, b, c):
    """One rounding, up to the rare double rounding by way of float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _halves(k, i, parts):
    """Arithmetic of half numbers, also of two in one register: in float32, then rounded."""
    name, count = parts[-1].removesuffix("x2"), 2 if parts[-1].endswith("x2") else 1
    whole, part = np.dtype(f"u{2 * count}"), np.dtype(np.uint16)
    d = k.registers.write(i.operands[0], whole).view(part)
    values = [k.registers.read(o, whole).view(KINDS[name]) for o in i.operands[1:]]
    function, decode, encode = {**FLOATS, "fma": _fused}[parts[0]], DECODE[name], ENCODE[name]

    def step(m):
        result = encode(function(*map(decode, values))).view(part)
        np.copyto(d, result, where=m if m is True else np.repeat(m, count))

    return step


def _pairs(k, i, parts):
    """Arithmetic of two integers in one register, each by itself."""
    kind = KINDS[parts[-1].removesuffix("x2")]
    function, d = BINARY[parts[0]], k.registers.write(i.operands[0], np.uint32).view(kind)
    a, b = (k.registers.read(o, np.uint32).view(kind) for o in i.operands[1:])
    return lambda m: function(a, b, out=d, where=m if m is True else np.repeat(m, 2))


def binary(k, i, parts):
    if parts[-1].removesuffix("x2") in DECODE and set(parts[1:-1]) <= ROUNDING:
        return _halves(k, i, parts)
    if parts[0] in ("add", "min", "max") and parts[1:] in (["s16x2"], ["u16x2"]):
        return _pairs(k, i, parts)
    kind = _kind(i, parts, ROUNDING)
    table = FLOATS if kind in (np.float32, np.float64) else BINARY
    if parts[0] not in table:
        raise Unsupported(i.opcode)
    function, d = table[parts[0]], k.registers.write(i.operands[0], kind)
    a, b = (k.registers.read(o, kind) for o in i.operands[1:])
    return lambda m: function(a, b, out=d, where=m)


def unary(k, i, parts):
    if i.opcode in HALF_SIGNS:
        kind, mask = HALF_SIGNS[i.opcode]
        d, a = k.registers.write(i.operands[0], kind), k.registers.read(i.operands[1], kind)
        return lambda m: np.bitwise_and(a, mask, out=d, where=m)
    kind = _kind(i, parts)
    function, d, a = UNARY[parts[0]], k.registers.write(i.operands[0], kind), k.registers.read(i.operands[1], kind)
    return lambda m: np.copyto(d, function(a), where=m, casting="unsafe")


def shift(k, i, parts):
    """Amounts beyond the width give 0, or the sign: in NumPy as in PTX."""
    kind = _kind(i, parts)
    function = np.left_shift if parts[0] == "shl" else np.right_shift
    d, a, b = (
        k.registers.write(i.operands[0], kind), k.registers.read(i.operands[1], kind),
        k.registers.read(i.operands[2], np.uint32),
    )  # fmt: skip
    return lambda m: function(a, np.minimum(b, 255).astype(kind), out=d, where=m)


def multiply(k, i, parts):
    """mul and mad: lo, hi and wide."""
    if parts[-1] == "f32" or parts[-1].removesuffix("x2") in DECODE:
        return binary(k, i, parts)
    form, kind = parts[1], _kind(i, parts, {"lo", "hi", "wide"})
    wide = DOUBLE.get(kind)
    if form not in ("lo", "hi", "wide") or (form != "lo" and wide is None):
        raise Unsupported(i.opcode)
    result = wide if form == "wide" else kind
    d, a, b = (k.registers.write(i.operands[0], result), *(k.registers.read(o, kind) for o in i.operands[1:3]))
    c = k.registers.read(i.operands[3], result) if parts[0] == "mad" else None
    bits = 8 * np.dtype(kind).itemsize

    def product():
        if form == "lo":
            return a * b
        full = a.astype(wide) * b
        return full if form == "wide" else (full >> bits).astype(kind)

    if c is None:
        return lambda m: np.copyto(d, product(), where=m)
    return lambda m: np.add(product(), c, out=d, where=m)


def divide(k, i, parts):
    """div and rem: integers round towards 0."""
    if parts[-1] == "f32":
        return binary(k, i, parts)
    kind = _kind(i, parts)
    d, a, b = (k.registers.write(i.operands[0], kind), *(k.registers.read(o, kind) for o in i.operands[1:]))
    if parts[0] == "rem":
        return lambda m: np.fmod(a, b, out=d, where=m)
    return lambda m: np.floor_divide(a - np.fmod(a, b), b, out=d, where=m)


def multiply_add(k, i, parts):
    if parts[-1].removesuffix("x2") in DECODE and parts[1:-1] == ["rn"]:
        return _halves(k, i, parts)
    if parts != ["fma", "rn", "f32"]:
        raise Unsupported(i.opcode)
    d, (a, b, c) = k.registers.write(i.operands[0], np.float32), (
        k.registers.read(o, np.float32) for o in i.operands[1:]
    )  # fmt: skip
    return lambda m: np.copyto(d, _fused(a, b, c), where=m)


def field(k, i, parts):
    """bfe with a position and a length that are numbers and lie within the register."""
    kind = _kind(i, parts)
    position, length = (k.registers.read(o, np.int64) if k.registers.is_number(o) else None for o in i.operands[2:])
    if position is None or length is None:
        raise Unsupported(i.text)
    low, count, bits = int(position[0]), int(length[0]), 8 * np.dtype(kind).itemsize
    if not 0 < count <= bits - low:
        raise Unsupported(i.text)
    d, a = k.registers.write(i.operands[0], kind), k.registers.read(i.operands[1], kind)
    up, down = kind(bits - low - count), kind(bits - count)
    return lambda m: np.right_shift(a << up, down, out=d, where=m)


def permute(k, i, parts):
    """prmt with a selector that is a number: each of its digits names a byte of the two operands, low ones first."""
    if parts != ["prmt", "b32"] or not k.registers.is_number(i.operands[3]):
        raise Unsupported(i.text)
    digits = [int(k.registers.read(i.operands[3], np.uint32)[0]) >> 4 * j & 15 for j in range(4)]
    if max(digits) > 7:  # copies of the sign of a byte
        raise Unsupported(i.text)
    d = k.registers.write(i.operands[0], np.uint32)
    a, b = (k.registers.read(o, np.uint32).view(np.uint8) for o in i.operands[1:3])

    def step(m):
        picked = np.stack([(a, b)[digit // 4][digit % 4 :: 4] for digit in digits], 1)
        np.copyto(d, picked.view(np.uint32)[:, 0], where=m)

    return step


def compare(k, i, parts):
    """setp. Of floats, the plain forms are false and the forms with u, and nan, are true where an operand is NaN.

    Two half numbers in one register are compared each for itself, with a result for each.
    """
    base = parts[-1].removesuffix("x2")
    decode, count, results = DECODE.get(base), 1 + parts[-1].endswith("x2"), i.operands[0].split("|")
    kind, name = _kind(i, [parts[0], base]), parts[1]
    real = decode is not None or kind is np.float32
    if real and name == "nan":
        unordered, function = True, lambda x, y: np.zeros(len(x), np.bool_)
    else:
        unordered = real and name not in COMPARE and name.endswith("u")
        function = COMPARE.get(name[:-1] if unordered else name)
    if len(parts) != 3 or function is None or len(i.operands) != 3 or len(results) != count:
        raise Unsupported(i.opcode)
    targets = [k.registers.write(d, np.bool_) for d in results]
    whole = kind if count == 1 else np.uint32
    a, b = (k.registers.read(o, whole) for o in i.operands[1:])
    if not real:
        return lambda m: function(a, b, out=targets[0], where=m)
    a, b = ([v.view(kind)[j::count] for j in range(count)] for v in (a, b))

    def step(m):
        for x, y, d in zip(a, b, targets):
            x, y = (x, y) if decode is None else (decode(x), decode(y))
            either = np.isnan(x) | np.isnan(y)
            np.copyto(d, function(x, y) | either if unordered else function(x, y) & ~either, where=m)

    return step


def select(k, i, parts):
    kind = _kind(i, parts)
    d, a, b = (k.registers.write(i.operands[0], kind), *(k.registers.read(o, kind) for o in i.operands[1:3]))
    p = k.registers.read(i.operands[3], np.bool_)
    return lambda m: np.copyto(d, np.where(p, a, b), where=m)


def move(k, i, parts):
    """mov, also of a register from its parts and into them."""
    kind, (to, source) = _kind(i, parts), i.operands
    if isinstance(to, str) and isinstance(source, str):
        d, a = k.registers.write(to, kind), k.registers.read(source, kind)
        return lambda m: np.copyto(d, a, where=m)
    several, one = (to, source) if isinstance(to, tuple) else (source, to)
    part = np.dtype(f"u{np.dtype(kind).itemsize // len(several)}")
    if several is to:
        whole = np.dtype(kind)
        slices = [k.registers.read(one, whole).view(part)[j :: len(several)] for j in range(len(several))]
        pairs = [(k.registers.write(name, part), s) for name, s in zip(several, slices) if name != "_"]
    else:
        d = k.registers.write(one, kind).view(part)
        pairs = [(d[j :: len(several)], k.registers.read(name, part)) for j, name in enumerate(several)]

    def step(m):
        for target, source in pairs:
            np.copyto(target, source, where=m)

    return step


def convert(k, i, parts):
    """cvt between integers, from integers to float32, and between float32 and the half formats."""
    options, to, source = parts[1:-2], parts[-2], parts[-1]
    if not set(options) <= ROUNDING or source not in KINDS:
        raise Unsupported(i.opcode)
    if to in ("bf16x2", "f16x2") and source == "f32":
        encode = ENCODE[to[:-2]]
        halves = k.registers.write(i.operands[0], np.uint32).view(np.uint16)
        high, low = (k.registers.read(o, np.float32) for o in i.operands[1:])

        def pack(m):
            np.copyto(halves[1::2], encode(high).view(np.uint16), where=m)
            np.copyto(halves[0::2], encode(low).view(np.uint16), where=m)

        return pack
    if to not in KINDS:
        raise Unsupported(i.opcode)
    a, d = k.registers.read(i.operands[1], KINDS[source]), k.registers.write(i.operands[0], KINDS[to])
    if source == "f32" and to in ENCODE:
        encode = ENCODE[to]
        return lambda m: np.copyto(d, encode(a), where=m)
    if source in DECODE and to == "f32":
        decode = DECODE[source]
        return lambda m: np.copyto(d, decode(a), where=m)
    whole = np.dtype(KINDS[source]).kind in "iu" and (np.dtype(KINDS[to]).kind in "iu" or to == "f32")
    if not whole:
        raise Unsupported(i.opcode)
    narrow = KINDS[to]  # a narrower result that a wider register holds is cut first
    return lambda m: np.copyto(d, a.astype(narrow), where=m)


SCALAR = {
    **dict.fromkeys(("add", "sub", "min", "max", "and", "or", "xor"), binary),
    **dict.fromkeys(("neg", "not", "abs", "popc"), unary),
    **dict.fromkeys(("shl", "shr"), shift),
    **dict.fromkeys(("mul", "mad"), multiply),
    **dict.fromkeys(("div", "rem"), divide),
    "fma": multiply_add, "bfe": field, "prmt": permute, "setp": compare, "selp": select, "mov": move, "cvt": convert,
}  # fmt: skip

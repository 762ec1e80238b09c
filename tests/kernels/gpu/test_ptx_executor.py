"""The executor of PTX itself: known answers, and seeded faults that it must find."""

import pytest
from support.process import INTERPRETED, pytest_in_own_process

pytest.importorskip("triton")
pytestmark = pytest.mark.compile_only

if INTERPRETED:

    def test_the_executor():
        pytest_in_own_process(__file__, interpret=False)

else:
    import contextlib
    import re
    import struct

    import torch
    import triton
    import triton.language as tl
    from support import cases, ptx
    from support.ptx import TARGETS, executing

    HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

    # ------------------------------------------------------------------------------------------- matrix products
    @triton.jit
    def multiply(a, b, c, a_row, a_column, b_row, b_column, steps,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, DOUBLE: tl.constexpr):  # fmt: skip
        row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, STEP)
        acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for i in range(0, steps):
            step = tl.minimum(i, steps - 1)  # the pipeline copies nothing from behind the last one
            left = tl.load(a + row[:, None] * a_row + (step * STEP + k)[None, :] * a_column)
            right = tl.load(b + (step * STEP + k)[:, None] * b_row + column[None, :] * b_column)
            if DOUBLE:  # computed, so that it is in registers
                left = (left.to(tl.float32) * 2).to(a.dtype.element_ty)
            acc = tl.dot(left, right, acc, input_precision="tf32")
        tl.store(c + row[:, None] * COLUMNS + column[None, :], acc)

    def matrix(rows, columns, dtype, transposed, seed):
        """Numbers that tf32 holds exactly."""
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
        if dtype is SINGLE:
            values = values.view(torch.int32).bitwise_and(~0x1FFF).view(SINGLE)
        return values.T.contiguous().T if transposed else values

    def product_error(target, dtype, columns, step, flips, warps=4, rows=64, double=False, steps=5, **options):
        """(error against float64, PTX) of a product of ``steps`` steps; flips: which operands lie transposed."""
        a, b = matrix(rows, steps * step, dtype, flips[0], 1), matrix(steps * step, columns, dtype, flips[1], 2)
        c = torch.full((rows, columns), float("nan"))
        with executing(TARGETS[target], **options) as log:
            multiply[(1,)](
                a, b, c, *a.stride(), *b.stride(), steps, ROWS=rows, COLUMNS=columns, STEP=step, DOUBLE=double,
                num_warps=warps, num_stages=3,
            )  # fmt: skip
        return cases.error(c, (1 + double) * a.double() @ b.double()), log[0].kernel.asm["ptx"]

    # The reduced and the other extent of a tile choose how shared memory is swizzled.
    @pytest.mark.parametrize(
        ("columns", "step", "flips"),
        [(16, 64, (False, False)), (32, 16, (True, False)), (64, 32, (False, True)), (128, 64, (True, True)),
         (128, 16, (False, True)), (64, 64, (True, False))],
    )  # fmt: skip
    @pytest.mark.parametrize("dtype", [BRAIN, HALF, SINGLE])
    @pytest.mark.parametrize("target", TARGETS)
    def test_matrix_products(target, dtype, columns, step, flips):
        step = step // 2 if dtype is SINGLE and step > 16 else step
        error, text = product_error(target, dtype, columns, step, flips, seed=1, warp_by_warp=columns == 64)
        assert error < 1e-6
        assert ("wgmma" if target == "sm_90" else "mma.sync") in text and "cp.async.wait_group" in text

    @pytest.mark.parametrize("dtype", [BRAIN, SINGLE])
    def test_a_left_operand_in_registers_and_two_warpgroups(dtype):
        error, text = product_error("sm_90", dtype, 32, 32, (False, False), 8, 128, double=True)
        assert error < 1e-6
        assert re.search(r"wgmma.mma_async\S+\s*\{[^}]*\}\s*,\s*\{", text)

    def test_tf32_ignores_the_low_bits():
        a, b, c = torch.full((64, 32), 1 + 2.0**-11), torch.ones(32, 16), torch.empty(64, 16)
        for target in TARGETS.values():
            with executing(target):
                multiply[(1,)](a, b, c, *a.stride(), *b.stride(), 1, ROWS=64, COLUMNS=16, STEP=32, DOUBLE=False)
            assert (c == 32).all()

    # ------------------------------------------------------------------------------------------- seeded faults
    def weaker(pattern):
        """An edit that lets one more group of every such wait be on its way."""
        return lambda name, text: re.sub(rf"({pattern}\s+)(\d)", lambda m: f"{m[1]}{int(m[2]) + 1}", text)

    def without_barriers(name, text):
        return re.sub(r"bar\.sync\s+0;", "", text)

    FAULTS = [
        ("sm_80", weaker("cp.async.wait_group"), False),
        ("sm_90", weaker("cp.async.wait_group"), False),
        ("sm_90", weaker("wgmma.wait_group.sync.aligned"), False),
        ("sm_80", without_barriers, True),
        ("sm_90", without_barriers, True),
    ]

    @pytest.mark.parametrize(("target", "edit", "warp_by_warp"), FAULTS)
    def test_missing_waits_and_barriers_are_found(target, edit, warp_by_warp):
        try:
            error, _ = product_error(
                target, BRAIN, 64, 32, (False, False), steps=7, edit=edit, warp_by_warp=warp_by_warp
            )
        except ptx.Hazard as hazard:
            assert "overwritten before the wait" in str(hazard)
        else:
            assert error > 1e-2

    @triton.jit
    def multiply_some(a, b, c, steps, limit, CLAMP: tl.constexpr, LAST: tl.constexpr, SIZE: tl.constexpr):
        row, k = tl.arange(0, SIZE), tl.arange(0, SIZE)
        acc = tl.zeros((SIZE, SIZE), dtype=tl.float32)
        for i in range(0, steps):
            step = tl.minimum(i, LAST)
            left = tl.load(a + row[:, None] * (steps * SIZE) + (step * SIZE + k)[None, :])
            down = step * SIZE + k
            live = down < limit
            if CLAMP:
                down = tl.where(live, down, 0)
            acc = tl.dot(left, tl.load(b + down[:, None] * SIZE + row[None, :], mask=live[:, None], other=0.0), acc)
        tl.store(c + row[:, None] * SIZE + row[None, :], acc)

    @pytest.mark.parametrize(("clamp", "last"), [(True, 2), (False, 2), (True, 9)])
    def test_a_masked_copy_from_behind_the_end_is_found(clamp, last):
        """Whether the kernel masked it, or the compiler: it fetches for steps behind the last one, and masks that."""
        good = clamp and last == 2
        a, b, c = matrix(64, 192, BRAIN, False, 1), matrix(150, 64, BRAIN, False, 2), torch.empty(64, 64)
        with contextlib.nullcontext() if good else pytest.raises(ptx.OutOfBounds, match="copy of none of 16 bytes"):
            with executing():
                multiply_some[(1,)](a, b, c, 3, 150, CLAMP=clamp, LAST=last, SIZE=64, num_stages=3)
            assert cases.error(c, a[:, :150].double() @ b.double()) < 1e-6

    @triton.jit
    def copy(x, y, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)

    @pytest.mark.parametrize(("read", "written", "what"), [(200, 199, "store"), (199, 200, "load")])
    def test_an_access_behind_the_end_is_found(read, written, what):
        x, y = torch.ones(read), torch.zeros(written)
        with (
            pytest.raises(ptx.OutOfBounds, match=rf"copy, block \(1, 0, 0\), line \d+: .*{what} of 4 bytes"),
            executing(),
        ):
            copy[(2,)](x, y, 200, BLOCK=128)

    def test_a_misaligned_access_is_found():
        x, y = torch.ones(1024), torch.zeros(1024)
        edit = lambda name, text: re.sub(r"(ld\.global\.v4.*) \+ 0 \]", r"\1 + 4 ]", text)  # noqa: E731
        with pytest.raises(ptx.Misaligned, match="16 bytes"), executing(edit=edit):
            copy[(1,)](x, y, 1024 - 512, BLOCK=512)

    def test_memory_reached_through_a_table_has_to_be_named():
        x, y = torch.ones(256), torch.zeros(256)
        table = torch.tensor([x.data_ptr(), y.data_ptr()])
        with executing(also=(x, y)):
            copy_of_table[(1,)](table, BLOCK=256)
        assert (y == 1).all()
        with pytest.raises(ptx.OutOfBounds, match="after the start of"), executing():
            copy_of_table[(1,)](table, BLOCK=256)

    @triton.jit
    def copy_of_table(table, BLOCK: tl.constexpr):
        x = tl.load(table).to(tl.pointer_type(tl.float32))
        y = tl.load(table + 1).to(tl.pointer_type(tl.float32))
        at = tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at))

    def test_an_unknown_instruction_is_an_error():
        x, y = torch.ones(128), torch.zeros(128)
        edit = lambda name, text: text.replace("\tret;", "\tsin.approx.f32 %r1, %r1;\n\tret;")  # noqa: E731
        with pytest.raises(ptx.Unsupported, match=r"sin\.approx"), executing(edit=edit):
            copy[(1,)](x, y, 100, BLOCK=128)

    # ------------------------------------------------------------------------------------------- atomics
    @triton.jit
    def tickets(counter, total, drawn, BLOCK: tl.constexpr):
        ticket = tl.atomic_add(counter, 1, sem="relaxed")
        tl.store(drawn + tl.program_id(0), ticket)
        tl.atomic_add(total + tl.arange(0, BLOCK) % 2, tl.full((BLOCK,), 0.5, tl.float32))

    def test_atomics():
        counter, total, drawn = torch.zeros(1, dtype=torch.int32), torch.zeros(2), torch.zeros(9, dtype=torch.int32)
        with executing(seed=3):
            tickets[(9,)](counter, total, drawn, BLOCK=128)
        assert counter.item() == 9 and total.tolist() == [9 * 32, 9 * 32]
        assert sorted(drawn.tolist()) == list(range(9)) != drawn.tolist()  # blocks run in random order

    # ------------------------------------------------------------------------------------------- written by hand
    FRAME = """
    .version 8.7
    .target sm_90a
    .address_size 64
    .visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
    {
        .reg .pred %p<9>;
        .reg .b32 %r<19>;
        .reg .b64 %rd<19>;
        ld.param.b64 %rd1, [kernel_param_0];
        ld.param.b64 %rd2, [kernel_param_1];
        mov.u32 %r1, %tid.x;
        mul.wide.u32 %rd3, %r1, 8;
        add.s64 %rd1, %rd1, %rd3;
        add.s64 %rd2, %rd2, %rd3;
        ld.global.v2.b32 {%r2, %r3}, [%rd1];
        BODY
        st.global.b64 [%rd2], %rd9;
        ret;
    }
    """

    def by_hand(body, pairs, warp_by_warp=False):
        """Run ``body`` once per pair of integers in %r2, %r3; what it leaves in %rd9, as unsigned numbers."""
        given, out = torch.tensor(pairs, dtype=torch.int32), torch.zeros(len(pairs), dtype=torch.int64)
        runner = ptx.machine(FRAME.replace("BODY", body), len(pairs), 0)
        memory = ptx.Global([("given", given), ("out", out)])
        runner.run((1, 1, 1), [struct.pack("<Q", t.data_ptr()) for t in (given, out)], memory, 0, warp_by_warp)
        return [n % 2**64 for n in out.tolist()]

    def quotient(a, b):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)

    def low(n, bits=32):
        return n % 2**bits

    # Instruction, result of signed a and b in plain Python, its bits.
    ARITHMETIC = [
        ("div.s32 %r4, %r2, %r3", quotient, 32),
        ("rem.s32 %r4, %r2, %r3", lambda a, b: a - b * quotient(a, b), 32),
        ("div.u32 %r4, %r2, %r3", lambda a, b: low(a) // low(b), 32),
        ("rem.u32 %r4, %r2, %r3", lambda a, b: low(a) % low(b), 32),
        ("mul.lo.s32 %r4, %r2, %r3", lambda a, b: a * b, 32),
        ("mul.hi.s32 %r4, %r2, %r3", lambda a, b: a * b >> 32, 32),
        ("mul.hi.u32 %r4, %r2, -1431655765", lambda a, b: low(a) * low(-1431655765) >> 32, 32),
        ("mul.wide.s32 %rd9, %r2, %r3", lambda a, b: a * b, 64),
        ("mul.wide.u32 %rd9, %r2, %r3", lambda a, b: low(a) * low(b), 64),
        ("mad.lo.s32 %r4, %r2, -112, %r3", lambda a, b: a * -112 + b, 32),
        ("cvt.s64.s32 %rd9, %r2", lambda a, b: a, 64),
        ("cvt.u64.u32 %rd9, %r2", lambda a, b: low(a), 64),
        ("shl.b32 %r4, %r2, 40", lambda a, b: 0, 32),
        ("shr.s32 %r4, %r2, 40", lambda a, b: -1 if a < 0 else 0, 32),
        ("shr.u32 %r4, %r2, 7", lambda a, b: low(a) >> 7, 32),
        ("bfe.s32 %r4, %r2, 5, 7", lambda a, b: ((low(a) >> 5 & 127) ^ 64) - 64, 32),
        ("bfe.u32 %r4, %r2, 4, 14", lambda a, b: low(a) >> 4 & 0x3FFF, 32),
        ("min.u32 %r4, %r2, %r3", lambda a, b: min(low(a), low(b)), 32),
        ("max.s32 %r4, %r2, %r3", max, 32),
        ("popc.b32 %r4, %r2", lambda a, b: low(a).bit_count(), 32),
        ("not.b32 %r4, %r2", lambda a, b: ~a, 32),
        ("prmt.b32 %r4, %r2, %r3, 0x5140U", lambda a, b: low(a) & 255 | (low(b) & 255) << 8 | (low(a) >> 8 & 255) << 16
         | (low(b) >> 8 & 255) << 24, 32),
        ("add.s16x2 %r4, %r2, %r3", lambda a, b: low(a + b, 16) | low((low(a) >> 16) + (low(b) >> 16), 16) << 16, 32),
        ("max.u16x2 %r4, %r2, %r3", lambda a, b: max(low(a, 16), low(b, 16)) | max(low(a) >> 16, low(b) >> 16) << 16,
         32),
        ("setp.lt.u32 %p1, %r2, %r3; selp.b32 %r4, 7, 9, %p1", lambda a, b: 7 if low(a) < low(b) else 9, 32),
        ("mov.b64 %rd9, {%r3, %r2}", lambda a, b: low(a) << 32 | low(b), 64),
        ("mov.u32 %r4, 0xffffffffffffffff", lambda a, b: -1, 32),
    ]  # fmt: skip

    @pytest.mark.parametrize(("instruction", "function", "bits"), ARITHMETIC)
    def test_integers(instruction, function, bits):
        edges = [0, 1, -1, 2, -2, 3, 127, -128, 2**31 - 1, -(2**31), 65535]
        pairs = [(a, b or 5) for a in edges for b in edges if (a, b) != (-(2**31), -1)]
        random = torch.randint(-(2**31), 2**31, (160 - len(pairs), 2), generator=torch.Generator().manual_seed(0))
        pairs += [(a, b or 5) for a, b in random.tolist()]
        body = instruction + (";" if bits == 64 else "; cvt.u64.u32 %rd9, %r4;")
        assert by_hand(body, pairs) == [low(function(a, b), bits) for a, b in pairs]

    def half_inputs(dtype):
        """Two registers of two half numbers per thread, with NaN, infinities and equal numbers."""
        values = 3 * torch.randn(96, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        values[::5, 0], values[::9, 2] = float("nan"), float("inf")
        values[::7, :2] = values[::7, 2:]
        return values

    @pytest.mark.parametrize(
        ("instruction", "dtype", "function"),
        [
            ("sub.bf16x2 %r4, %r2, %r3", BRAIN, lambda a, b: a - b),
            ("mul.bf16x2 %r4, %r2, %r3", BRAIN, lambda a, b: a * b),
            ("add.rn.f16x2 %r4, %r2, %r3", HALF, lambda a, b: a + b),
            ("fma.rn.bf16x2 %r4, %r2, %r3, %r2", BRAIN, lambda a, b: (a.double() * b.double() + a.double()).to(BRAIN)),
            ("abs.bf16x2 %r4, %r2", BRAIN, lambda a, b: a.abs()),
        ],
    )
    def test_arithmetic_of_half_numbers(instruction, dtype, function):
        values = half_inputs(dtype)
        numbers = by_hand(f"{instruction}; cvt.u64.u32 %rd9, %r4;", values.view(torch.int32).tolist())
        got = torch.tensor([struct.unpack("<hh", struct.pack("<I", n)) for n in numbers], dtype=torch.int16).view(dtype)
        torch.testing.assert_close(got, function(values[:, :2], values[:, 2:]), rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize(
        ("comparison", "dtype", "function"),
        [
            ("setp.gt.bf16x2 %p1|%p2, %r2, %r3", BRAIN, torch.gt),
            ("setp.neu.f16x2 %p1|%p2, %r2, %r3", HALF, torch.ne),
            ("setp.ne.f16x2 %p1|%p2, %r2, %r3", HALF, lambda a, b: (a != b) & ~(a.isnan() | b.isnan())),
            ("setp.nan.bf16x2 %p1|%p2, %r2, %r3", BRAIN, lambda a, b: a.isnan() | b.isnan()),
        ],
    )
    def test_comparison_of_half_numbers(comparison, dtype, function):
        values = half_inputs(dtype)
        body = f"{comparison}; selp.b32 %r4, 1, 0, %p1; selp.b32 %r5, 2, 0, %p2; or.b32 %r4, %r4, %r5;"
        got = by_hand(body + "cvt.u64.u32 %rd9, %r4;", values.view(torch.int32).tolist())
        assert got == (function(values[:, :2], values[:, 2:]) * torch.tensor([1, 2])).sum(1).tolist()

    # Every thread loops as often as its number says; the shuffle after it needs whole warps again.
    LOOP = """
        mov.u32 %r4, 0;
        mov.u32 %r5, 0;
        mov.b32 %r6, 0;
        setp.ge.s32 %p1, %r5, %r2;
        @%p1 bra $DONE;
    $AGAIN:
        add.s32 %r4, %r4, %r5;
        add.s32 %r5, %r5, 1;
        setp.lt.s32 %p1, %r5, %r2;
        @%p1 bra $AGAIN;
    $DONE:
        bar.sync 0;
        // begin inline asm
        { .reg .pred p; .reg .b32 t;
          mov.b32 t, 1;
          setp.gt.s32 p, %r2, 40;
          @p add.s32 %r6, %r6, t; }
        { .reg .pred p; .reg .b32 t; mov.b32 t, 2; setp.gt.s32 p, %r2, 60; @!p add.s32 %r6, %r6, t; }
        // end inline asm
        shfl.sync.up.b32 %r7, %r4, 1, 0, -1;
        mov.b64 %rd9, {%r7, %r6};
    """

    @pytest.mark.parametrize("warp_by_warp", [False, True])
    def test_threads_that_diverge_and_meet_again(warp_by_warp):
        got = by_hand(LOOP, [(t, 0) for t in range(128)], warp_by_warp)
        for t in range(128):
            source = t - 1 if t % 32 else t
            assert got[t] & 0xFFFFFFFF == source * (source - 1) // 2
            assert got[t] >> 32 == (t > 40) + 2 * (t <= 60)

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("setp.lt.s32 %p1, %r1, 32; @%p1 bra $ONE; bar.sync 0; bra $TWO;\n$ONE:\nbar.sync 0;\n$TWO:\n", "barriers"),
            ("setp.lt.s32 %p1, %r1, 40; @%p1 shfl.sync.up.b32 %r4, %r2, 1, 0, -1;", "part of a warp"),
        ],
    )
    def test_barriers_that_cannot_complete_are_found(body, message):
        with pytest.raises(ptx.Stuck, match=message):
            by_hand(body, [(t, 0) for t in range(128)])

    def test_registers_that_nobody_wrote_hold_nan():
        assert set(by_hand("", [(0, 0)] * 32)) == {0xFFC0FFC0FFC0FFC0}

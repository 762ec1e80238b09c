"""What the compiler made of every kernel computes the right numbers: PTX for sm_90 and sm_80, executed without a GPU.

Cases run on the same code in two ways: all warps side by side, and warp by warp in random order between barriers.
Tolerances are those of ``test_interpreter.py``, and wider for tf32.
"""

import pytest
from support.process import INTERPRETED, pytest_in_own_process

pytest.importorskip("triton")
pytestmark = pytest.mark.compile_only

if INTERPRETED:

    def test_compiled_kernels():
        pytest_in_own_process(__file__, interpret=False)

else:
    import dataclasses

    import torch
    from support import cases
    from support.poison import poisoned
    from support.ptx import TARGETS, executing

    from spafl_kernels.gpu import closed_form
    from spafl_kernels.gpu.geometry import Geometry
    from spafl_kernels.gpu.packing import Selection
    from spafl_kernels.gpu.triton import ModelPass, layer_backward, layer_forward, select_layer
    from spafl_kernels.gpu.triton.tiles import TILES, every

    HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
    MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async"}
    # name: dtype, tf32, root mean square error against float64 on the same inputs. Truncation to tf32 costs an operand
    # up to 2**-10, always towards 0, so twice what the rounding of the interpreter does.
    ARITHMETIC = {
        "bf16": (BRAIN, False, 5e-3), "fp16": (HALF, False, 1e-3), "tf32": (SINGLE, True, 2e-3),
        "fp32": (SINGLE, False, 1e-6),
    }  # fmt: skip
    # out, geometry, images, clients
    SHAPES = {
        "linear": (200, Geometry(128), 64, 1),
        "wide": (70, Geometry(64, 8, 8, (3, 3), (1, 1), (1, 1)), 2, 1),  # 9 steps of the pipeline, 2 tiles of filters
        "strided": (64, Geometry(64, 9, 8, (3, 3), (2, 2), (1, 1)), 2, 2),
        "uneven": (17, Geometry(5, 9, 8, (3, 2), (3, 2), (2, 1), (2, 3)), 3, 2),  # taps and channels walked as one
        "small": (10, Geometry(37), 9, 3),
    }

    @pytest.fixture(autouse=True)
    def poisoned_memory(monkeypatch):
        with poisoned(monkeypatch):
            yield

    def both_orders(target, orders=(False, True), **options):
        """The ways to run a case; the second costs no compilation."""
        for seed, warp_by_warp in enumerate(orders):
            yield executing(TARGETS[target], seed=seed, warp_by_warp=warp_by_warp, **options)

    def check(case, target, arithmetic, estimator="identity", bias=True, mask_bias=False, orders=(False, True)):
        """Selection, forward and backward through the launchers against the definition in float64."""
        dtype, tf32, tolerance = ARITHMETIC[arithmetic]
        assert case.x.dtype is dtype
        data, rows = closed_form.selection_and_packed(case.weight, case.threshold, estimator, dtype)
        for order in both_orders(target, orders):
            with order as log:
                selection, packed, y, gradients = cases.run(case, estimator, bias, mask_bias, tf32)
            assert torch.equal(selection.data, data) and torch.equal(packed, rows)
            cases.check(case, selection, y, gradients, tolerance, bias, mask_bias)
        return {launch.name: launch.kernel.asm["ptx"] for launch in log}

    def make(shape, arithmetic, count=None, **rest):
        out, geometry, n, clients = SHAPES[shape]
        return cases.make(out, geometry, n, count, clients, ARITHMETIC[arithmetic][0], **rest)

    # ------------------------------------------------------------------------------------------- layers
    # Counts of active filters take every width of the last tile: 16, 32 and 64.
    QUICK = [
        ("sm_90", "wide", "bf16", (0, 17)),
        ("sm_90", "linear", "bf16", (80,)),
        ("sm_90", "uneven", "bf16", (1, 9)),
        ("sm_90", "uneven", "tf32", (17,)),
        ("sm_90", "uneven", "fp32", (9,)),
        ("sm_90", "small", "fp32", (0, 5, 10)),
        ("sm_80", "uneven", "tf32", (9,)),
    ]
    LONG = [
        ("sm_90", "wide", "bf16", (1, 33, 70)),
        ("sm_90", "wide", "fp16", (24, 64)),
        ("sm_90", "wide", "tf32", (9, 30, 70)),
        ("sm_90", "wide", "fp32", (20,)),
        ("sm_90", "linear", "bf16", (0, 1, 200)),
        ("sm_90", "linear", "tf32", (150,)),
        ("sm_90", "strided", "fp16", (0, 12, 60)),
        ("sm_80", "wide", "bf16", (1, 17, 66)),
        ("sm_80", "linear", "fp16", (150,)),
    ]

    @pytest.mark.parametrize(
        ("target", "shape", "arithmetic", "counts"), QUICK + [pytest.param(*p, marks=pytest.mark.slow) for p in LONG]
    )
    def test_layers(target, shape, arithmetic, counts):
        for seed, count in enumerate(counts):
            orders = (False, True) if count == counts[-1] else (False,)
            kernels = check(make(shape, arithmetic, count, seed=seed), target, arithmetic, orders=orders)
        if shape in ("wide", "linear", "strided"):
            for name in ("threshold_forward", "threshold_dgrad", "threshold_wgrad"):
                assert (MATRIX[target] in kernels[name]) == (arithmetic != "fp32"), name
                assert "cp.async.wait_group" in kernels[name], name

    @pytest.mark.parametrize(("bias", "mask_bias"), [(False, False), (True, True)])
    def test_window_estimator_and_bias(bias, mask_bias):
        check(make("small", "bf16"), "sm_90", "bf16", "window", bias, mask_bias)

    def test_pruned_weights_are_not_read_after_the_mask_is_made():
        """NaN in them reaches nothing, where dL/dy of pruned filters is 0."""
        case = make("strided", "fp16", 20, dead_gradient=True)
        selection, packed = case.selection()
        want = cases.expected_gradients(case, selection, True, False)
        output = cases.expected_output(case, True, False)
        case.weight[~case.keep] = float("nan")
        for order in both_orders("sm_90"):
            with order:
                y = layer_forward(case.x, packed, selection, case.bias, case.geometry)
                gradients = layer_backward(case.grad, case.x, case.weight, packed, selection, case.bias, case.geometry)
            for got, expected in zip((y, *gradients), (output, *want), strict=True):
                assert cases.error(got, expected) < ARITHMETIC["fp16"][2]

    @pytest.mark.parametrize("listed", [pytest.param(0, marks=pytest.mark.slow), 40])
    def test_an_input_channel_list_is_the_layer_on_those_channels(listed):
        """Values of other channels (here NaN) are not even read."""
        case = make("strided", "fp16", 20, seed=6)
        before = cases.make(case.geometry.channels, Geometry(4), 1, listed, 2, seed=7)
        inputs, _ = before.selection()
        keep = before.keep[:, None, :, None, None]
        zeroed = dataclasses.replace(case, x=torch.where(keep, case.x, 0.0))
        case.x = torch.where(keep, case.x, float("nan"))
        selection, packed = case.selection()
        output = cases.expected_output(zeroed, True, False)
        dx, *rest = cases.expected_gradients(zeroed, selection, True, False)
        want = output, torch.where(keep, dx, 0.0), *rest
        for order in both_orders("sm_90"):
            with order:
                y = layer_forward(case.x, packed, selection, case.bias, case.geometry, input_selection=inputs)
                gradients = layer_backward(
                    case.grad, case.x, case.weight, packed, selection, case.bias, case.geometry, input_selection=inputs
                )
            for got, expected in zip((y, *gradients), want, strict=True):
                assert cases.error(got, expected) < ARITHMETIC["fp16"][2]
            assert not gradients[0][~keep.expand_as(gradients[0])].any()

    # ------------------------------------------------------------------------------------------- threshold pass
    @pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
    def test_model_pass_equals_the_pass_of_every_layer(target):
        """For a cohort, and in launches that follow each other: the words of their counts take turns."""
        layers = [
            cases.make(out, Geometry(c, kernel=k, height=k[0], width=k[1]), 1, count, 2, BRAIN, seed=out)
            for out, c, k, count in ((5, 3, (3, 3), 0), (70, 16, (1, 1), 33), (33, 6, (2, 2), 33))
        ]
        weights = [c.weight if c.geometry.kernel != (1, 1) else c.weight[..., 0, 0] for c in layers]
        weights[2] = weights[2].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        thresholds = [c.threshold for c in layers]
        model = ModelPass(weights, thresholds)
        for launch, order in enumerate(both_orders(target, (False, True, False), also=(*weights, *thresholds))):
            with order:
                model()
            for case, selection, packed in zip(layers, model.selections, model.packed, strict=True):
                data, rows = closed_form.selection_and_packed(case.weight, case.threshold, "identity", BRAIN)
                assert selection.changed.tolist() == [int(launch == 0)] * 2
                for part in ("count", "index", "inverse", "mask"):
                    assert torch.equal(getattr(selection, part), getattr(Selection(data, selection.out), part)), part
                assert torch.equal(packed, rows)

    def test_changed_tells_a_flip_and_only_a_flip():
        case = cases.make(20, Geometry(8), 1, 10)
        with executing(TARGETS["sm_90"]):
            selection, _, _ = select_layer(case.weight, case.threshold, "identity")
            seen = selection.changed.tolist()
            select_layer(case.weight, case.threshold, "identity", selection=selection)
            seen += selection.changed.tolist()
            case.threshold[0, 3] = 1e6 if case.keep[0, 3] else -1e6
            select_layer(case.weight, case.threshold, "identity", selection=selection)
            assert [*seen, *selection.changed.tolist()] == [1, 0, 1]

    # ------------------------------------------------------------------------------------------- tiles and shapes
    EVERY_TILE = [
        ((target, operation), kind, tile)
        for target in TARGETS for operation, kinds in TILES.items() for kind in kinds for tile in every(operation, kind)
    ]  # fmt: skip

    @pytest.mark.sweep
    @pytest.mark.parametrize(("product", "kind", "tile"), EVERY_TILE)
    def test_tiles_of_the_tables(product, kind, tile):
        target, operation = product
        arithmetic = {"half": "bf16", "tf32": "tf32", "ieee": "fp32"}[kind]
        dtype, tf32, tolerance = ARITHMETIC[arithmetic]
        geometry, n = Geometry(128, 6, 5, (2, 2)), 9
        out, count = (70, 45) if tile.filters <= 64 else (tile.filters, tile.filters - 9)
        case = cases.make(out, geometry, n, count, dtype=dtype, seed=4, dead_gradient=tile.filters > 64)
        selection, packed = case.selection()
        for order in both_orders(target):
            with order:
                if operation == "forward":
                    got = (layer_forward(case.x, packed, selection, None, geometry, tf32=tf32, tile=tile),)
                else:
                    got = layer_backward(
                        case.grad, case.x, case.weight, packed, selection, None, geometry, tf32=tf32, tile=tile,
                        need_input=operation == "dgrad", need_weight=operation == "wgrad",
                    )  # fmt: skip
            if operation == "forward":
                want = (cases.expected_output(case, False, False),)
            else:
                want = cases.expected_gradients(case, selection, False, False)
            for a, b in zip(got, want, strict=True):
                assert a is None or cases.error(a, b) < tolerance

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(40))
    def test_random_shapes(seed):
        g = torch.Generator().manual_seed(seed)

        def pick(*choices):
            return choices[int(torch.randint(len(choices), (), generator=g))]

        kernel, dilation = (pick(1, 2, 3), pick(1, 2, 3)), (pick(1, 2), pick(1, 2))
        size = [d * (k - 1) + pick(1, 4, 6) for d, k in zip(dilation, kernel, strict=True)]
        stride, padding = (pick(1, 2, 3), pick(1, 2)), (pick(0, 1), pick(0, 1, 2))
        geometry = Geometry(pick(1, 3, 16, 24, 64, 100), *size, kernel, stride, padding, dilation)
        out, arithmetic = pick(1, 10, 33, 80), pick(*ARITHMETIC)
        case = cases.make(
            out, geometry, pick(1, 3, 40), pick(0, out // 2, out), pick(1, 2), ARITHMETIC[arithmetic][0], seed
        )
        check(case, pick(*TARGETS), arithmetic, pick("identity", "window"), pick(True, False))

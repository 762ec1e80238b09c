"""Every Triton kernel in the strict interpreter: values, bounds, races, program order, poison, and work done."""

import contextlib

import pytest
from support.process import INTERPRETED, pytest_in_own_process

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

if not INTERPRETED:
    # In parts, so that the longest test of all does not keep one core busy alone at the end.
    @pytest.mark.parametrize("part", range(2))
    def test_kernels_in_the_interpreter(part):
        pytest_in_own_process(__file__, interpret=True, part=(part, 2))

else:
    import dataclasses
    import importlib

    import torch
    import triton
    import triton.language as tl
    from support import cases
    from support import interpreter as checks
    from support.poison import poisoned

    import spafl_kernels.gpu.triton.collect as collect_module
    import spafl_kernels.gpu.triton.threshold as threshold_module
    import spafl_kernels.gpu.triton.wgrad as wgrad_module
    from spafl_kernels import executed
    from spafl_kernels.gpu import closed_form, operators
    from spafl_kernels.gpu.geometry import Geometry
    from spafl_kernels.gpu.packing import HEADER, Selection
    from spafl_kernels.gpu.triton import ModelPass, layer_backward, layer_forward, select_layer
    from spafl_kernels.gpu.triton.lookback import LANES
    from spafl_kernels.gpu.triton.tiles import TILES, Tile, every

    checks.install()
    HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
    # Root mean square error against float64 on the same inputs: rounding of the output, and of tf32 operands.
    TOLERANCE = {SINGLE: 1e-6, HALF: 1e-3, BRAIN: 5e-3}
    TF32 = 1e-3
    # out, geometry, images
    SHAPES = {
        "linear": (21, Geometry(37), 9),
        "first": (10, Geometry(3, 7, 6, (3, 3), (1, 1), (1, 1)), 2),
        "strided": (18, Geometry(16, 7, 6, (3, 3), (2, 2), (1, 1)), 2),
        "uneven": (17, Geometry(5, 9, 8, (3, 2), (3, 2), (2, 1), (2, 3)), 1),
        "pointwise": (40, Geometry(16, 4, 3), 2),
    }

    @pytest.fixture(autouse=True)
    def poisoned_memory(monkeypatch, request):
        with contextlib.nullcontext() if "real_size" in request.keywords else poisoned(monkeypatch):
            yield

    def run(case, estimator="identity", bias=True, mask_bias=False, tf32=False, **tiles):
        """Selection, output and gradients through the launchers."""
        selection, _, y, gradients = cases.run(case, estimator, bias, mask_bias, tf32, **tiles)
        return selection, y, gradients

    def check(case, tolerance, estimator="identity", bias=True, mask_bias=False, **rest):
        selection, y, gradients = run(case, estimator, bias, mask_bias, **rest)
        assert not checks.state.stats.duplicate_stores  # other programs' stores are the race check's
        cases.check(case, selection, y, gradients, tolerance, bias, mask_bias)
        return y, gradients

    # ------------------------------------------------------------------------------------------- bounds of masked lanes
    @triton.jit
    def copy(x, y, n, shift, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + shift + at, mask=at < n, other=0.0), mask=at < n)

    def test_a_masked_lane_outside_of_its_tensor_is_found():
        """Also where the address is that of a number of another argument."""
        both = torch.ones(64)
        x, y = both[:20], both[32:]
        with checks.options(masked=False):
            copy[(1,)](x, y, 20, 0, BLOCK=32)
        with pytest.raises(Exception, match=r"masked load of 12 .* 80 bytes from the start of 'x', which has 80 bytes"):
            copy[(1,)](x, y, 20, 0, BLOCK=32)
        with pytest.raises(Exception, match=r"OutOfBounds.*load of 20 element"):
            copy[(1,)](x, y, 20, 40, BLOCK=32)

    @triton.jit
    def combine(x, y, n, KIND: tl.constexpr):
        a = tl.load(x) + tl.arange(0, 4)
        tl.store(y + tl.arange(0, 4), (a + n) if KIND == 0 else (n - a) if KIND == 1 else (a * n))

    @pytest.mark.parametrize(
        ("name", "first", "second"), [("add", 2**31 - 4, 1), ("sub", 2**31 - 4, -2), ("mul", 2**29 - 3, 4)]
    )
    def test_an_overflow_of_32_bits_is_found(name, first, second):
        """In the last lane; one less in every lane is right."""
        kind = ["add", "sub", "mul"].index(name)
        x, y = torch.tensor([first], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        with pytest.raises(Exception, match=f"int32 overflow detected for operation {name}"):
            combine[(1,)](x, y, second, KIND=kind)
        x -= 1
        combine[(1,)](x, y, second, KIND=kind)
        lanes = x + torch.arange(4)
        assert torch.equal(y, [lanes + second, second - lanes, lanes * second][kind].int())

    # What of a layer reads with it; sizes that no tile divides.
    @pytest.mark.parametrize("name", ["threshold", "forward", "dgrad", "collect", "wgrad"])
    def test_kernels_without_the_clamp_are_found(monkeypatch, name):
        case = cases.make(17, Geometry(37), 9, 9)
        selection, packed = case.selection()

        def launch():
            if name == "threshold":
                return select_layer(case.weight, case.threshold, "identity")
            if name == "forward":
                return layer_forward(case.x, packed, selection, None, case.geometry)
            need_input = name == "dgrad"
            return layer_backward(
                case.grad, case.x, case.weight, packed, selection, None, case.geometry, need_input=need_input,
                need_weight=not need_input,
            )  # fmt: skip

        launch()
        module = importlib.import_module(f"spafl_kernels.gpu.triton.{name}")
        monkeypatch.setattr(module, "within", lambda index, live: index)
        with pytest.raises(Exception, match=r"OutOfBounds.*masked load"):
            launch()

    # ------------------------------------------------------------------------------------------- threshold pass
    @pytest.mark.parametrize(("dtype", "estimator"), [(SINGLE, "identity"), (HALF, "window"), (BRAIN, "window")])
    def test_pass_equals_the_closed_form(estimator, dtype):
        for seed, count in enumerate(cases.counts(37) if dtype == SINGLE else (0, 18, 37)):
            case = cases.make(37, Geometry(5, kernel=(3, 2), height=3, width=2), 1, count, 2, dtype, seed)
            orders = (torch.contiguous_format, torch.channels_last_3d)  # the second has to be copied: rows not dense
            weight = case.weight.to(memory_format=orders[seed % 2])
            if seed == 2:
                weight = weight.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
            with checks.options(order_seed=seed):
                selection, packed, scores = select_layer(weight, case.threshold, estimator)
            data, rows = closed_form.selection_and_packed(case.weight, case.threshold, estimator, dtype)
            assert torch.equal(selection.data, data)
            assert torch.equal(packed, rows)
            assert selection.count.tolist() == [count, count]
            torch.testing.assert_close(scores, case.weight.float().flatten(2).abs().mean(2), rtol=1e-2, atol=0)

    @pytest.mark.slow
    def test_pass_over_more_blocks_than_are_read_at_once():
        out = threshold_module.ROWS * (LANES + 2) + 3
        case = cases.make(out, Geometry(3), 1, out // 3)
        with checks.options(order_seed=3) as stats:
            selection, packed, _ = select_layer(case.weight, case.threshold, "identity")
        assert stats.programs > LANES
        data, rows = closed_form.selection_and_packed(case.weight, case.threshold, "identity", SINGLE)
        assert torch.equal(selection.data, data) and torch.equal(packed, rows)

    def test_ties_are_pruned():
        weight = torch.tensor([[0.5, -0.5, 0.5, -0.5], [0.5, 0.5, 0.5, 0.5], [0.25, 0.75, -0.5, 0.5]])
        selection, _, scores = select_layer(weight[None], torch.tensor([[0.5, 0.4999, 0.5]]), "identity")
        assert scores.tolist() == [[0.5, 0.5, 0.5]]
        assert selection.mask.tolist() == [[False, True, False]]

    def test_changed_tells_a_flip_and_only_a_flip():
        case = cases.make(20, Geometry(8), 1, 10)
        selection, _, _ = select_layer(case.weight, case.threshold, "identity")
        assert selection.changed.tolist() == [1]
        select_layer(case.weight, case.threshold, "identity", selection=selection)
        assert selection.changed.tolist() == [0]
        case.threshold[0, 3] = 1e6 if case.keep[0, 3] else -1e6
        select_layer(case.weight, case.threshold, "identity", selection=selection)
        assert selection.changed.tolist() == [1]

    @pytest.mark.slow  # a share: the compiled code of it, in test_compiled_code.py, and a trainer below
    @pytest.mark.parametrize("clients", [None, 2])
    def test_model_pass_is_one_launch_and_equals_the_pass_of_every_layer(clients):
        n = clients or 1
        layers = [
            cases.make(out, Geometry(c, kernel=k, height=k[0], width=k[1]), 1, count, n, seed=out)
            for out, c, k, count in ((5, 3, (3, 3), 0), (70, 16, (1, 1), 33), (33, 6, (2, 2), 33))
        ]
        weights = [c.weight if c.geometry.kernel != (1, 1) else c.weight[..., 0, 0] for c in layers]
        weights[2] = weights[2].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        thresholds = [c.threshold for c in layers]
        model = ModelPass(*([t if clients else t[0] for t in tensors] for tensors in (weights, thresholds)))

        def launch(seed):
            """Whatever the number of launches before: their words of counts take turns."""
            with checks.options(order_seed=seed, also=(*weights, *thresholds)) as stats:
                model()
            assert stats.programs == n * sum(-(-cap // threshold_module.ROWS) for cap in (16, 128, 64))
            for case, selection, packed in zip(layers, model.selections, model.packed, strict=True):
                data, rows = closed_form.selection_and_packed(case.weight, case.threshold, "identity", SINGLE)
                assert torch.equal(selection.data[:, 2 : 2 + 2 * selection.out], data[:, 2 : 2 + 2 * selection.out])
                assert torch.equal(selection.count, data[:, 0]) and torch.equal(
                    selection.mask, Selection(data, selection.out).mask
                )
                assert torch.equal(packed, rows)

        for seed in range(2):
            launch(seed)
            assert [p.changed.tolist() for p in model.selections] == [[int(seed == 0)] * n] * 3
        thresholds[1][-1] = 1e6
        launch(3)
        assert [p.changed.tolist() for p in model.selections] == [[0] * n, [0] * (n - 1) + [1], [0] * n]
        assert int(model.selections[1].count[-1]) == 0
        weights[0].mul_(2)  # in place: the next call sees it
        launch(4)

    @pytest.mark.parametrize(
        ("weight", "threshold", "message"),
        [
            (torch.ones(3, 4), torch.ones(4), r"\(\[clients,\] out\)"),
            (torch.ones(3), torch.ones(3), "not empty"),
            (torch.ones(3, 4).double(), torch.ones(3).double(), "float32, float16 or bfloat16"),
            (torch.ones(3, 4), torch.ones(3).half(), "threshold torch.float16"),
            (torch.ones(4, 3).t(), torch.ones(3), "rows of the weight must lie dense"),
        ],
    )
    def test_model_pass_refuses(weight, threshold, message):
        with pytest.raises(ValueError, match=message):
            ModelPass([weight], [threshold])

    def test_model_pass_refuses_mixed_cohorts():
        with pytest.raises(ValueError, match=r"same number of clients; got \[1, 2\]"):
            ModelPass([torch.ones(2, 3, 4), torch.ones(3, 4)], [torch.ones(2, 3), torch.ones(3)])

    # ------------------------------------------------------------------------------------------- layers
    @pytest.mark.parametrize("shape", SHAPES)
    def test_densities(shape):
        out, geometry, n = SHAPES[shape]
        every = shape == "linear"
        for seed, count in enumerate(cases.counts(out) if every else (0, out // 2, out)):
            with checks.options(order_seed=seed):
                check(cases.make(out, geometry, n, count, seed=seed), TOLERANCE[SINGLE])

    @pytest.mark.sweep
    @pytest.mark.parametrize("shape", ["linear", "strided"])
    @pytest.mark.parametrize("dtype", [HALF, BRAIN])
    def test_half_precision(shape, dtype):
        out, geometry, n = SHAPES[shape]
        check(cases.make(out, geometry, n, dtype=dtype), TOLERANCE[dtype], "window", mask_bias=True)
        mixed = cases.make(out, geometry, n, dtype=dtype, weight_dtype=SINGLE)
        y, gradients = check(mixed, TOLERANCE[dtype])
        assert y.dtype == gradients[0].dtype == dtype
        assert gradients[1].dtype == gradients[2].dtype == gradients[3].dtype == SINGLE

    def test_tf32_rounds_only_when_asked():
        out, geometry, n = SHAPES["pointwise"]
        case = cases.make(out, geometry, n)
        want = cases.expected_output(case, True, False)
        with checks.options(tf32=True):
            check(case, TF32, tf32=True)
            assert cases.error(run(case, tf32=True)[1], want) > 1e-5
            check(case, TOLERANCE[SINGLE], tf32=False)

    @pytest.mark.parametrize("estimator", ["identity", "window"])
    @pytest.mark.parametrize(("bias", "mask_bias"), [(False, False), (True, False), (True, True)])
    def test_estimators_and_bias(estimator, bias, mask_bias):
        out, geometry, n = SHAPES["first"]
        check(cases.make(out, geometry, n, 4), TOLERANCE[SINGLE], estimator, bias, mask_bias)

    @pytest.mark.parametrize("estimator", ["identity", pytest.param("window", marks=pytest.mark.slow)])
    @pytest.mark.parametrize(
        ("shape", "mask_bias", "what", "value"),
        [
            ("linear", True, "both", float("nan")),
            pytest.param("linear", True, "weight", float("nan"), marks=pytest.mark.slow),
            pytest.param("linear", True, "bias", float("nan"), marks=pytest.mark.slow),
            pytest.param("linear", True, "bias", float("inf"), marks=pytest.mark.slow),
            pytest.param("linear", False, "weight", float("nan"), marks=pytest.mark.slow),
            pytest.param("linear", False, "bias", -float("inf"), marks=pytest.mark.slow),
            pytest.param("pointwise", True, "weight", float("nan"), marks=pytest.mark.slow),
            pytest.param("first", True, "weight", float("nan"), marks=pytest.mark.slow),
        ],
    )
    def test_what_is_not_finite_in_a_pruned_filter_is_not_lost(shape, mask_bias, what, value, estimator):
        """The masked reference multiplies it by 0, which is NaN."""
        out, geometry, n = SHAPES[shape]
        case = cases.make(out, geometry, n, out // 2, clients=2)
        cases.spoil(case, what, value)
        selection, packed, y, gradients = cases.run(case, estimator, True, mask_bias, False)
        data, rows = closed_form.selection_and_packed(case.weight, case.threshold, estimator, SINGLE)
        assert torch.equal(selection.data, data) and torch.equal(selection.mask, case.keep)
        torch.testing.assert_close(packed, rows, rtol=0, atol=0, equal_nan=True)
        assert selection.count.tolist() == [out // 2 + (what != "bias")] * 2
        want = cases.definition(case, estimator, mask_bias)
        assert not want[0].isfinite().all() and (what == "bias" or want[1].isnan().any())
        by_operators = closed_form.backward(case.grad, case.x, case.weight, selection, case.bias, mask_bias, geometry)
        again = closed_form.forward(case.x, case.weight, selection, case.bias, mask_bias, geometry)
        for got in ((y, *gradients), (again, *by_operators)):
            for name, a, e in zip(("y", "dx", "dw", "dtau", "dbias"), got, want, strict=True):
                if name in ("y", "dx") and shape == "first":
                    # Whether the taps outside of a padded image are multiplied by 0 is the library's affair.
                    spoiled = e.isnan().any(4).any(3).any(1)
                    assert torch.equal(a.isnan().any(4).any(3).any(1), spoiled)
                    a, e = (t.transpose(1, 2)[~spoiled] for t in (a, e))
                torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)

    @pytest.mark.parametrize("shape", ["linear", "first", "pointwise"])
    def test_any_strides_are_read(shape):
        out, geometry, n = SHAPES[shape]
        case = cases.make(out, geometry, n)
        y, gradients = check(case, TOLERANCE[SINGLE])
        wide = torch.randn(1, n, geometry.height + 1, geometry.width + 2, geometry.channels + 3)
        inner = wide[:, :, 1:, 1:-1, 2:-1].permute(0, 1, 4, 2, 3)
        inner.copy_(case.x)
        sliced = dataclasses.replace(
            case,
            x=inner,
            weight=case.weight.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
            grad=case.grad.permute(0, 4, 3, 2, 1).contiguous().permute(0, 4, 3, 2, 1),
        )
        y2, gradients2 = check(sliced, TOLERANCE[SINGLE])
        assert torch.equal(y, y2)
        for a, b in zip(gradients, gradients2, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert gradients2[1].permute(0, 1, 3, 4, 2).is_contiguous()

    def test_expanded_gradient_of_a_sum():
        out, geometry, n = SHAPES["first"]
        case = cases.make(out, geometry, n, out)
        case.grad = torch.ones(()).expand(1, n, out, *geometry.output)
        check(case, TOLERANCE[SINGLE])

    @pytest.mark.parametrize("shape", ["linear", pytest.param("pointwise", marks=pytest.mark.slow)])
    def test_grouped_clients_equal_each_client_alone(shape):
        out, geometry, n = SHAPES[shape]
        case = cases.make(out, geometry, n, clients=3, seed=3)
        case.threshold[1] = 1e6  # the second client has nothing active
        case.keep[1] = False
        _, y, gradients = run(case)
        check(case, TOLERANCE[SINGLE])
        fields = ("x", "weight", "threshold", "bias", "grad", "keep")
        for i in range(3):
            alone = dataclasses.replace(case, **{f: getattr(case, f)[i : i + 1] for f in fields})
            _, y1, gradients1 = run(alone)
            assert torch.equal(y[i : i + 1], y1)
            for a, b in zip(gradients, gradients1, strict=True):
                torch.testing.assert_close(a[i : i + 1], b, rtol=1e-5, atol=1e-5)

    @pytest.mark.sweep
    @pytest.mark.parametrize("shape", ["linear", "uneven"])
    @pytest.mark.parametrize("estimator", ["identity", "window"])
    def test_executed_macs_are_those_of_the_definition(shape, estimator):
        """The rows of the weight gradient, which the device lists, included; then with a list of input channels."""
        out, geometry, n = SHAPES[shape]
        case = cases.make(out, geometry, n, out // 3, clients=2)
        counter, active = executed.Executed(), 2 * (out // 3)
        with counter.counting():
            selection, packed, _, _ = cases.run(case, estimator, True, False, False)
        pruned = ~case.keep & (case.grad != 0).transpose(1, 2).flatten(2).any(2)
        # Margins of pruned filters are .5 and 1.5: the window lets some of them pass.
        needed = pruned if estimator == "identity" else pruned & (selection.flags & 2).bool()
        assert 0 < needed.sum() <= pruned.sum() and (needed.sum() < pruned.sum()) == (estimator == "window")
        products = 2 * active + active + int(needed.sum())
        positions = n * geometry.output[0] * geometry.output[1]
        assert counter.total() == positions * geometry.n_in * products
        counter.reset()
        with counter.counting():
            closed_form.forward(case.x, case.weight, selection, case.bias, False, geometry)
            closed_form.backward(case.grad, case.x, case.weight, selection, case.bias, False, geometry)
        assert counter.total() == positions * geometry.n_in * products
        counter.reset()
        input_selection, _ = cases.make(geometry.channels, Geometry(4), 1, 2, 2, seed=7).selection()
        with counter.counting():
            layer_forward(case.x, packed, selection, case.bias, geometry, input_selection=input_selection)
            layer_backward(
                case.grad, case.x, case.weight, packed, selection, case.bias, geometry, input_selection=input_selection
            )
        assert counter.total() == positions * geometry.kernel[0] * geometry.kernel[1] * 2 * products

    def test_results_do_not_depend_on_the_order_of_programs():
        out, geometry, _n = SHAPES["strided"]
        case = cases.make(out, geometry, 20)  # enough rows for several blocks and slabs
        results = []
        for seed in (None, 1, 2):
            with checks.options(order_seed=seed):
                _, y, gradients = run(case)
            results.append((y, *gradients))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    @pytest.mark.slow
    def test_row_blocks_of_several_steps_and_many_parts(monkeypatch):
        """As large batches have them: sums of channels and slabs that are added up over programs, in turns."""
        monkeypatch.setattr(collect_module, "PROGRAMS", 6)
        monkeypatch.setattr(wgrad_module, "LEAST_STEPS", 1)
        monkeypatch.setattr(wgrad_module, "EXTEND_ROWS", 2)
        case = cases.make(40, Geometry(3, 12, 11), 9, 13, clients=2, seed=8)
        total = 9 * 12 * 11
        assert collect_module.row_blocks(total, 2) == (3, 13) and wgrad_module.split(total, 16, 1)[0] > 16
        with checks.options(order_seed=1):
            check(case, TOLERANCE[SINGLE])

    def test_empty_batch():
        geometry = Geometry(3, 5, 5, (3, 3))
        case = cases.make(4, geometry, 0)
        _, y, (dx, dw, dtau, dbias) = run(case)
        assert y.shape == (1, 0, 4, 3, 3) and dx.shape == case.x.shape
        assert not dw.any() and not dtau.any() and not dbias.any()

    @pytest.mark.parametrize("shape", ["linear", "strided"])
    def test_pruned_weights_are_not_read_after_the_mask_is_made(shape):
        """Proof that rows are skipped: NaN in them reaches nothing, where dL/dy of pruned filters is 0."""
        out, geometry, n = SHAPES[shape]
        case = cases.make(out, geometry, n, out // 3, dead_gradient=True)
        selection, packed, _ = select_layer(case.weight, case.threshold, "identity")
        want = cases.expected_gradients(case, selection, True, False)
        case.weight[~case.keep] = float("nan")
        y = layer_forward(case.x, packed, selection, case.bias, geometry)
        gradients = layer_backward(case.grad, case.x, case.weight, packed, selection, case.bias, geometry)
        assert y.isfinite().all()
        for got, expected in zip(gradients, want, strict=True):
            assert cases.error(got, expected) < TOLERANCE[SINGLE]
        assert not gradients[1][~case.keep].any() and not gradients[2][~case.keep].any()

    @pytest.mark.parametrize(("shape", "listed"), [("strided", 0), ("linear", 1), ("strided", 0.4), ("pointwise", 1.0)])
    def test_an_input_channel_list_is_the_layer_on_those_channels(shape, listed):
        """The list is the selection of the layer before; values of other channels (here NaN) are not even read."""
        out, geometry, n = SHAPES[shape]
        channels = geometry.channels
        case = cases.make(out, geometry, n, clients=2, seed=6)
        before = cases.make(
            channels, Geometry(4), 1, int(listed * channels) if isinstance(listed, float) else listed, 2, seed=7
        )
        input_selection, _ = before.selection()
        keep = before.keep[:, None, :, None, None]
        zeroed = dataclasses.replace(case, x=torch.where(keep, case.x, 0.0))
        case.x = torch.where(keep, case.x, float("nan"))
        selection, packed = case.selection()
        y = layer_forward(case.x, packed, selection, case.bias, geometry, input_selection=input_selection)
        assert cases.error(y, cases.expected_output(zeroed, True, False)) < TOLERANCE[SINGLE]
        got = layer_backward(
            case.grad, case.x, case.weight, packed, selection, case.bias, geometry, input_selection=input_selection
        )  # fmt: skip
        dx, *want = cases.expected_gradients(zeroed, selection, True, False)
        for a, b in zip(got, (torch.where(keep, dx, 0.0), *want), strict=True):
            assert cases.error(a, b) < TOLERANCE[SINGLE]
        assert not got[0][~keep.expand_as(got[0])].any()

    def test_work_follows_the_input_channel_list():
        geometry, n = Geometry(128), 16
        case = cases.make(64, geometry, n, 64)
        selection, packed = case.selection()
        work = {}
        for listed in (0, 32, 64, 128):
            input_selection, _ = cases.make(128, Geometry(4), 1, listed).selection()
            with checks.options() as stats:
                layer_forward(case.x, packed, selection, None, geometry, tf32=True, input_selection=input_selection)
                forward_work = stats.dot_flops
                layer_backward(
                    case.grad, case.x, case.weight, packed, selection, None, geometry, tf32=True,
                    input_selection=input_selection
                )  # fmt: skip
            work[listed] = forward_work, stats.dot_flops - forward_work
        assert work[0][0] == 0 and work[64][0] == 2 * work[32][0] and work[128][0] == 2 * work[64][0]
        assert work[128][1] == 2 * work[64][1]

    # ------------------------------------------------------------------------------------------- work
    def quantised(count, tile=64):
        """Filters that are multiplied: whole tiles, the last one cut to 16 or a double of it if that is enough."""
        whole, left = divmod(count, tile)
        return whole * tile + (0 if left == 0 else next(t for t in (16, 32, 64, 128, 256) if left <= t))

    @pytest.mark.parametrize(
        ("tile", "counts"), [(128, (0, 9, 33, 100, 129, 193, 320)), (256, (20, 64, 128, 129, 256, 257, 320))]
    )
    def test_the_last_of_wide_tiles_shrinks(tile, counts):
        """To all widths; and no row behind the packed ones is read, which are multiples of 64."""
        geometry, out, n = Geometry(16), 320, 16
        sizes = Tile(16, tile, 16, 8, 2)
        for count in counts:
            case = cases.make(out, geometry, n, count, dead_gradient=True, seed=count)
            selection, packed = case.selection()
            with checks.options() as stats:
                y = layer_forward(case.x, packed, selection, None, geometry, tf32=True, tile=sizes)
            assert stats.dot_flops == 2 * n * 16 * quantised(count, tile), count
            assert cases.error(y, cases.expected_output(case, False, False)) < TF32

    def test_wide_tiles_of_the_weight_gradient_read_no_row_behind_the_last():
        case = cases.make(150, Geometry(16), 16, 150)  # 192 rows: the second tile of 128 has 64
        selection, packed = case.selection()
        with checks.options() as stats:
            _, dw, _, _ = layer_backward(
                case.grad, case.x, case.weight, packed, selection, None, case.geometry, tf32=True, need_input=False,
                tile=Tile(16, 128, 16, 8, 2),
            )  # fmt: skip
        assert stats.dot_flops == 2 * 16 * 16 * (128 + 32)
        assert cases.error(dw, cases.expected_gradients(case, selection, False, False)[1]) < TF32

    def test_forward_work_is_proportional_to_the_active_filters():
        geometry, out, n = Geometry(32), 160, 64
        per_filter = 2 * n * geometry.channels
        seen = {}
        for count in (0, 1, 17, 80, 155, 160):
            case = cases.make(out, geometry, n, count)
            selection, packed = case.selection()
            with checks.options() as stats:
                layer_forward(case.x, packed, selection, None, geometry, tf32=True)
            seen[count] = stats.dot_flops
            assert stats.dot_flops == per_filter * quantised(count), count
        assert seen[80] == seen[160] // 2 and seen[0] == 0

    def test_backward_work_is_proportional_and_dead_rows_cost_nothing():
        geometry, out, n = Geometry(32), 64, 64
        work = {}
        for count in (0, 32, 64):
            for dead in (True, False):
                case = cases.make(out, geometry, n, count, dead_gradient=dead)
                selection, packed = case.selection()
                with checks.options() as stats:
                    layer_backward(case.grad, case.x, case.weight, packed, selection, None, geometry, tf32=True)
                work[count, dead] = stats.dot_flops
                needed = int((case.grad != 0).any(1).any(-1).any(-1).sum())
                listed = count if dead else needed
                per_filter = 2 * n * geometry.channels
                assert stats.dot_flops == per_filter * (count + quantised(listed))
        assert work[0, True] == 0 and work[32, True] == work[64, True] // 2
        assert work[32, False] > work[32, True]  # rows that are pruned and have a gradient are computed, and cost

    def test_strided_dgrad_visits_no_tap_in_vain():
        """Stride 2, kernel 3: 9 taps over 4 classes of positions, not 36."""
        geometry = Geometry(16, 8, 8, (3, 3), (2, 2), (1, 1))
        case = cases.make(16, geometry, 1, 16)
        selection, packed = case.selection()
        tile = dataclasses.replace(TILES["dgrad"]["tf32"][1][1], rows=16, depth=16)
        with checks.options() as stats:
            layer_backward(
                case.grad,
                case.x,
                case.weight,
                packed,
                selection,
                None,
                geometry,
                tf32=True,
                need_weight=False,
                tile=tile,
            )
        assert stats.dot_flops == 9 * 2 * 16 * 16 * 16

    # ------------------------------------------------------------------------------------------- tiles and sizes
    ALL_TILES = sorted(
        {(op, tile) for op, kinds in TILES.items() for kind in kinds for tile in every(op, kind)},
        key=lambda entry: (entry[0], dataclasses.astuple(entry[1])),
    )

    @pytest.mark.sweep
    @pytest.mark.parametrize(("operation", "tile"), ALL_TILES)
    def test_every_tile_of_the_tables(operation, tile):
        out, geometry, n = 70, Geometry(20, 4, 3, (2, 2)), 12
        case = cases.make(out, geometry, n, 45, seed=4)
        side = "forward" if operation == "forward" else "backward"
        selection, packed = case.selection()
        if side == "forward":
            y = layer_forward(case.x, packed, selection, None, geometry, tile=tile)
            assert cases.error(y, cases.expected_output(case, False, False)) < TOLERANCE[SINGLE]
            return
        dgrad = operation == "dgrad"
        got = layer_backward(
            case.grad,
            case.x,
            case.weight,
            packed,
            selection,
            None,
            geometry,
            tile=tile,
            need_input=dgrad,
            need_weight=not dgrad,
        )
        want = cases.expected_gradients(case, selection, False, False)
        for a, b in zip(got, want, strict=True):
            assert a is None or cases.error(a, b) < TOLERANCE[SINGLE]
        assert (got[0] is None) == (not dgrad) and (got[1] is None) == dgrad

    @pytest.mark.real_size
    def test_addresses_beyond_32_bits():
        """Some programs of a forward pass over 2.2e9 numbers; memory is never filled, only addresses are checked."""
        geometry, out, n = Geometry(64, 4, 4, (3, 3), (1, 1), (1, 1)), 64, 2_200_000
        data = torch.zeros(1, HEADER + 3 * out, dtype=torch.int32)
        selection = Selection(data, out)
        selection.count[0] = 40
        selection.index[0, :40] = torch.arange(40)
        selection.inverse[0] = torch.where(torch.arange(out) < 40, torch.arange(out), -1)
        packed = torch.zeros(1, 64, geometry.n_in, dtype=HALF)
        x = torch.empty(1, n, 4, 4, 64, dtype=HALF).permute(0, 1, 4, 2, 3)
        assert x.numel() > 2**31
        with checks.options(race=False, sample=3) as stats:
            y = layer_forward(x, packed, selection, None, geometry)
        assert stats.programs == 3 and y.numel() > 2**31

    @pytest.mark.parametrize("examples", [2, pytest.param(60, marks=pytest.mark.slow)])
    def test_random_shapes(examples):
        hypothesis = pytest.importorskip("hypothesis")
        st = hypothesis.strategies
        side = st.integers(1, 3)

        @hypothesis.settings(
            max_examples=examples,
            derandomize=True, deadline=None, database=None,
        )  # fmt: skip
        @hypothesis.given(
            out=st.integers(1, 20), share=st.floats(0, 1), channels=st.integers(1, 18), extra=st.tuples(side, side),
            kernel=st.tuples(side, side), stride=st.tuples(side, side), padding=st.tuples(side, side),
            dilation=st.tuples(side, side), n=st.integers(1, 3), seed=st.integers(0, 99),
        )  # fmt: skip
        def property_holds(out, share, channels, extra, kernel, stride, padding, dilation, n, seed):
            size = [d * (k - 1) + e for d, k, e in zip(dilation, kernel, extra, strict=True)]
            geometry = Geometry(channels, *size, kernel, stride, padding, dilation)
            with checks.options(order_seed=seed):
                check(cases.make(out, geometry, n, round(share * out), seed=seed), TOLERANCE[SINGLE])

        property_holds()

    # ------------------------------------------------------------------------------------------- the operators
    @pytest.mark.parametrize("linear", [True, False])
    def test_what_the_operators_run_on_cuda(linear):
        """The functions registered for CUDA, called on CPU tensors: the same results and strides as on the CPU."""
        out, geometry, n = SHAPES["linear" if linear else "strided"]
        case = cases.make(out, geometry, n, clients=2)
        x, w, dy = ((t[..., 0, 0] for t in (case.x, case.weight, case.grad)) if linear else
                    (case.x, case.weight, case.grad))  # fmt: skip
        steps = () if linear else (geometry.stride, geometry.padding, geometry.dilation)
        op = operators.threshold_linear if linear else operators.threshold_conv2d
        arguments = (x, w, case.threshold, case.bias, *steps, "identity", True)
        results = operators.CUDA[op](*arguments), op(*arguments)
        for a, b in zip(*results, strict=True):
            assert a.stride() == b.stride() and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        selection, packed = results[1][1:]
        op = operators.threshold_linear_backward if linear else operators.threshold_conv2d_backward
        for needs in ((True, True), (True, False), (False, True)):
            arguments = (dy, x, w, packed, selection, case.bias, *steps, True, *needs)
            for a, b in zip(operators.CUDA[op](*arguments), op(*arguments), strict=True):
                assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    @pytest.fixture
    def layers_as_on_cuda(monkeypatch):
        """Layers on CPU tensors go through the operators, as they do on a GPU."""
        from spafl_kernels import functional, ops

        monkeypatch.setattr(functional, "threshold_linear", ops.linear)
        monkeypatch.setattr(functional, "threshold_conv2d", ops.conv2d)

    def small(seed=0):
        """LeNet-5 in small, half of its filters pruned, for images of 8 by 8."""
        from benchmarks.gpu.steps import pruned
        from spafl_kernels import ThresholdConv2d, ThresholdLinear

        torch.manual_seed(seed)
        layers = [ThresholdConv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten()]
        layers += [ThresholdLinear(54, 20), torch.nn.ReLU(), ThresholdLinear(20, 10, bias=False)]
        return pruned(torch.nn.Sequential(*layers), 0.5, seed, "identity")

    def test_a_given_pass_is_the_one_that_counts(layers_as_on_cuda):
        from spafl_kernels import ThresholdLinear
        from spafl_kernels.threshold_layer import Selected

        layer = ThresholdLinear(5, 6)
        selection, packed, _ = select_layer(
            layer.weight.detach()[None], torch.tensor([[-1.0, 9, -1, 9, 9, 9]]), "identity"
        )
        layer.selected = Selected(selection.data[0], packed[0])
        y = layer(torch.randn(3, 5))
        assert (y - layer.bias != 0).any(0).tolist() == [True, False, True, False, False, False]
        y.sum().backward()
        assert (layer.weight.grad != 0).any(1).tolist() == [True] * 6  # identity: pruned filters learn by their sign
        for wrong, message in (
            (Selected(selection.data[0], packed[0].double()), "packed must have the dtype of input"),
            (Selected(selection.data[0, :-1], packed[0]), "selection and packed must have shapes"),
        ):
            layer.selected = wrong
            with pytest.raises(ValueError, match=message):
                layer(torch.randn(3, 5))

    @pytest.mark.parametrize("autocast", [False, True])
    def test_a_trainer_with_one_pass_for_all_layers(monkeypatch, layers_as_on_cuda, autocast):
        from benchmarks.gpu.steps import SETTINGS
        from spafl_kernels import shared_pass, threshold_layers, training

        trained, made = [], []
        stock = threshold_module.ModelPass.__call__
        monkeypatch.setattr(
            threshold_module.ModelPass, "__call__", lambda self: (made.append(self.packed[0].dtype), stock(self))[1]
        )
        x, y = torch.randn(3, 1, 8, 8), torch.arange(3)
        for share in (lambda layers: None, shared_pass.SharedPass):
            monkeypatch.setattr(training, "share", share)
            model = small()
            tensors = [t for _, layer in threshold_layers(model) for t in (layer.weight, layer.threshold)]
            trainer = training.MaskedTrainer(model)
            trainer.begin(SETTINGS["lenet5"].options)
            with checks.options(also=tensors), torch.autocast("cpu", enabled=autocast):
                for _ in range(2):
                    trainer.step(x, y)
                trainer.evaluate(x, y)
            assert all(layer.selected is None for _, layer in threshold_layers(model))
            trained.append((trainer.finish(), model.state_dict()))
        assert made == [BRAIN if autocast else SINGLE] * 3
        assert trained[0][0].densities == trained[1][0].densities
        torch.testing.assert_close(trained[1][1], trained[0][1], rtol=1e-5, atol=1e-6)

    def test_a_cohort_with_one_pass_for_all_layers(layers_as_on_cuda):
        from benchmarks.gpu.steps import SETTINGS, Cohort, Loop, changes, difference

        options = SETTINGS["lenet5"].options
        models = [small(seed) for seed in range(2)]
        x, y = torch.randn(2, 3, 1, 8, 8), torch.arange(6).view(2, 3)
        cohort = Cohort(models, options, False)
        assert cohort.passes is not None
        with checks.options(also=[*cohort.weights, *cohort.thresholds]):
            got = changes(models, cohort, x, y)
        assert difference(got, changes(models, Loop(models, options), x, y)) < 1e-4
        assert cohort.density.tolist() == [pytest.approx([0.5, 0.5], abs=0.03)] * len(cohort.layers)

    # ------------------------------------------------------------------------------------------- the benchmark
    @pytest.mark.parametrize("linear", [True, False])
    def test_the_gate_of_the_benchmark(monkeypatch, linear):
        """Every provider and mode of benchmarks/gpu runs, agrees, and a wrong result is seen."""
        from benchmarks.gpu import layers, shapes

        geometry = Geometry(12) if linear else Geometry(4, 6, 5, (3, 3), (1, 1), (1, 1))
        case = layers.Case(shapes.Layer("model", "layer", 10, geometry, 1, linear), 2, "fp32", 0.5, "cpu")
        assert case.gate() < 1e-5
        for mode in ("forward", "dgrad", "wgrad", "whole"):
            for a, b in zip(case.ours(mode), case.masked(mode), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b.view_as(a), rtol=1e-4, atol=1e-4)
            assert case.dense(mode) is not None and case.compact(mode) is not None
        stock = case.ours
        monkeypatch.setattr(case, "ours", lambda mode: (stock(mode)[0] + 1e-3, *stock(mode)[1:]))
        assert case.gate() > 1e-3

"""Every launch of the layers at real sizes, compiled for GPUs that are not here: it fits, no spills, no waiting.

Fake CUDA tensors go through the real launchers, so a hidden synchronisation raises. ``sass_sm90.json`` keeps what the
machine code of chosen layers looks like; ``SPAFL_UPDATE_SASS=1`` rewrites it. In the slow tier every tile of the rule,
every one that may be measured and every layer of the published models is compiled for every architecture.
"""

import collections
import functools
import itertools
import json
import math
import os
import pathlib

import pytest
from support.process import INTERPRETED, pytest_in_own_process

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.compile_only

if INTERPRETED:

    def test_kernels_compile():
        pytest_in_own_process(__file__, interpret=False)

else:
    import torch
    from support import compile_only
    from support.compile_only import TARGETS
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks.gpu.shapes import layers_of
    from spafl_kernels.gpu.geometry import Geometry
    from spafl_kernels.gpu.packing import Selection, capacity, selection_size
    from spafl_kernels.gpu.triton import ModelPass, layer_backward, layer_forward, select_layer
    from spafl_kernels.gpu.triton.tiles import CANDIDATES, TILES, candidates

    MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC"}
    # Bytes of stack. For sm_80 and sm_100 ptxas gives up one to four values of some tiles to save registers.
    STACK = {"sm_80": 16, "sm_90": 0, "sm_100": 16}
    SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
    RATCHET = pathlib.Path(__file__).with_name("sass_sm90.json")
    # name: out, geometry, images, clients, dtype, tf32
    LAYERS = {
        "conv4-conv2-bf16": (64, Geometry(64, 28, 28, (5, 5)), 128, 1, BRAIN, True),
        "conv4-conv2-tf32": (64, Geometry(64, 28, 28, (5, 5)), 128, 1, SINGLE, True),
        "resnet-stage3-fp16": (256, Geometry(128, 16, 16, (3, 3), (2, 2), (1, 1)), 128, 1, HALF, True),
        "lenet-fc3-10-clients-bf16": (500, Geometry(800), 64, 10, BRAIN, True),
        "conv4-conv1-bf16": (64, Geometry(3, 32, 32, (5, 5)), 128, 1, BRAIN, True),
        "lenet-conv2-fp32": (50, Geometry(20, 12, 12, (5, 5)), 16, 1, SINGLE, False),
    }

    def launches(
        target, out, geometry, n, clients, dtype, tf32, forward=None, backward=None, listed=False,
        how=compile_only.compiling,
    ):  # fmt: skip
        """All launches of selection, forward and backward of one layer."""
        with FakeTensorMode(), how(target) as log:
            fake = {"device": "cuda"}
            weight = torch.empty(clients, out, geometry.channels, *geometry.kernel, **fake)
            threshold = torch.empty(clients, out, **fake)
            x = torch.empty(clients, n, geometry.height, geometry.width, geometry.channels, dtype=dtype, **fake)
            x = x.permute(0, 1, 4, 2, 3)
            selection, packed, _ = select_layer(weight, threshold, "identity", dtype)
            channels = geometry.channels
            inputs = torch.empty(clients, selection_size(channels), dtype=torch.int32, **fake)
            inputs = Selection(inputs, channels) if listed else None
            y = layer_forward(x, packed, selection, None, geometry, tf32=tf32, tile=forward, input_selection=inputs)
            assert y.is_cuda and y.shape == (clients, n, out, *geometry.output)
            layer_backward(
                y, x, weight, packed, selection, None, geometry, tf32=tf32, tile=backward, input_selection=inputs
            )  # fmt: skip
        return log

    reports = {}

    def report(key, kernel):
        """What the machine code looks like; read once for layers that share it, as that takes longer than compiling."""
        return reports[key] if key in reports else reports.setdefault(key, compile_only.report(kernel))

    def check(log, target_name, dtype, tf32, kind=None):
        """Limits of the device, spills, and the matrix instruction of the products."""
        assert {launch.name for launch in log} - {"threshold_pack_columns"} == {
            "threshold_pass_layer", "threshold_forward", "threshold_collect", "threshold_dgrad", "threshold_extend",
            "threshold_wgrad", "threshold_finish",
        }  # fmt: skip
        rows = {}
        for launch in log:
            assert not launch.over_shared, (launch.name, launch.shared)
            assert not launch.bad_grid, (launch.name, launch.grid)
            row = report(launch.kernel.hash, launch.kernel)
            assert row["stack"] <= STACK[target_name] and row["local"] == 0, (launch.name, row)
            rows.setdefault(launch.name, row)
            if launch.name in ("threshold_forward", "threshold_dgrad", "threshold_wgrad"):
                if dtype is SINGLE and not tf32:
                    assert not row["matrix"], (launch.name, row["matrix"])
                else:
                    assert all((kind or MATRIX[target_name]) in name for name in row["matrix"]) and row["matrix"], row
        return rows

    # One layer per architecture per commit beside the ratchet: a compilation costs seconds.
    @pytest.mark.parametrize(
        ("target", "layer"),
        [("sm_80", "conv4-conv2-bf16"), ("sm_100", "resnet-stage3-fp16")]
        + [pytest.param(t, name, marks=pytest.mark.slow) for t in TARGETS for name in LAYERS],
    )
    def test_layers_fit_other_architectures(target, layer):
        out, geometry, n, clients, dtype, tf32 = LAYERS[layer]
        check(launches(TARGETS[target], out, geometry, n, clients, dtype, tf32), target, dtype, tf32)

    @pytest.mark.parametrize(
        "layer", [pytest.param(name, marks=[pytest.mark.slow] * (at > 1)) for at, name in enumerate(LAYERS)]
    )
    def test_machine_code_on_sm90_does_not_get_worse(layer):
        out, geometry, n, clients, dtype, tf32 = LAYERS[layer]
        rows = check(launches(TARGETS["sm_90"], out, geometry, n, clients, dtype, tf32), "sm_90", dtype, tf32)
        now = {
            name: {
                "matrix": row["matrix"], "regs": row["regs"], "shared": row["shared"], "loop": row["loop"],
                "wide_copies": row["loop_mix"].get("LDGSTS", 0), "loads_in_loop": row["loop_mix"].get("LDG", 0),
            }
            for name, row in rows.items()
        }  # fmt: skip
        kept = json.loads(RATCHET.read_text()) if RATCHET.exists() else {}
        if os.environ.get("SPAFL_UPDATE_SASS") == "1":
            kept = {**kept, "triton": triton.__version__, layer: now}
            RATCHET.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        if kept.get("triton") != triton.__version__:
            pytest.skip(f"{RATCHET.name} was made with triton {kept.get('triton')}; this is {triton.__version__}")
        for name, row in kept[layer].items():
            got = now[name]
            assert got["matrix"] == row["matrix"], name
            assert got["regs"] <= 1.1 * row["regs"], name
            assert got["shared"] <= row["shared"], name
            assert got["wide_copies"] >= row["wide_copies"] and got["loads_in_loop"] <= row["loads_in_loop"], name
            if row["loop"]:
                assert got["loop"] <= 1.1 * row["loop"], name

    @pytest.mark.slow
    @pytest.mark.parametrize("layer", [name for name, layer in LAYERS.items() if layer[1].channels >= 64])
    def test_input_channel_lists_fit(layer):
        out, geometry, n, clients, dtype, tf32 = LAYERS[layer]
        log = launches(TARGETS["sm_90"], out, geometry, n, clients, dtype, tf32, listed=True)
        check(log, "sm_90", dtype, tf32)

    def test_the_pass_of_a_whole_model_is_one_launch():
        tensors = [(64, 3, 5, 5), (64, 64, 5, 5), (128, 512), (10, 128)]
        with compile_only.compiling(TARGETS["sm_90"]) as log:  # a table of addresses needs real, small tensors
            model = ModelPass(
                [torch.empty(s) for s in tensors], [torch.empty(s[0]) for s in tensors], "identity", BRAIN
            )
            model()
        assert [launch.name for launch in log] == ["threshold_pass_model"]
        assert [launch.grid for launch in log] == [(sum(capacity(s[0]) for s in tensors) // 4,)]
        assert compile_only.resources(log[0].kernel)["stack"] == 0

    def test_launches_are_on_the_device_of_their_tensors(monkeypatch):
        """Which need not be the current one."""
        current, seen = [0], []

        class DeviceOf:
            def __init__(self, tensor):
                self.device = tensor.device.index

            def __enter__(self):
                current.append(self.device)

            def __exit__(self, *error):
                current.pop()

        monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(
            triton.runtime.jit.JITFunction, "run", lambda self, *a, **k: seen.append((self.__name__, current[-1]))
        )
        with FakeTensorMode(), torch.device("cuda:1"):
            weight, threshold, x = torch.empty(1, 8, 5), torch.empty(1, 8), torch.empty(1, 6, 5, 1, 1)
            selection, packed, _ = select_layer(weight, threshold, "identity")
            y = layer_forward(x=x, packed=packed, selection=selection, bias=None, geometry=Geometry(5))
            layer_backward(y, x, weight, packed, selection, None, Geometry(5))
        assert len(seen) == 8 and {device for _, device in seen} == {1}, seen
        ModelPass([torch.empty(8, 5)], [torch.empty(8)])()  # fake tensors have no addresses; those of the CPU no index
        assert seen[8:] == [("threshold_pass_model", None)]

    def test_sizes_of_one_compile():
        """Arguments equal to 1 become constants, which some expressions of Triton take and others refuse."""
        log = launches(TARGETS["sm_90"], 1, Geometry(1), 1, 1, SINGLE, True)
        check(log, "sm_90", SINGLE, True, kind="HMMA")  # the smallest tiles use the instruction of one warp

    @pytest.mark.parametrize("layer", LAYERS)
    def test_other_batch_sizes_compile_nothing_new(layer):
        """But for tiles, which the rule takes by the number of rows: of these sizes, one of 64 may want another."""
        out, geometry, _, _, dtype, tf32 = LAYERS[layer]
        seen = collections.defaultdict(set)
        for n in (64, 100, 127, 128, 130, 513):
            found = launches(
                TARGETS["sm_90"], out, geometry, n, 1, dtype, tf32, how=compile_only.specialising
            )  # fmt: skip
            for name, variants in found.items():
                seen[name] |= variants
        number = {name: len(variants) for name, variants in seen.items()}
        assert number.pop("threshold_collect") == 2  # active filters and the others
        tiles = [number.pop(name) for name in ("threshold_forward", "threshold_dgrad")]
        assert max(tiles) <= 2 and (max(tiles) == 1 or geometry.height < 28)
        assert set(number.values()) == {1}, number

    def test_grids_do_not_depend_on_anything_on_the_device():
        """The same launches whatever the mask: fake tensors have no values, and a read of one raises."""
        out, geometry, n, clients, dtype, tf32 = LAYERS["conv4-conv2-bf16"]
        log = launches(TARGETS["sm_90"], out, geometry, n, clients, dtype, tf32)
        grids = {launch.name: launch.grid for launch in log}
        positions = n * 24 * 24
        assert grids["threshold_forward"] == (-(-positions // 128), 1)
        with (
            pytest.raises(Exception, match=r"item|_local_scalar_dense|data-dependent|DataDependent|int\(|cuda"),
            FakeTensorMode(),
            compile_only.compiling(),
        ):
            selection, _, _ = select_layer(
                torch.empty(1, 4, 8, device="cuda"), torch.empty(1, 4, device="cuda"), "identity"
            )
            int(selection.count)

    # ------------------------------------------------------------------------------------------- sweeps
    # A compilation costs one to two seconds.
    STRIDED, LINEAR, FIRST = Geometry(128, 16, 16, (3, 3), (2, 2), (1, 1)), Geometry(800), Geometry(3, 32, 32, (5, 5))

    @pytest.mark.parametrize(
        ("target", "geometries"),
        [("sm_90", [STRIDED]), pytest.param("sm_90", [LINEAR, FIRST], marks=pytest.mark.slow)]
        + [pytest.param(t, [STRIDED, LINEAR, FIRST], marks=pytest.mark.slow) for t in ("sm_80", "sm_100")],
    )
    @pytest.mark.parametrize("operation", TILES)
    def test_every_tile_of_the_tables(target, operation, geometries):
        for kind, rows in TILES[operation].items():
            fits(target, operation, kind, {tile for _, tile in rows}, geometries)

    @pytest.mark.slow
    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("operation", CANDIDATES)
    def test_every_candidate(target, operation):
        geometries = [STRIDED, LINEAR, FIRST, Geometry(256, 56, 56, (1, 1), (2, 2))]
        geometries += [Geometry(64, 32, 32, (3, 3), (1, 1), (1, 1))]
        for kind, tiles in CANDIDATES[operation].items():
            fits(target, operation, kind, tiles, geometries)

    def fits(target, operation, kind, tiles, geometries):
        """A layer of 256 filters runs with the tiles on every geometry, without spills."""
        dtype = BRAIN if kind == "half" else SINGLE
        for tile, geometry in itertools.product(tiles, geometries):
            if tile in CANDIDATES[operation].get(kind, ()) and tile not in candidates(
                operation, kind, geometry, 256, 128
            ):
                continue  # not measured on such a layer
            side = {"forward" if operation == "forward" else "backward": tile}
            how = functools.partial(compile_only.compiling, only={f"threshold_{operation}"})
            (launch,) = launches(TARGETS[target], 256, geometry, 128, 1, dtype, kind == "tf32", **side, how=how)
            assert not launch.over_shared and not launch.bad_grid
            stack = compile_only.resources(launch.kernel)["stack"]
            assert stack <= STACK[target], (tile, kind, geometry, stack)

    @pytest.mark.slow
    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("name", ["lenet5", "conv4", "resnet18-full", "vit", "resnet50"])
    def test_every_layer_of_the_benchmark(target, name):
        """As the benchmark launches them, and in strict float32."""
        others = [] if name == "resnet50" else [(16, BRAIN, True), (128, SINGLE, True), (128, SINGLE, False)]
        for layer, (batch, dtype, tf32) in itertools.product(
            layers_of(name), [(64 if name == "resnet50" else 128, BRAIN, True), *others]
        ):
            n = batch * layer.rows
            # Small tiles, for few columns or few rows: the instruction of one warp.
            small = layer.geometry.n_in < 64 or n * math.prod(layer.geometry.output) <= 32
            kind = "MMA" if small else None
            log = launches(TARGETS[target], layer.out, layer.geometry, n, 1, dtype, tf32)
            check(log, target, dtype, tf32, kind)

"""Measured tile sizes: their tables, which tile a layer takes, and how they are measured. Every table is made up."""

import dataclasses
import itertools
import json

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import results, schedule, shapes
from benchmarks.gpu import tiles as tuning
from spafl_kernels.gpu import closed_form, tables
from spafl_kernels.gpu.geometry import Geometry
from spafl_kernels.gpu.packing import Selection, capacity
from spafl_kernels.gpu.tables import FOLDER, file_name
from spafl_kernels.gpu.tables import tiles as measured
from spafl_kernels.gpu.tables.tiles import Table, Tile
from spafl_kernels.gpu.triton.tiles import TILES, by_rule, candidates, choose, filters_of, rows_of

CONV = Geometry(64, 32, 32, (3, 3), (1, 1), (1, 1))
CLASS = "conv3x3/1 in64 out64 positions131072"
BEST = Tile(64, 32, 32, 4, 4, True)
CPU = torch.device("cpu")


def made_up(**change):
    return Table("made-up GPU", {"commit": "abc"}, {"forward": {"half": {CLASS: BEST}}, **change})


def chosen(images=128, operation="forward", kind="half", geometry=CONV, out=64, listed=False):
    return choose(operation, kind, geometry, out, images, CPU, listed)


@pytest.mark.parametrize("filters", [16, 32, 64, 128, 256])
def test_a_tile_never_reads_behind_the_packed_rows(filters):
    for out in range(1, 1100):
        cap = capacity(out)
        width = filters_of(dataclasses.replace(BEST, filters=filters), cap)
        assert width == filters or (width < filters and (cap < filters or cap % filters > filters // 2))
        left = out % width or width
        last = next(w for w in (16, 32, 64, 128, 256) if left <= w)
        assert out - left + last <= cap, (out, width)


def test_tiles_of_eight_warps_are_measured_on_layers_that_fill_them():
    for out, wide in ((64, set()), (128, {128}), (192, {128, 256}), (512, {128, 256})):
        geometry = dataclasses.replace(CONV, channels=64)
        assert {t.filters for t in candidates("forward", "half", geometry, out, 128) if t.warps == 8} == wide


# ------------------------------------------------------------------------------------------------ tables
def test_a_layer_takes_what_was_measured_near_it_and_else_follows_the_rule():
    rule = by_rule("forward", "half", 128 * 32 * 32)
    assert chosen() == rule
    with measured.SHELF.using(made_up()):
        assert [chosen(n) for n in (128, 255, 256, 511, 64, 32)] == [BEST] * 6  # positions by a factor of 4 at most
        assert chosen(1024) == chosen(31) == rule
        assert chosen(geometry=dataclasses.replace(CONV, channels=48), out=33) == BEST  # the same class
        for other in (
            {"geometry": dataclasses.replace(CONV, stride=(2, 2)), "images": 512}, {"out": 65}, {"listed": True},
            {"kind": "tf32"},
        ):  # fmt: skip
            assert chosen(**other) != BEST
        assert chosen(operation="dgrad") == by_rule("dgrad", "half", 128 * 32 * 32)


def test_the_nearest_measurement_counts():
    near = {CLASS: BEST, CLASS.replace("131072", "65536"): dataclasses.replace(BEST, stages=2)}
    with measured.SHELF.using(made_up(forward={"half": near})):
        assert [chosen(n).stages for n in (128, 64, 32, 16, 256, 512)] == [4, 2, 2, 2, 4, 4]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensors_elsewhere_than_on_a_gpu_follow_the_rule(device):
    assert measured.of(torch.device(device)) is None or torch.cuda.is_available()


def test_a_gpu_finds_its_file(tmp_path, monkeypatch):
    path = tmp_path / "made-up-gpu.tiles.json"
    assert path.name == file_name("made-up GPU", "tiles")
    path.write_text(json.dumps(measured.SHELF.contents(made_up())))
    assert measured.SHELF.load(path) == made_up()
    monkeypatch.setenv("SPAFL_TABLES", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ("another GPU", "made-up GPU")[i])
    measured.SHELF.forget()
    try:
        assert measured.of(torch.device("cuda")) is None
        assert measured.of(torch.device("cuda", 1)) == made_up()
    finally:
        measured.SHELF.forget()


GOOD = dataclasses.asdict(BEST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format must be 1; got 2"),
        ({"device": 3}, "it needs a device and entries"),
        ({"entries": {"pass": {}}}, "an operation must be one of forward, dgrad, wgrad; got 'pass'"),
        ({"entries": {"dgrad": {"bf16": {}}}}, "an arithmetic must be one of half, tf32, ieee; got 'bf16'"),
        (
            {"entries": {"dgrad": {"half": {CLASS: {"rows": 64}}}}},
            "dgrad, half, .*: a tile needs rows, filters, depth, warps, stages, cache_l1; got",
        ),
        ({"entries": {"dgrad": {"half": {CLASS: {**GOOD, "rows": 48}}}}}, "rows must be a power of two in .*; got 48"),
        ({"entries": {"dgrad": {"half": {CLASS: {**GOOD, "warps": 16}}}}}, "warps must be .* in .4, 8.; got 16"),
        ({"entries": {"dgrad": {"half": {CLASS: {**GOOD, "stages": 0}}}}}, "stages must be in .1, 8.; got 0"),
        ({"entries": {"dgrad": {"half": {CLASS: {**GOOD, "depth": True}}}}}, "depth must be .*; got True"),
        ({"entries": {"dgrad": {"half": {CLASS: {**GOOD, "cache_l1": 1}}}}}, "cache_l1 must be true or false; got 1"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**measured.SHELF.contents(made_up()), **change}))
    with pytest.raises(ValueError, match=rf"gpu\.json is not a table of measured tiles: .*{message}"):
        measured.SHELF.load(path)


def test_nothing_ships_that_nobody_measured():
    for path in FOLDER.glob("*.tiles.json"):
        table = measured.SHELF.load(path)
        assert path.name == file_name(table.device, "tiles")
        assert {"commit", "torch", "triton", "time"} <= table.made.keys()


# ------------------------------------------------------------------------------------------------ candidates
@pytest.mark.parametrize(("operation", "kind"), list(itertools.product(TILES, ("half", "tf32", "ieee"))))
def test_candidates_begin_with_the_rule_and_differ(operation, kind):
    for geometry, out, images in ((CONV, 64, 128), (Geometry(12), 10, 4), (CONV, 500, 1)):
        found = candidates(operation, kind, geometry, out, images)
        assert found[0] == by_rule(operation, kind, rows_of(operation, geometry, images))
        columns = max(16, geometry.channels if operation == "dgrad" else out)
        clipped = [dataclasses.replace(t, filters=min(t.filters, columns)) for t in found]
        assert len(set(clipped)) == len(clipped)


def test_rows_of_operations():
    strided = Geometry(8, 7, 5, (3, 3), (2, 2), (1, 1))  # output 4x3, classes of at most 4x3 positions
    assert [rows_of(op, strided, 10) for op in ("forward", "dgrad", "wgrad")] == [120, 120, 72]
    wide = Geometry(8, 7, 5, (3, 3))  # output 5x3
    assert [rows_of(op, wide, 10) for op in ("forward", "dgrad", "wgrad")] == [150, 350, 72]


def test_the_words_of_a_tile_tell_it_from_all_others():
    assert all(tuning.name_of(tile) == name for name, tile in tuning.KNOWN.items())
    assert tuning.name_of(BEST) == "64x32x32 4 warps 4 stages L1"


# ------------------------------------------------------------------------------------------------ measuring
class Kernels:
    """The launchers in plain PyTorch; ``wrong`` tiles give a wrong output, and ``broken`` ones raise."""

    def __init__(self, wrong=(), broken=()):
        self.wrong, self.broken, self.asked = wrong, broken, []

    def select_layer(self, weight, threshold, estimator):
        self.weight = weight
        data, packed = closed_form.selection_and_packed(weight, threshold, estimator, weight.dtype)
        return Selection(data, weight.shape[1]), packed, None

    def _ask(self, tile):
        self.asked.append(tile)
        if tile in self.broken:
            raise RuntimeError("out of resources: shared memory")
        return 1.5 if tile in self.wrong else 1.0

    def layer_forward(self, x, packed, selection, bias, g, tf32, tile):
        return self._ask(tile) * closed_form.forward(x, self.weight, selection, bias, False, g)

    def layer_backward(self, grad, x, weight, packed, selection, bias, g, tf32, need_input, need_weight, tile):
        dx, dw, dtau, _ = closed_form.backward(grad, x, weight, selection, bias, False, g)
        factor = self._ask(tile)
        return factor * dx if need_input else None, *((factor * dw, dtau) if need_weight else (None, None)), None


class Device:
    """Times by tile: the one that was asked last."""

    where, name = "cpu", "made-up GPU"

    def __init__(self, kernels, us):
        self.kernels, self.us = kernels, us

    def settle(self):
        pass

    def times(self, call, graph):
        call()
        return [float(self.us(self.kernels.asked[-1]))] * 5


LAYER = shapes.Layer("model", "conv", 40, Geometry(64, 6, 5, (3, 3), (1, 1), (1, 1)), 1, False)
FACTS = {"gpu": "made-up GPU", "torch": "2", "triton": "3", "cuda": "13", "commit": "abc", "time": "now"}


def rows_of_layer(us, layer=LAYER, operations=("forward", "dgrad", "wgrad"), **kernels):
    """Rows as a CSV has them."""
    launchers = Kernels(**kernels)
    rows = tuning.tile_rows(Device(launchers, us), layer, 4, "tf32", (0.5, 0.25), operations, launchers)
    return [dict.fromkeys(results.COLUMNS, "") | {k: str(v) for k, v in row.items()} | FACTS for row in rows]


def entry(rows, operation="forward"):
    (table,) = tuning.make(rows)
    ((shape, tile),) = table.entries[operation]["tf32"].items()
    assert shape == "conv3x3/1 in64 out64 positions64" and table.made["commit"] == "abc"
    return tile


def test_the_fastest_tile_of_every_operation_is_kept():
    fastest = {op: candidates(op, "tf32", LAYER.geometry, 40, 4)[-1] for op in TILES}
    rows = rows_of_layer(lambda tile: 50 if tile in fastest.values() else 100)
    assert {r["kind"] for r in rows} == {"tile"} and {r["gate"] for r in rows} == {"pass"}
    assert len(rows) == 2 * sum(len(candidates(op, "tf32", LAYER.geometry, 40, 4)) for op in TILES)
    for operation, tile in fastest.items():
        assert entry(rows, operation) == tile


def test_a_gain_within_the_noise_keeps_the_rule():
    rule, *others = candidates("forward", "tf32", LAYER.geometry, 40, 4)
    assert entry(rows_of_layer(lambda tile: 99 if tile == others[0] else 100, operations=("forward",))) == rule
    assert entry(rows_of_layer(lambda tile: 97 if tile == others[0] else 100, operations=("forward",))) == others[0]


def test_a_tile_that_is_wrong_or_does_not_fit_is_never_kept():
    rule, wrong, broken, *others = candidates("forward", "tf32", LAYER.geometry, 40, 4)
    times = {rule: 100, wrong: 1, broken: 1, others[0]: 80}
    rows = rows_of_layer(lambda t: times.get(t, 200), operations=("forward",), wrong=[wrong], broken=[broken])
    gates = {r["provider"]: (r["gate"], r["us"], r["error"]) for r in rows}
    assert gates[tuning.name_of(wrong)][0].startswith("fail") and not gates[tuning.name_of(wrong)][1]
    assert gates[tuning.name_of(broken)] == ("fail", "", "RuntimeError: out of resources: shared memory")
    assert entry(rows) == others[0]
    # Without a time of the rule's tile there is nothing to compare with.
    assert not tuning.make(rows_of_layer(lambda t: 100, operations=("forward",), wrong=[rule]))


def test_a_tile_must_win_over_all_layers_of_a_class():
    """Half the time on one layer and four times on another is a loss."""
    rule, other = candidates("forward", "tf32", LAYER.geometry, 40, 4)[:2]
    twin = dataclasses.replace(LAYER, name="twin", out=36)
    rows = [
        *rows_of_layer(lambda t: 50 if t == other else 100, operations=("forward",)),
        *rows_of_layer(lambda t: 400 if t == other else 100, layer=twin, operations=("forward",)),
    ]
    assert entry(rows) == rule


def test_a_tile_of_another_version_is_refused():
    (row, *_) = rows_of_layer(lambda t: 100, operations=("forward",))
    with pytest.raises(ValueError, match="the tile '1x1x1' is not one that this version knows"):
        tuning.make([{**row, "provider": "1x1x1"}])


def test_only_the_newest_run_of_a_layer_counts():
    rule, first, second = candidates("forward", "tf32", LAYER.geometry, 40, 4)[:3]
    old = rows_of_layer(lambda t: 10 if t == first else 100, operations=("forward",))
    new = rows_of_layer(lambda t: 80 if t == second else 100, operations=("forward",))
    gone = [{**r, "provider": "1x1x1"} if r["provider"] == tuning.name_of(rule) else r for r in old]
    assert entry([*gone, *({**r, "time": "later"} for r in new)]) == second


def test_compiling_goes_on_after_a_tile_that_fails(monkeypatch):
    kernels = Kernels(broken=[candidates("forward", "tf32", LAYER.geometry, 40, 4)[1]])
    with pytest.raises(RuntimeError, match=r"forward .*: RuntimeError: out of resources"):
        tuning.warm(LAYER, 4, "tf32", ("forward",), "cpu", kernels)
    assert kernels.asked == candidates("forward", "tf32", LAYER.geometry, 40, 4)


def test_the_schedule_of_tiles_covers_every_layer_of_the_benchmark():
    ours = shapes.MODEL_NAMES
    for dtype, batch, models in (("bf16", 128, ours), ("tf32", 128, ours), ("bf16", 64, ("resnet50",))):
        jobs = [j for j in schedule.jobs(schedule.TUNING) if j.part.dtype == dtype and j.batch == batch]
        for model in models:
            assert {j.layer for j in jobs if j.model == model} == set(shapes.layers_of(model))
        assert all(j.part.operations == ("forward", "dgrad", "wgrad") for j in jobs)


def test_the_command_measures_and_writes_tables(tmp_path, monkeypatch, capsys):
    """Device, layers and launchers are stand-ins; the rest is the command as it is."""
    kernels, stock = Kernels(), tuning.Case
    fast = candidates("forward", "tf32", LAYER.geometry, 40, 4)[1]
    monkeypatch.setattr(tuning, "Case", lambda *a: stock(*a[:-1], kernels))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "Cuda", lambda: Device(kernels, lambda t: 50 if t == fast else 100))
    monkeypatch.setattr(schedule, "layers_of", lambda name: [LAYER])
    part = schedule.Pass("tile", ("conv4",), 4, "tf32", (0.5,), ("forward",))
    monkeypatch.setattr(schedule, "TUNING", (part,))
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    path = tmp_path / "gpu.csv"
    assert command.main(["--tune", "--workers", "1", "--out", str(path)]) == 0
    assert "red: 0" in capsys.readouterr().out
    assert command.main(["--tables", "--out", str(path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "made-up-gpu.tiles.json")]
    found = measured.SHELF.load(tmp_path / "made-up-gpu.tiles.json").entries["forward"]["tf32"]
    assert found == {"conv3x3/1 in64 out64 positions64": fast}

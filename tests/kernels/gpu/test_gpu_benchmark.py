"""What of ``benchmarks.gpu`` needs no GPU: everything but the times."""

import contextlib
import csv
import itertools
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import captured, choices, clock, layers, results, roofline, schedule, shapes, steps, targets
from benchmarks.gpu.report.device import Closed
from spafl_kernels.gpu import cuda_ops, tables
from spafl_kernels.gpu.geometry import Geometry
from spafl_kernels.gpu.tables import classes, tiles
from spafl_kernels.gpu.tables.choices import SHELF

H200 = roofline.MACHINES["H200"]


class Cpu:
    """A device whose calls run once and take as long as it is told."""

    where, name = "cpu", "made-up GPU"

    def __init__(self, *us):
        self.us, self.ran = itertools.cycle(us or (100.0,)), 0

    def settle(self):
        pass

    def times(self, call, graph):
        call()
        self.ran += 1
        us = next(self.us)
        return [us - 2, us - 1, us, us + 1, us + 2]


CONV = shapes.Layer("model", "conv", 8, Geometry(4, 6, 5, (3, 3), (1, 1), (1, 1)), 1, False)
LINEAR = shapes.Layer("model", "fc", 10, Geometry(12), 1, True)


# ------------------------------------------------------------------------------------------------ shapes, arithmetic
# Ceilings of output skipping at densities .5, .25, .1 and batch 128, worked out by hand from 790 TFLOP/s and 4.3 TB/s.
@pytest.mark.parametrize(
    ("out", "geometry", "ceilings"),
    [
        (64, Geometry(64, 28, 28, (5, 5)), (2.0, 3.7, 3.7)),
        (64, Geometry(64, 32, 32, (3, 3), (1, 1), (1, 1)), (1.57, 1.57, 1.57)),
        (512, Geometry(512, 4, 4, (3, 3), (1, 1), (1, 1)), (2.0, 4.0, 10.0)),
    ],
)
def test_ceilings(out, geometry, ceilings):
    layer = shapes.Layer("model", "layer", out, geometry, 1, False)
    for density, ceiling in zip((0.5, 0.25, 0.1), ceilings, strict=True):
        for mode in ("forward", "whole"):
            assert roofline.ceiling(H200, layer, 128, "bf16", mode, density) == pytest.approx(ceiling, rel=0.02)


def test_a_floor_by_hand():
    """1024 rows, 256 -> 512: 268 MFLOP, 1.8 MB in bf16; a slow machine is bound by either, as its constants say."""
    layer = shapes.Layer("model", "fc", 512, Geometry(256), 1, True)
    flop, moved = 2 * 1024 * 256 * 512, 2 * (1024 * 256 + 1024 * 512 + 256 * 512)
    computes = roofline.Machine({"bf16": 1e9}, 1e15, "slow to compute")
    assert roofline.floor_us(computes, layer, 1024, "bf16", "forward", 1.0) == pytest.approx(flop / 1e9 * 1e6)
    moves = roofline.Machine({"bf16": 1e18}, 1e9, "slow to move")
    assert roofline.floor_us(moves, layer, 1024, "bf16", "whole", 1.0) == pytest.approx(3 * moved / 1e9 * 1e6)
    narrow = 2 * (1024 * 256 + 1024 * 256 + 128 * 512)
    assert roofline.floor_us(moves, layer, 1024, "bf16", "dgrad", 0.5, compact=True) == pytest.approx(narrow / 1e3)


def test_constants_follow_the_name_of_the_device():
    assert roofline.machine("NVIDIA H200") is H200
    assert roofline.machine("NVIDIA H100 80GB HBM3").bandwidth == 3.0e12
    assert roofline.machine("Some other GPU") is None


def test_every_layer_of_the_models_is_listed():
    found = {name: shapes.layers_of(name) for name in shapes.MODEL_NAMES}
    assert {name: len(listed) for name, listed in found.items()} == {
        "conv4": 7, "resnet18-full": 11, "lenet5": 4, "vit": 4,
    }  # fmt: skip
    assert found["lenet5"][1].shape == "5x5 20->50 @12x12 s1"
    assert found["vit"][0].rows == 65 and found["vit"][0].shape == "128->1536"


def test_resnet50_is_resnet50():
    """Its published size: 25,557,032 parameters, 53,120 of them BatchNorm's and 1000 biases; 4.09 billion MACs."""
    found = shapes.layers_of("resnet50")
    assert len(found) == len({(l.out, l.geometry) for l in found}) == 24
    assert sum(l.repeats for l in found) == 54
    assert sum(l.repeats * l.out * l.geometry.n_in for l in found) == 25_557_032 - 53_120 - 1000
    macs = sum(l.repeats * l.out * l.geometry.n_in * l.geometry.output[0] * l.geometry.output[1] for l in found)
    assert macs == pytest.approx(4.09e9, rel=1e-3)
    for layer in found:  # every output is some other layer's input
        assert layer.name == "fc" or layer.geometry.output[0] in (112, 56, 28, 14, 7)


def test_tile_density_is_what_the_tiles_multiply():
    assert [roofline.tile_density(c, 64, 64) for c in (0, 1, 16, 17, 33, 64)] == [0, 0.25, 0.25, 0.5, 1, 1]
    assert roofline.tile_density(70, 128, 64) == (64 + 16) / 128
    assert roofline.tile_density(33, 64, 32) == (32 + 16) / 64
    assert [roofline.tile_density(c, 320, 256) for c in (1, 129, 257, 320)] == [16 / 320, 256 / 320, 272 / 320, 1]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_tile_density_is_that_of_the_tile_in_use(dtype):
    """33 of 128 filters: in tiles of 64 all of one, in tiles of 32 one and the least of the next."""
    layer = shapes.Layer("model", "fc", 128, Geometry(12), 1, True)
    case = layers.Case(layer, 64, dtype, 33 / 128, "cpu", Closed())
    filters, kind = {"bf16": (64, "half"), "fp32": (32, "ieee")}[dtype]
    assert case.tile_filters() == filters
    rows = list(layers.layer_rows(Cpu(), H200, layer, 64, dtype, (33 / 128,), ("forward",), (False,), Closed()))
    assert rows[-1]["tile_density"] == {"bf16": 0.5, "fp32": 0.375}[dtype]
    wide = {"forward": {kind: {layers.class_of(layer, 64): tiles.Tile(64, 128, 64, 4, 3)}}}
    with tiles.SHELF.using(tiles.Table("made-up GPU", {}, wide)):
        assert case.tile_filters() == 128


# ------------------------------------------------------------------------------------------------ one layer
@pytest.mark.parametrize("layer", [CONV, LINEAR], ids=lambda l: l.name)
def test_rows_of_a_layer(layer):
    device = Cpu()
    rows = list(layers.layer_rows(device, H200, layer, 2, "fp32", (0.5,), layers.MODES, (False, True), Closed()))
    # Density 1: five providers, in mode module four and eagerly five; density .5: two, in mode module one and two.
    assert len(rows) == (2 * 4 * 5 + 4 + 5) + (2 * 4 * 2 + 1 + 2) == device.ran
    assert {(row["mode"], row["graph"]) for row in rows if row["provider"] == "narrow"} == {("module", 0)}
    assert all(row.keys() <= set(results.COLUMNS) for row in rows)
    assert all(row["us"] == 100.0 and row["speedup_vs_dense"] == 1.0 for row in rows)
    assert {row["gate"] for row in rows if row["provider"] in layers.GATED} == {"pass"}
    for row in rows:
        n = 2 * layer.geometry.output[0] * layer.geometry.output[1]
        assert row["shape_class"].endswith(f"positions{classes.power_down(n)}")
        floor = roofline.floor_us(
            H200, layer, 2, "fp32", row["mode"], row["count"] / layer.out, row["provider"] == "compact"
        )
        assert row["floor_us"] == pytest.approx(floor, abs=1e-3)
        assert row["share_of_floor"] == pytest.approx(row["floor_us"] / 100.0, abs=1e-4)


def test_speed_up_is_over_dense_in_the_same_way():
    device = Cpu(80.0, 40.0, 20.0, 160.0, 80.0, 10.0)  # dense, ours, compact, masked, again; then ours at .5, ...
    rows = list(layers.layer_rows(device, None, CONV, 2, "fp32", (0.5,), ("whole",), (True,), Closed()))
    found = {(row["provider"], row["density"]): row["speedup_vs_dense"] for row in rows}
    assert found == {
        ("dense", 1.0): 1.0, ("ours", 1.0): 2.0, ("compact", 1.0): 4.0, ("masked", 1.0): 0.5, ("dense-again", 1.0): 1.0,
        ("ours", 0.5): 8.0, ("compact", 0.5): 1.0,
    }  # fmt: skip
    assert not any(row.keys() & {"floor_us", "ceiling", "share_of_floor"} for row in rows)  # an unknown machine


def test_a_wrong_narrow_layer_has_no_time(monkeypatch):
    stock = layers.Case.module
    monkeypatch.setattr(
        layers.Case, "module", lambda self, p: tuple(t + (p == "narrow") * 1e-2 for t in stock(self, p))
    )
    rows = list(layers.layer_rows(Cpu(), H200, CONV, 2, "fp32", (0.5,), ("module",), (False,), Closed()))
    assert all(("us" in row) == (row["provider"] not in layers.GATED) for row in rows)


@pytest.mark.parametrize("wrong", ["layer_forward", "layer_backward"])
def test_no_time_for_a_wrong_result(monkeypatch, wrong):
    kernels = Closed()
    stock = getattr(kernels, wrong)

    def off(*a, **k):
        result = stock(*a, **k)
        return result + 1e-3 if wrong == "layer_forward" else tuple(r if r is None else r + 1e-3 for r in result)

    monkeypatch.setattr(kernels, wrong, off)
    rows = list(layers.layer_rows(Cpu(), H200, CONV, 2, "fp32", (0.5,), ("whole",), (False,), kernels))
    for row in rows:
        assert ("us" in row) == (row["provider"] != "ours")
        assert row["gate"].startswith("fail") == (row["provider"] == "ours")


def test_a_sum_that_cancels_is_measured_by_what_is_added_up():
    case = layers.Case(CONV, 2, "tf32", 0.1, "cpu", Closed())
    y, dx, dw, dtau = case.exact
    case.exact = y, dx, dw, torch.where(dtau != 0, 1e-9, 0.0)  # as if it had cancelled
    unit = layers.ROUNDING["tf32"] * case.added_up[3]
    gate = layers.GATE["tf32"]
    assert case.error((y, dx, dw, case.exact[3] + unit / 2)) == pytest.approx(gate / 2, rel=1e-3)
    assert case.error((y, dx, dw, case.exact[3] + 3 * unit)) == pytest.approx(3 * gate, rel=1e-3)
    # What does not cancel is measured by itself, and a wrong result is far above one rounding.
    assert case.error((y, dx, dw * (1 + gate / 2), case.exact[3])) == pytest.approx(gate / 2, rel=1e-3)
    assert case.error((y, dx, dw, dtau)) > 10 * gate
    assert case.error((y, dx, -dw, case.exact[3])) > 10 * gate


def test_a_pruned_output_that_is_not_zero_fails(monkeypatch):
    kernels = Closed()
    stock = kernels.layer_forward
    monkeypatch.setattr(kernels, "layer_forward", lambda *a, **k: stock(*a, **k) + 1e-9)
    case = layers.Case(CONV, 2, "fp32", 0.5, "cpu", kernels)
    assert case.gate() == float("inf")


def test_a_provider_that_raises_costs_only_its_own_row(monkeypatch):
    device, stock = Cpu(), Cpu.times

    def times(self, call, graph):
        if self.ran == 0:
            self.ran += 1
            raise RuntimeError("CUDA error: out of patience\nmore")
        return stock(self, call, graph)

    monkeypatch.setattr(Cpu, "times", times)
    rows = list(layers.layer_rows(device, H200, CONV, 2, "fp32", (1.0,), ("whole",), (False,), Closed()))
    assert rows[0]["provider"] == "dense" and rows[0]["error"] == "RuntimeError: CUDA error: out of patience"
    assert len(rows) == 5 and all("us" in row and "speedup_vs_dense" not in row for row in rows[1:])


# ------------------------------------------------------------------------------------------------ whole steps
@pytest.mark.parametrize("name", ["lenet5", "conv4"])
def test_a_cohort_trains_as_its_clients_one_by_one(name):
    """Three steps in float64: every parameter, momentum included, and the statistics of BatchNorm."""
    options = steps.SETTINGS[name].options
    models = [steps.pruned_model(name, 0.5, seed, "cpu", torch.float64) for seed in range(3)]
    x, y = steps.batches(name, 3, 2, "cpu", torch.float64)
    loop, cohort = steps.Loop(models, options), steps.Cohort(models, options, fused=False)
    for _ in range(3):
        torch.testing.assert_close(cohort.step(x, y), loop.step(x, y), rtol=1e-10, atol=1e-10)
    for i, model in enumerate(loop.models):
        for n, p in model.named_parameters():
            torch.testing.assert_close(cohort.params[n][i], p.detach(), rtol=1e-9, atol=1e-11)
        for n, b in model.named_buffers():
            torch.testing.assert_close(cohort.buffers[n][i], b, rtol=1e-9, atol=1e-11)


def test_the_collapse_guard_of_a_cohort():
    models = [steps.pruned_model("lenet5", 0.5, seed, "cpu", torch.float64) for seed in range(2)]
    with torch.no_grad():
        models[1].fc3.threshold.fill_(5.0)  # one layer of one client is pruned whole
    x, y = steps.batches("lenet5", 2, 2, "cpu", torch.float64)
    options = steps.SETTINGS["lenet5"].options
    loop, cohort = steps.Loop(models, options), steps.Cohort(models, options, fused=False)
    for _ in range(3):
        loop.step(x, y), cohort.step(x, y)
    assert cohort.params["fc3.threshold"][1].abs().max() < 0.1
    assert cohort.params["fc3.threshold"][0].abs().max() > 0
    for i, model in enumerate(loop.models):
        torch.testing.assert_close(cohort.params["fc3.threshold"][i], model.fc3.threshold.detach())


def test_rows_of_a_cohort(monkeypatch):
    monkeypatch.setattr(cuda_ops, "available", lambda: False)
    rows = list(steps.cohort_rows(Cpu(400.0, 100.0), "lenet5", 2, 2, "fp64", (1.0, 0.5), (False,)))
    assert [(r["provider"], r["density"], r["gate"].split()[0], r["speedup_vs_dense"]) for r in rows] == [
        (p, density, "pass", speedup)
        for density in (1.0, 0.5)
        for p, speedup in (("loop", 1.0), ("cohort-torch", 4.0), ("compact-graph", 1.0), ("compact-streams", 4.0))
    ]  # fmt: skip
    assert all(r["clients"] == 2 and r.keys() <= set(results.COLUMNS) for r in rows)


def test_a_cohort_that_trains_wrongly_has_no_time(monkeypatch):
    stock = steps.Cohort._update
    monkeypatch.setattr(steps.Cohort, "_update", lambda self, g: stock(self, {n: 1.001 * v for n, v in g.items()}))
    rows = list(steps.cohort_rows(Cpu(), "lenet5", 2, 2, "fp64", (0.5,), (False,)))
    assert rows[0]["us"] == 100.0 and "us" not in rows[1] and rows[1]["gate"].startswith("fail")


def test_captured_steps_that_train_wrongly_have_no_time(monkeypatch):
    stock = captured.CapturedCompact.step
    monkeypatch.setattr(captured.CapturedCompact, "step", lambda self, x, y: stock(self, 1.001 * x, y))
    rows = [
        *steps.cohort_rows(Cpu(), "lenet5", 2, 2, "fp64", (0.5,), (False,)),
        *steps.model_rows(Cpu(), "lenet5", 2, "fp64", (1.0,), (False,)),
    ]
    red = {r["provider"] for r in rows if str(r["gate"]).startswith("fail") and "us" not in r}
    assert red == {"compact-graph", "compact-streams", "compact-fixed"}


def test_rows_of_a_model():
    rows = list(steps.model_rows(Cpu(), "lenet5", 2, "fp64", (0.5,), (False, True)))
    assert [(r["provider"], r["density"], r["graph"]) for r in rows] == [
        *((p, 1.0, g) for p in ("dense", "masked", "ours") for g in (0, 1)), ("compact", 1.0, 0),
        *(("compact-fixed", 1.0, g) for g in (0, 1)),
        *((p, 0.5, g) for p in ("masked", "ours") for g in (0, 1)), ("compact", 0.5, 0),
        *(("compact-fixed", 0.5, g) for g in (0, 1)),
    ]  # fmt: skip
    assert all(r["gate"].split()[0] == ("-" if r["provider"] == "dense" else "pass") and "us" in r for r in rows)


def test_a_difference_is_seen_in_every_parameter():
    want = {"a": torch.ones(4), "tiny": torch.full((2,), 1e-9)}
    assert steps.difference(want, want) == 0.0
    assert steps.difference({**want, "a": want["a"] * 1.1}, want) == pytest.approx(0.1, rel=1e-3)
    # A parameter that hardly moves is measured against the typical change, a NaN against nothing.
    assert steps.difference({**want, "tiny": want["tiny"] * 2}, want) < 1e-8
    assert steps.difference({**want, "tiny": want["tiny"] * float("nan")}, want) == float("inf")


# ------------------------------------------------------------------------------------------------ schedule and rows
SMALL = (
    schedule.Pass("layer", ("lenet5",), 2, "fp32", (0.5,), ("whole",), (False,), seconds=20),
    schedule.Pass("layer", ("lenet5",), 3, "fp32", (0.5,), ("whole",), (False,), seconds=1000),
)


class Watch:
    """A clock that a job moves on."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


@pytest.fixture
def ten_seconds_each(monkeypatch):
    """Every job writes two rows and takes ten seconds."""
    watch = Watch()

    def rows(job, device, machine, kernels=None):
        for provider in ("dense", "ours"):
            watch.time += 5
            yield {"kind": "layer", "layer": job.layer.name, "batch": job.batch, "provider": provider, "gate": "-",
                   "mode": "whole", "density": 0.5, "graph": 0}  # fmt: skip

    monkeypatch.setattr(schedule.Job, "rows", rows)
    return watch


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_keeps_to_its_time_and_to_that_of_each_pass(tmp_path, ten_seconds_each):
    work, said = schedule.jobs(SMALL), []
    assert [(j.batch, j.layer.name) for j in work[::4]] == [(2, "conv1"), (3, "conv1")] and len(work) == 8
    with results.Recorder(tmp_path / "gpu.csv", {"gpu": "made-up"}) as recorder:
        outcome = schedule.run(work, Cpu(), None, recorder, 46, now=ten_seconds_each, say=said.append)
    # Two jobs of the first pass (20 s), three of the second (until 46 s have gone).
    done = [(r["batch"], r["layer"]) for r in rows_of(tmp_path / "gpu.csv")][::2]
    assert done == [("2", "conv1"), ("2", "conv2"), ("3", "conv1"), ("3", "conv2"), ("3", "fc3")]
    assert outcome.rows == 10 and not outcome.red and len(outcome.left_out) == 3 and len(said) == 5


def test_a_job_without_end_is_given_up(tmp_path, ten_seconds_each):
    with results.Recorder(tmp_path / "gpu.csv", {}) as recorder:
        outcome = schedule.run(schedule.jobs(SMALL), Cpu(), None, recorder, 4, now=ten_seconds_each, say=len)
    assert outcome.rows == 1 and outcome.left_out[0].endswith("(the rest of it)") and len(outcome.left_out) == 8


def test_a_run_stopped_by_hand_keeps_its_rows(tmp_path, monkeypatch, ten_seconds_each):
    stock, path = schedule.Job.rows, tmp_path / "gpu.csv"

    def rows(job, *a):
        yield from itertools.islice(stock(job, *a), 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(schedule.Job, "rows", rows)
    with pytest.raises(KeyboardInterrupt), results.Recorder(path, {"gpu": "made-up"}) as recorder:
        schedule.run(schedule.jobs(SMALL), Cpu(), None, recorder, 100, now=ten_seconds_each, say=len)
    assert [(r["provider"], r["gpu"]) for r in rows_of(path)] == [("dense", "made-up")]


def test_a_broken_job_is_red_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    real = schedule.Job.rows

    def rows(job, *a):
        if job.layer.name == "conv1":
            raise RuntimeError("no such kernel")
        return real(job, *a)

    monkeypatch.setattr(schedule.Job, "rows", rows)
    with results.Recorder(tmp_path / "gpu.csv", {}) as recorder:
        outcome = schedule.run(schedule.jobs(SMALL[:1]), Cpu(), H200, recorder, 100, Closed(), say=len)
    assert [label.split()[1] for label in outcome.red] == ["conv1"] and outcome.rows == 3 * 7
    assert "RuntimeError: no such kernel" in capsys.readouterr().err


def test_the_schedule_covers_what_is_asked():
    cells = {
        (p.kind, model, p.batch, mode, graph, density)
        for p in schedule.SCHEDULE if p.dtype == "bf16" or p.kind != "layer"
        for model, mode, graph, density in itertools.product(p.models, p.modes, p.graphs, p.densities)
    }  # fmt: skip
    for batch, models in ((128, shapes.MODEL_NAMES), (16, shapes.MODEL_NAMES), (64, ("resnet50",))):
        for model, mode, graph, density in itertools.product(models, layers.MODES, (False, True), schedule.ALL):
            assert ("layer", model, batch, mode, graph, density) in cells
    assert {m for kind, m, *_ in cells if kind == "cohort"} == {"lenet5", "conv4"}
    assert {m for kind, m, *_ in cells if kind == "step"} == set(shapes.MODEL_NAMES)
    assert [j.batch for j in schedule.jobs(schedule.SCHEDULE) if j.part.kind == "cohort"] == [64, 16]
    assert {j.model for j in schedule.jobs(schedule.SCHEDULE, ["vit"])} == {"vit"}


def test_a_file_of_another_version_is_not_touched(tmp_path):
    path = tmp_path / "gpu.csv"
    path.write_text("model,us\nconv4,1\n")
    with pytest.raises(ValueError, match="has the columns of another version"):
        results.Recorder(path, {})
    with pytest.raises(ValueError, match="is not a result of this benchmark"):
        results.read([path])
    assert path.read_text() == "model,us\nconv4,1\n"


def test_a_second_run_appends(tmp_path):
    path = tmp_path / "gpu.csv"
    for us in (1, 2):
        with results.Recorder(path, {"gpu": "made-up"}) as recorder:
            recorder.add([{"kind": "layer", "us": us}])
    rows = results.read([path])
    assert [r["us"] for r in rows] == ["1", "2"] and [r["us"] for r in results.latest(rows)] == ["2"]


# ------------------------------------------------------------------------------------------------ tables, pictures
def sample(us, layer="conv1", provider="ours", density=1.0, gate="-", mode="module", shape="class a", graph=1):
    """A made-up row, as it comes out of the CSV."""
    row = dict.fromkeys(results.COLUMNS, "")
    row |= {
        "kind": "layer", "model": "conv4", "layer": layer, "shape": "5x5", "shape_class": shape, "clients": "1",
        "batch": "128", "dtype": "bf16", "density": str(density), "mode": mode, "provider": provider,
        "graph": str(graph), "us": str(us), "us_p20": str(us - 1), "us_p80": str(us + 1), "gate": gate,
        "speedup_vs_dense": str(100 / us), "ceiling": "3", "one_over_density": str(1 / density),
        "gpu": "made-up GPU", "commit": "abc", "torch": "2", "triton": "3", "time": "now",
    }  # fmt: skip
    return row


def measured(layer, dense, masked, ours, **rest):
    """Rows of one layer: ``ours`` by density."""
    return [
        sample(dense, layer, "dense", **rest),
        sample(masked, layer, "masked", **rest),
        *(sample(us, layer, density=d, gate="pass", **rest) for d, us in ours.items()),
    ]


def test_a_table_takes_the_kernels_only_where_they_win_on_every_layer():
    rows = [
        *measured("conv1", 100, 105, {1.0: 120, 0.5: 80, 0.25: 40}),
        *measured("conv2", 100, 105, {1.0: 120, 0.5: 104, 0.25: 50}),  # within the spread of masked dense at .5
        *measured("conv3", 100, 105, {1.0: 50, 0.5: 40, 0.25: 200}, shape="class b"),  # loses at the lowest density
    ]
    (table,) = choices.make(rows)
    assert table.device == "made-up GPU" and table.made["commit"] == "abc"
    assert table.entries["class a"]["bf16"]["graph"] == {1.0: "reference", 0.5: "reference", 0.25: "triton"}
    assert table.entries["class b"]["bf16"]["graph"] == dict.fromkeys((1.0, 0.5, 0.25), "reference")
    assert table.look_up("class a", "bf16", "graph", 0.2)[0] == "triton"
    # Masked dense is the best there is on these layers, yet 5 % slower than a plain dense layer: said, not hidden.
    missed = choices.misses(rows, table)
    assert len(missed) == 7 and all("1.05 times as long as plain dense" in m for m in missed)
    assert not choices.misses(measured("conv1", 100, 102, {1.0: 120}), table)


def test_of_two_safe_choices_a_table_takes_the_faster_one():
    rows = [
        *measured("conv1", 100, 105, {0.5: 80, 0.25: 60}),
        *(sample(us, "conv1", "narrow", d, "pass") for d, us in ((0.5, 90), (0.25, 50))),
        *measured("conv2", 100, 105, {0.5: 80, 0.25: 60}, shape="class b"),
        *(sample(us, "conv2", "narrow", d, "pass", shape="class b") for d, us in ((0.5, 50), (0.25, 110))),
    ]
    for row in rows:
        row["graph"] = "0"
    (table,) = choices.make(rows)
    assert table.entries["class a"]["bf16"]["eager"] == {0.5: "triton", 0.25: "narrow"}
    # Slower at the lower density: what is below .5 could be there.
    assert table.entries["class b"]["bf16"]["eager"] == {0.5: "triton", 0.25: "triton"}
    assert not choices.misses(rows, table)


def test_a_red_gate_or_another_mode_gives_no_table():
    rows = [*measured("conv1", 100, 105, {0.5: 10}, mode="whole"), sample(10, gate="fail 1e-1", density=0.5)]
    with pytest.raises(ValueError, match="no layer has the times of both"):
        choices.make(rows)


@pytest.mark.slow
def test_tables_and_pictures_from_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "gpu.csv"
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "tables")
    for flag in ("--tables", "--plots"):
        with pytest.raises(SystemExit):
            command.main([flag, "--out", str(path)])
        assert "nothing was measured yet" in capsys.readouterr().err
    with results.Recorder(path, {}) as recorder:
        recorder.add(measured("conv1", 100, 105, {1.0: 120, 0.5: 50}))
        recorder.add({**sample(5e4, provider=p), "kind": "cohort", "clients": "10"} for p in ("loop", "cohort"))
    assert command.main(["--tables", "--plots", "--out", str(path)]) == 0
    table = SHELF.load(tmp_path / "tables" / "made-up-gpu.choices.json")
    assert table.look_up("class a", "bf16", "graph", 0.5)[0] == "triton"
    drawn = {p.name for p in (tmp_path / "gpu").iterdir()}
    assert drawn == {"cohort.png", "layers-module-bf16-batch128-graph.png"}
    assert command.main(["--targets", "--out", str(path)]) == 0
    assert "above 3 %: conv4.conv1 batch 128 bf16 graph at density 1: reference takes 1.05" in capsys.readouterr().out


def test_targets_are_met_missed_or_not_measured():
    assert {str(v).split()[0] for v in targets.judge([])} == {"not"}

    def whole(layer, us, density, ceiling):
        return {**sample(us, layer, density=density, mode="whole"), "ceiling": str(ceiling)}

    def cohort(us, provider, graph):
        return {**sample(us, "all", provider, 0.5, graph=graph), "kind": "cohort", "clients": "10", "batch": "64"}

    def step(model, density, factor):
        row = {**sample(10, "all", "compact-fixed", density), "kind": "step", "model": model}
        return {**row, "speedup_vs_dense": str(factor)}

    rows = [
        whole("a", 40, 0.5, 2.0),  # 2.5 times as fast as dense; asked for: 1.8, and .75 * 2
        whole("b", 100 / 1.7, 0.5, 2.0),  # 1.7: 1.5 is reached, 1.8 is not
        whole("c", 100 / 1.2, 0.25, 1.57),  # the ceiling forbids 3; 1.18 is reached
        whole("d", 50, 0.25, 4.0),  # 2 where 3 is asked for, by the ceiling too
        whole("e", 500, 1.0, 1.0),  # density 1 is no target
        cohort(3100, "loop", 0),
        cohort(290, "loop", 1),
        cohort(100, "cohort", 1),
        cohort(120, "cohort-torch", 1),
        *(step("resnet18-full", d, f) for d, f in ((0.5, 1.9), (0.25, 2.5))),
        step("conv4", 0.5, 1.1),
        step("conv4", 1.0, 0.5),  # density 1 is no target
        step("vit", 0.5, 0.5),  # nor is this model
    ]  # fmt: skip
    found = [str(v) for v in targets.judge(rows)]
    assert found[0] == (
        "missed        layers reach 75% of the roofline ceiling, bf16, batch 128 (3 of 4): conv4.d at 0.25 2.00 < 3.00"
    )
    assert found[1].endswith("at density 0.5, bf16, batch 128 (1 of 2): conv4.b at 0.5 1.70 < 1.80")
    assert found[2].endswith("at density 0.25, bf16, batch 128 (0 of 1): conv4.d at 0.25 2.00 < 3.00")
    assert [v.split()[0] for v in found] == ["missed"] * 3 + ["not"] * 3 + ["missed"] * 2 + ["met", "missed"]
    assert found[6].endswith("at density 0.5, batch 128 (1 of 2): conv4 at 0.5 1.10 < 1.80")
    assert found[7].endswith("at density 0.25, batch 128 (0 of 1): resnet18-full at 0.25 2.50 < 3.00")
    assert found[-1].endswith("the masked loop, in a graph (0 of 1): conv4 at 0.5 2.90 < 3.00")


def test_a_picture_shows_both_bounds_and_marks_a_loss():
    pytest.importorskip("matplotlib")
    from benchmarks.gpu import plots

    rows = [
        *measured("conv1", 100, 105, {1.0: 90, 0.5: 50, 0.1: 20}),
        *measured("conv2", 100, 105, {1.0: 120, 0.5: 80}),
    ]
    figure = plots.layers(rows, "bf16", "128", "1", "module")
    win, loss = figure.axes[:2]
    assert win.get_title().startswith("conv4 conv1") and win.title.get_color() == "black"
    assert loss.title.get_color() == "#CC0000"
    lines = {line.get_label(): line for line in win.get_lines()}
    assert list(lines["1 / density"].get_ydata()) == [10, 2, 1]
    assert list(lines["ours"].get_xdata()) == [0.1, 0.5, 1.0]
    assert list(lines["ours"].get_ydata()) == pytest.approx([5, 2, 100 / 90])
    assert list(lines["roofline ceiling"].get_ydata()) == [3, 3, 3]
    assert plots.layers(rows, "bf16", "128", "0", "module") is None


def test_a_provider_has_the_colour_of_the_legend_in_every_panel():
    pytest.importorskip("matplotlib")
    from benchmarks.gpu import plots

    measured_in = {"0": ("dense", "masked", "compact", "compact-fixed"), "1": ("masked", "compact-fixed")}
    rows = [{**sample(10, "all", p, 0.5, graph=g), "kind": "step"} for g, found in measured_in.items() for p in found]
    figure = plots.steps(rows, "step")
    (legend,) = figure.legends
    colours = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert len(set(colours.values())) == len(colours) == 4
    drawn = [(line.get_label(), line.get_color()) for axis in figure.axes for line in axis.get_lines()]
    assert len(drawn) == 6 and all(colours[label] == colour for label, colour in drawn)


# ------------------------------------------------------------------------------------------------ the command
@pytest.fixture
def pretended_gpu(monkeypatch):
    """The command believes in a GPU, which is the CPU; it measures steps of one small model."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "Cuda", Cpu)
    monkeypatch.setattr(schedule, "SCHEDULE", (schedule.Pass("step", ("lenet5",), 2, "tf32", (0.5,)),))


def test_the_whole_command(tmp_path, pretended_gpu, capsys):
    path = tmp_path / "gpu.csv"
    assert command.main(["--workers", "1", "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert "7 rows in" in said and "red: 0" in said and said.count("not measured") == 10
    rows = rows_of(path)
    assert len(rows) == 7 and {r["gpu"] for r in rows} == {"made-up GPU"}
    assert all(r["commit"] and r["torch"] == torch.__version__ and r["time"] for r in rows)
    assert {r["roofline"] for r in rows} == {"unknown device: no floors"}


def test_a_red_run_says_so_and_fails(tmp_path, pretended_gpu, monkeypatch, capsys):
    monkeypatch.setattr(steps, "differs_most", lambda got, want: (1.0, "conv1.weight"))
    assert command.main(["--workers", "1", "--out", str(tmp_path / "gpu.csv")]) == 1
    said = capsys.readouterr().out
    assert "RED" in said and "red: 1" in said
    assert [r["provider"] for r in rows_of(tmp_path / "gpu.csv") if r["us"]] == ["dense"]


def test_workers_compile_their_share_and_survive_a_failure(pretended_gpu, monkeypatch, capsys):
    parts = (
        schedule.Pass("step", ("lenet5",), 2, "tf32"),
        schedule.Pass("cohort", ("lenet5",), 2, "tf32"),
        schedule.Pass("cohort", ("lenet5",), 2, "tf32", (0.1,)),  # the same kernels once more
        schedule.Pass("step", ("vit",), 2, "tf32"),
    )
    warmed, stock = [], steps.warm

    def warm(kind, name, batch, device):
        warmed.append((kind, name))
        if name == "vit":
            raise RuntimeError("too large a tile")
        stock(kind, name, batch, device)

    monkeypatch.setattr(steps, "warm", warm)
    work = schedule.jobs(parts)
    command.warm(work, "0/2")
    assert warmed == [("step", "lenet5"), ("step", "vit")]
    assert "RuntimeError: too large a tile" in capsys.readouterr().err
    command.warm(work, "1/2")
    assert warmed[2:] == [("cohort", "lenet5")]


def test_workers_that_take_too_long_are_stopped(monkeypatch):
    started = []

    def start(arguments, stock=subprocess.Popen):
        assert arguments[1:] == ["-m", "benchmarks.gpu", "--models", "vit", "--warm", f"{len(started)}/2"]
        started.append(stock([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    monkeypatch.setattr(command.subprocess, "Popen", start)
    command.warm_in_parallel(["--models", "vit"], 2, 0.2)
    assert [process.returncode for process in started] == [-9, -9]


# ------------------------------------------------------------------------------------------------ the clock
class Events:
    """``torch.cuda`` as far as the clock uses it; every call takes the time it is told, on a clock of its own."""

    def __init__(self, monkeypatch):
        outer = self
        self.now, self.captured, self.capturing = 0.0, [], False

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = outer.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                outer.now += 0.5 + sum(outer.captured)  # milliseconds: a launch, and the work

        class Stream:
            def wait_stream(self, other):
                pass

        @contextlib.contextmanager
        def graph(captured):
            outer.capturing, outer.captured = True, []
            yield
            outer.capturing = False

        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "Stream": Stream, "graph": graph, "synchronize": lambda: None,
            "current_stream": Stream, "stream": lambda _: contextlib.nullcontext(), "get_device_name": lambda: "x",
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, ms):
        def work():
            if self.capturing:
                self.captured.append(ms)
            else:
                self.now += ms

        return work


def test_an_eager_call_is_timed_per_call(monkeypatch):
    events = Events(monkeypatch)
    assert clock.Cuda(repeats=3).times(events.call(0.02), graph=False) == pytest.approx([20.0] * 3)


def test_a_graph_holds_several_calls_and_is_timed_per_call(monkeypatch):
    events = Events(monkeypatch)
    times = clock.Cuda(repeats=3).times(events.call(0.02), graph=True)
    # 15 calls of 0.02 ms are the 0.3 ms that a graph is to hold; the launch is shared by them.
    assert len(events.captured) == 15 and times == pytest.approx([20.0 + 500.0 / 15] * 3)
    clock.Cuda(repeats=1).times(events.call(5.0), graph=True)
    assert len(events.captured) == 1


def test_arithmetic_can_be_set_where_plain_assignment_is_forbidden():
    code = (
        "import torch, torch.testing._internal.common_utils\n"
        "from benchmarks.gpu.clock import tf32\n"
        "from spafl_kernels.gpu import choice\n"
        "for allowed in (True, False):\n"
        "    with tf32(allowed, benchmark=True):\n"
        "        assert choice.tf32(False) is allowed and choice.tf32(True) is allowed\n"
        "        assert torch.backends.cudnn.benchmark\n"
        "        with tf32(not allowed):\n"
        "            assert choice.tf32(True) is not allowed and torch.backends.cudnn.benchmark\n"
        "        assert choice.tf32(False) is allowed and choice.tf32(True) is allowed\n"
        "assert not torch.backends.cudnn.benchmark and not torch.backends.cuda.matmul.allow_tf32\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_percentiles_and_errors_of_a_measurement():
    class Scripted(Cpu):
        def times(self, call, graph):
            call()
            return [10.0, 11.0, 12.0, 13.0, 100.0]

    row = clock.measure(Scripted(), lambda: None, graph=False)
    assert row["us"] == 12.0 and row["us_p20"] == pytest.approx(10.8) and row["us_p80"] == pytest.approx(30.4)

    def broken():
        raise ValueError("x" * 500)

    assert clock.measure(Scripted(), broken, graph=False)["error"] == ("ValueError: " + "x" * 500)[:160]


def test_rounding_of_the_masked_loop_widens_the_gate_but_not_without_limit():
    gate = steps.GATE["tf32"]
    assert steps._bound(0.0, gate) == steps._bound(0.4 * gate, gate) == gate
    assert steps._bound(0.9 * gate, gate) == pytest.approx(1.8 * gate)
    assert steps._bound(5 * gate, gate) == steps._bound(float("inf"), gate) == gate


# ------------------------------------------------------------------------------------------------ on a GPU
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_benchmark_itself_on_a_gpu(tmp_path):
    """Every kind of job, every mode, eager and in a graph, on small batches: nothing red, every row with a time.

    Of one model: its kernels are compiled one after the other, a second each.
    """
    parts = (
        schedule.Pass("cohort", ("lenet5",), 2, "tf32", (0.5,), graphs=schedule.BOTH),
        schedule.Pass("step", ("lenet5",), 2, "tf32", (0.5,), graphs=schedule.BOTH),
        schedule.Pass("layer", ("lenet5",), 4, "bf16", (0.5,), layers.MODES, schedule.BOTH),
    )
    path = tmp_path / "gpu.csv"
    with clock.tf32(True):
        device = clock.Cuda(repeats=2, slice_ms=0.1)
        with results.Recorder(path, {"gpu": device.name}) as recorder:
            outcome = schedule.run(schedule.jobs(parts), device, H200, recorder, 200)
    rows = rows_of(path)
    assert not outcome.red and not outcome.left_out, [r for r in rows if r["error"] or r["gate"].startswith("fail")]
    assert all(float(r["us"]) > 0 for r in rows)
    assert choices.make(rows)[0].device == device.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_refuses_without_a_gpu():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "measures a CUDA GPU" in done.stderr

"""The benchmarks run, keep what they measure, and report no speed for a result that is wrong. No figure is judged."""

import csv
import dataclasses
import functools
import importlib
import math
import platform
import shutil
import socket
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import __main__ as registry
from benchmarks import (
    against,
    breakdown,
    cases,
    commit,
    common,
    federated,
    generalisation,
    inference,
    leakage,
    memory,
    native_cpu,
    readme,
    rivals,
    training_step,
    workers,
    zoo,
)
from benchmarks.gpu import results
from spafl_kernels import ops, to_dense
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.cpu import skip

# Benchmark: a column that says how fast, or how small, ours is.
FIGURE = {
    "training_step": "speedup",
    "rebuild": "rebuild_ms",
    "estimators": "price",
    "memory": "of_masked",
    "inference": "speedup",
    "federated": "vs_published",
    "workers": "speedup",
    "simulator": "overhead_ms",
    "native_cpu": "ratio",
    "encodings": "accuracy",
    "layer": "speed_up",
    "scale": "round_ratio",
    "checkpoint": "cpu_share",
    "leakage": "distance",
    "client": "peak_mb",
    "zoo": "speedup",
    "rivals": "dense",
    "generalisation": "gap",
}


class Faster(CompactTrainer):
    """Learns half as much again as it was told to."""

    def begin(self, options, momentum=None, densities=None):
        super().begin(dataclasses.replace(options, lr=1.5 * options.lr), momentum, densities)


class Rough(CompactTrainer):
    """Right in float64, and with less momentum than it was told to have in float32."""

    def begin(self, options, momentum=None, densities=None):
        if next(self.model.parameters()).dtype == torch.float32:
            options = dataclasses.replace(options, momentum=0.9 * options.momentum)
        super().begin(options, momentum, densities)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(name, path, *arguments):
    """Exit status of a quick run, and its rows."""
    status = importlib.import_module(f"benchmarks.{name}").main(["--quick", "--out", str(path), *arguments])
    return status, common.read(path)


# -- every benchmark ---------------------------------------------------------------------------------------------------


def test_every_cpu_benchmark_is_known_here():
    assert set(FIGURE) == set(registry.CPU)
    files = {p.stem for p in registry.HERE.glob("*.py")} | {p.parent.name for p in registry.HERE.glob("*/__main__.py")}
    assert files >= {*registry.CPU, *registry.NEEDS}


LINES = {"generalisation": ("experiment", "method", "rounds")}
"""What a line of a table stands for, where it is not a row."""

QUICK = ("training_step", "inference", "federated", "simulator", "native_cpu", "generalisation")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FIGURE]
)
def test_a_quick_run_measures_and_fills_a_table(name, tmp_path):
    if name == "native_cpu" and not ops.ready():
        pytest.skip("the extension is not built")
    status, rows = run(name, tmp_path / "rows.csv")
    assert status == 0 and rows
    for row in rows:
        assert not row.get("wrong")
        assert float(row[FIGURE[name]]) == float(row[FIGURE[name]])
        assert row["torch"] == torch.__version__ and row["commit"]
    if name in readme.TABLES:
        lines = importlib.import_module(f"benchmarks.{name}").table(rows).splitlines()
        of = {tuple(row[k] for k in LINES[name]) for row in rows} if name in LINES else rows
        assert len(lines) == 2 + len(of)
        assert len({line.count("|") for line in lines}) == 1 and "wrong" not in lines[-1]


def test_a_quick_run_leaves_the_results_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "IMAGES", tmp_path)
    assert training_step.main(["--quick"]) == 0
    assert not list(tmp_path.iterdir())


def test_the_attack_on_labels_finds_what_is_there_and_nothing_else():
    draws = np.random.default_rng(0)
    shares = draws.dirichlet([0.3] * 6, size=40)
    telling = shares @ draws.normal(size=(6, 30)) + 0.01 * draws.normal(size=(40, 30))
    row = leakage.measure(telling[None], shares, 1, 1)
    assert row["distance"] < 0.1 < 0.4 < row["blind"] and row["top"] > 0.8 > row["shuffled_top"]
    row = leakage.measure(draws.normal(size=(1, 40, 30)), shares, 1, 1)
    assert row["distance"] > 0.8 * row["blind"]


# -- the gates ---------------------------------------------------------------------------------------------------------


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name",
    [
        "training_step",
        "rebuild",
        "estimators",
        "federated",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("zoo", "rivals")),
    ],
)
@pytest.mark.parametrize("trainer", [Faster, Rough])
def test_a_wrong_trainer_is_not_timed(name, trainer, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(cases.RIVALS, "compact", lambda model: trainer(model, strict=True))
    monkeypatch.setitem(zoo.RIVALS, "compact", lambda model, loss: trainer(model, loss, strict=True))
    status, rows = run(name, tmp_path / "rows.csv")
    assert status == 1
    for row in rows:
        assert "compact" in row["wrong"] and not row.get(FIGURE[name])
        assert ("float32" in row["wrong"]) == (trainer is Rough)
    assert "WRONG" in capsys.readouterr().out
    table = importlib.import_module(f"benchmarks.{name}").table(rows)
    assert "wrong" in table or len(table.splitlines()) == 2


def test_a_model_that_cannot_be_narrowed_has_no_small_rival():
    assert rivals.small(cases.CASES["lenet5"], 0.5) is not None and rivals.small(cases.CASES["vit"], 0.5) is None
    row = {"model": "vit", "batch": "16", "density": "0.5", "threads": "2", "isa": "avx2", "wrong": ""}
    row |= dict.fromkeys(rivals.RATIOS, "1.5") | {"small": ""}
    assert rivals.table([row]).endswith("| ViT, 16 | 0.5 | 2 | avx2 | 1.5x | 1.5x | 1.5x | none | 1.5x |")


def test_a_wrong_layer_is_not_timed(monkeypatch, tmp_path):
    product = skip.product
    monkeypatch.setattr(skip, "product", lambda x, weight, *rest: product(x, 1.001 * weight, *rest))
    status, rows = run("layer", tmp_path / "rows.csv")
    assert status == 1 and all("output differs" in row["wrong"] and not row.get("speed_up") for row in rows)


@pytest.mark.parametrize(
    "error, accepted",
    [
        (lambda order: 2e-4 if order is None else 1e-6, True),  # rounding decided a ReLU, which another order undoes
        (lambda order: 2e-4 if order is None else 2e-5, True),
        (lambda order: 2e-4, False),
        (lambda order: float("nan"), False),
    ],
)
def test_float32_is_judged_over_orders_of_the_images(error, accepted):
    def run(trainer, dtype, layout=torch.contiguous_format, order=None):
        double = dtype == torch.float64
        off = 0.0 if double else 1e-6 if trainer == "masked" else error(order)
        return {"weight": torch.ones(4, dtype=dtype) * (1 + off)}

    wrong = cases.same_training(run, "compact")
    assert (wrong == "") == accepted
    assert accepted or wrong.startswith("compact: weight is off by")


def test_a_wrong_export_is_not_timed(monkeypatch, tmp_path):
    def other(model, image):
        return to_dense(cases.CASES["lenet5"].pruned(0.4)).to(next(model.parameters()).dtype)

    monkeypatch.setattr(inference, "export", other)
    status, rows = run("inference", tmp_path / "rows.csv")
    assert status == 1
    assert rows[0]["wrong"].startswith("exported: output differs") and "speedup" not in rows[0]
    assert "wrong" in inference.table(rows)


def row_of_the_zoo(**changed):
    row = {"model": "unet", "batch": "16", "estimator": "window", "density": "0.5", "engine": "compact"}
    figures = {"speedup": "2.0", "compact_over_masked": "2.0", "dense_over_masked": "1.1", "ideal": "2.5"}
    return row | figures | {"realised": "0.8", "wrong": ""} | changed


def test_the_zoo_shows_what_is_slower_and_misses_its_gate():
    good, wrong = row_of_the_zoo(), row_of_the_zoo(model="conv4", wrong="loss differs")
    assert zoo.gate([good, wrong]) == []
    slow = row_of_the_zoo(model="mixer", density="1.0", speedup="0.969", compact_over_masked="0.969")
    assert zoo.gate([good, slow]) == ["mixer, batch 16, window, density 1.0: 0.969 of masked's speed"]
    poor = row_of_the_zoo(estimator="identity", realised="0.5")  # the median of .8 and .5
    assert zoo.gate([good, poor])[0].startswith("the median realised share of the ideal at density .5 is 65%")
    chosen = row_of_the_zoo(model="mlp", batch="1", engine="masked", speedup="1.0", compact_over_masked="0.9")
    lines = zoo.table([good, wrong, slow, chosen]).splitlines()
    assert "2x of 2.5x; dense 1.1x" in lines[2] and "| - |" in lines[2]
    assert "wrong" in lines[3] and "**0.97x**; dense" in lines[4] and "1x (masked; compact 0.9x)" in lines[5]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in zoo.ZOO])
def test_a_model_of_the_zoo_trains_compact_as_masked(name):
    for estimator in zoo.ESTIMATORS:
        one = dataclasses.replace(zoo.ZOO[name], estimator=estimator)
        assert cases.same_training(zoo.Bench(one).run(0.3), "compact") == ""


@pytest.mark.parametrize("key", ["loss", "thresholds"])
def test_memory_of_a_training_that_differs_is_not_reported(key, monkeypatch, tmp_path):
    right = {"peak": 2e6, "loss": 2.0, "thresholds": 30.0}
    wrong = right | {"peak": 1e6, key: 2.5}
    monkeypatch.setattr(
        memory, "run_child", lambda model, density, rival, batch: wrong if rival == "compact" else right
    )
    status, rows = run("memory", tmp_path / "rows.csv")
    assert status == 1
    assert rows[0]["wrong"].startswith(f"compact: {key}") and "of_masked" not in rows[0]


class Scripted:
    """A federated rival that does nothing, and ends where it is told to."""

    def __init__(self, threshold, loss=1.0, seconds=1.0):
        self.thresholds = {"fc4.threshold": torch.tensor([threshold])}
        self.done = federated.Round(seconds, 0.5, loss)
        self.followed = []

    def follow(self, other):
        self.followed.append(other)

    def raise_thresholds(self, density):
        pass

    def run_round(self):
        return self.done


def test_a_rival_begins_a_round_where_the_masked_one_does(tmp_path):
    """Rounds apart, then together: the server, what clients have yet to hear, and every client's tensors."""
    style = federated.RIVALS["masked"]
    alone = dataclasses.replace(style, workers=1)
    rivals = [federated.Rival("fmnist", alone, tmp_path / name, 800) for name in ("masked", "other")]
    try:
        rivals[0].run_round()
        rivals[1].follow(rivals[0])
        server = rivals[0].simulation.server
        assert all(torch.equal(rivals[1].simulation.server[name], tensor) for name, tensor in server.items())
        stores = [rival.simulation.store for rival in rivals]
        touched = [k for k in range(100) if stores[0].touched(k)]
        assert len(touched) == 10 and touched == [k for k in range(100) if stores[1].touched(k)]
        for client in touched:
            theirs = stores[0].load(client)
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in stores[1].load(client).items())
    finally:
        for rival in rivals:
            rival.close()


@pytest.mark.parametrize(
    "compact, wrong",
    [
        (Scripted(0.5), ""),
        (Scripted(0.51), "compact: fc4.threshold differs by 1.0e-02"),
        (Scripted(0.5, loss=1.1), "compact: training loss 1.1 instead of 1.0"),
        (Scripted(0.5, loss=float("nan")), "compact: training loss nan instead of 1.0"),
    ],
)
def test_a_round_that_ends_elsewhere_is_not_reported(compact, wrong):
    rivals = {"published": Scripted(0.5), "masked": Scripted(0.5), "compact": compact}
    compact.followed.clear()
    row = federated._round(rivals, 0)
    assert compact.followed == rivals["published"].followed == [rivals["masked"]] and not rivals["masked"].followed
    assert row["wrong"] == wrong
    assert ("vs_published" in row) == (not wrong)


def test_worker_counts_must_agree_in_every_bit():
    good = workers.measure({1: Scripted(0.5, seconds=3.0), 2: Scripted(0.5, seconds=2.0)}, 0.5, 3)
    assert not good["wrong"] and good["speedup"] == 1.5
    bad = workers.measure({1: Scripted(0.5), 2: Scripted(0.5 + 2**-24)}, 0.5, 3)
    assert "between one and two workers" in bad["wrong"] and "speedup" not in bad


def test_native_operators_that_differ_stop_the_run():
    native_cpu.agree("sum", torch.ones(3), torch.ones(3))
    with pytest.raises(SystemExit, match="sum is wrong, nothing is timed"):
        native_cpu.agree("sum", torch.ones(3), torch.zeros(3))


@pytest.mark.parametrize("model", ["lenet5", "conv4"])
def test_the_published_loop_is_the_masked_trainer_in_other_words(model):
    case = cases.CASES[model].small()
    assert cases.gate(case, functools.partial(case.pruned, 0.5), "published") == ""
    published = cases.PublishedTrainer(case.pruned(0.5))
    published.begin(case.options)
    published.step(*next(case.batches(1)))
    result = published.finish()
    assert result.steps == 1 and result.macs > 0
    assert all(0.3 < density < 0.7 for density in result.densities.values())


# -- what they share ---------------------------------------------------------------------------------------------------


def test_turns_begin_with_another_rival_each_time():
    order = []

    def sample(name):
        order.append(name)
        return float(len(order))

    times = common.in_turns({name: functools.partial(sample, name) for name in "abc"}, 4)
    assert "".join(order) == "abcbcacababc"
    assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}
    assert len(common.in_turns({"a": lambda: 1.0}, 100, seconds=0)["a"]) == 5


def test_short_calls_are_repeated():
    now, made = [0.0], {"long": 0, "short": 0}

    def call(name, seconds):
        made[name] += 1
        now[0] += seconds

    calls = {"long": functools.partial(call, "long", 8.0), "short": functools.partial(call, "short", 1.0)}
    samples = common.evenly(calls, clock=lambda: now[0])
    before = dict(made)
    assert samples["long"]() == 8 and samples["short"]() == 1
    assert made["long"] - before["long"] == 1 and made["short"] - before["short"] == 4


def test_quartiles_and_ratios():
    assert common.quartiles([3.0]) == (3, 3, 3)
    assert common.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)
    assert common.over([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])[1] == 3


def test_rows_survive_a_run_that_stops_and_replace_their_older_selves(tmp_path):
    path = tmp_path / "deep" / "rows.csv"
    rows = common.Rows(path, ("model", "density"))
    rows.add({"model": "a", "density": 0.5, "speedup": 1.0})
    rows.add({"model": "b", "density": 0.5, "speedup": 2.0})
    # Another run, which measures one cell again and has one more column, and one that is wrong.
    rows = common.Rows(path, ("model", "density"))
    rows.add({"model": "a", "density": 0.5, "speedup": 3.0, "turns": 7})
    assert rows.failed() == 0
    rows.add({"model": "b", "density": 0.5, "wrong": "loss differs"})
    assert rows.failed() == 1
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["model"], row["speedup"], row["turns"]) for row in found] == [("a", "3.0", "7"), ("b", "", "")]
    assert found[1]["wrong"] == "loss differs"
    assert [row["model"] for row in common.right(common.read(path))] == ["a"]
    assert list(path.parent.iterdir()) == [path]


def test_interrupted(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        common.alone(main)
    assert stop.value.code == 130 and "what was measured is kept" in capsys.readouterr().err


def test_a_federated_round_that_was_disturbed_has_no_speedup_over_the_published_loop():
    seconds = {"published": 10.0, "masked": 9.0, "compact": 2.0}
    assert federated.figures(seconds)["vs_published"] == 5
    disturbed = federated.figures(seconds | {"published": 28.0})
    assert disturbed["vs_published"] == "" and disturbed["vs_masked"] == 4.5
    rows = [
        {"setting": "fmnist", "target": "0.5", "density": "0.5"} | {k: str(v) for k, v in row.items()}
        for row in (disturbed, federated.figures(seconds))
    ]
    assert "| 5x |" in federated.table(rows) and "| - |" in federated.table(rows[:1])
    assert federated.plot(rows).axes[0].get_lines()[0].get_ydata() == [30]


def test_federated_keeps_within_its_budget(monkeypatch, tmp_path, capsys):
    status, rows = run("federated", tmp_path / "rows.csv", "--budget", "0")
    assert status == 0 and not rows
    assert "left out, out of time" in capsys.readouterr().out


def test_where_the_time_goes():
    model = nn.Linear(64, 64)
    x = torch.ones(256, 64)
    found = breakdown.by_kind(lambda: model(x).relu(), seconds=1.0)
    assert found["matrix products of layers"] > 0 and found["convolution"] == 0
    assert sum(found.values()) == pytest.approx(1.0)
    ours, theirs = {"a": 3.0, "b": 1.0}, {"a": 4.0, "b": 8.0}
    assert breakdown.excess(theirs, ours, ideal=4.0) == {"a": 2.0, "b": -1.0}
    assert list(breakdown.excess(theirs, ours, ideal=4.0)) == ["a", "b"]


def test_profile_names_layers_and_kinds(capsys):
    assert training_step.main(["--quick", "--profile"]) == 0
    out = capsys.readouterr().out
    assert "ideal x3.6" in out and "realised" in out


# -- list, README ------------------------------------------------------------------------------------------------------


def test_the_list_says_what_each_one_is(capsys):
    assert registry.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*registry.CPU, *registry.NEEDS]
    assert all(len(line.split()) > 5 for line in lines)


def test_all_runs_all_and_tells_what_failed(capsys):
    ran = []

    def fake(name, *arguments):
        ran.append((name, *arguments))
        return int(name == "memory")

    assert registry.run_all(quick=True, run=fake) == 1
    assert ran == [(name, "--quick") for name in registry.CPU]
    assert "failed: memory" in capsys.readouterr().out
    ran.clear()
    assert registry.run_all(quick=False, run=lambda name: ran.append(name) or 0) == 0
    assert ran == [*registry.CPU, "readme"]


def test_rank_correlation_by_hand():
    a = np.array([1.0, 5.0, 5.0, 9.0])
    assert generalisation.rank_correlation(a, np.array([0, 1.5, 1.5, 3])) == pytest.approx(1)
    assert generalisation.rank_correlation(a, a**3) == pytest.approx(1)
    assert generalisation.rank_correlation(a, np.array([4.0, 3, 2, 1])) == pytest.approx(-0.9486832981)
    assert generalisation.rank_correlation(a, np.ones(4)) == 0


def test_the_gap_of_a_run_is_its_clients_mean(monkeypatch):
    from spafl.report.run_data import ClientGaps

    @dataclasses.dataclass
    class Fake:
        gaps: ClientGaps | None
        last: object = dataclasses.field(default_factory=lambda: SimpleNamespace(accuracy=0.8, density_parameters=0.25))
        train: object = dataclasses.field(default_factory=lambda: np.full((3, 10), 40))

    monkeypatch.setattr(generalisation, "size", lambda run: (1000, 100))
    gap = np.array([0.1, 0.2, 0.3])
    row = generalisation.row_of(Fake(ClientGaps(9, gap, np.array([0.2, 0.3, 0.7]))), "e", "m", "1")
    assert row["gap"] == pytest.approx(20) and row["train_accuracy"] == pytest.approx(100) and row["rounds"] == 10
    assert row["gap_half_width"] == pytest.approx(1.96 * 10 / 3**0.5, abs=1e-3)
    assert row["density"] == 0.4 and row["across_clients"] == 1
    assert row["bound"] == round(100 * math.sqrt((8100 * math.log(2) + math.log(20)) / 800))
    dense = Fake(ClientGaps(9, gap, None), SimpleNamespace(accuracy=0.8, density_parameters=None))
    dense = generalisation.row_of(dense, "e", "local", "1")
    assert dense["density"] == dense["parameters"] == 1 and dense["across_clients"] == ""
    assert dense["bound"] == round(100 * math.sqrt((32000 * math.log(2) + math.log(20)) / 800))
    assert generalisation.row_of(Fake(None), "e", "m", "1") is None


def test_tables_are_filled_between_their_marks():
    text = "a\n<!-- table:memory -->\nold | old\n\nold\n<!-- /table -->\nb\n<!-- table:workers -->\n<!-- /table -->\n"
    filled = readme.fill(text, lambda name: f"new {name}")
    assert filled == (
        "a\n<!-- table:memory -->\nnew memory\n<!-- /table -->\n"
        "b\n<!-- table:workers -->\nnew workers\n<!-- /table -->\n"
    )
    assert readme.fill(filled, lambda name: f"new {name}") == filled
    with pytest.raises(ValueError, match="1 tables begin and 0 end"):
        readme.fill("<!-- table:memory -->\n")
    with pytest.raises(ValueError, match="no table is called 'speed'"):
        readme.fill("<!-- table:speed -->\n<!-- /table -->")


def test_the_pages_show_the_results_in_the_repository():
    assert readme.main(["--check"]) == 0
    text = "".join((readme.ROOT / page).read_text() for page in readme.PAGES)
    for name in readme.TABLES:
        assert text.count(f"<!-- table:{name} -->") == 1
    for name in readme.PICTURES:
        assert (common.IMAGES / f"{name}.png").exists() == bool(common.read(common.RESULTS / f"{name}.csv"))


def test_without_results_there_is_no_table(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert readme.table("memory") == readme.NOTHING


def test_wrong_cells_are_in_the_table_without_a_figure():
    def row(model, batch, density, speedup, ideal, wrong=""):
        figures = dict.fromkeys(("speedup", "speedup_q1", "speedup_q3"), speedup)
        return {"model": model, "batch": batch, "density": density, "ideal": ideal, "wrong": wrong} | figures

    rows = [
        row("lenet5", "64", "1.0", "3.061", "1.0"),
        row("lenet5", "64", "0.5", "", "", "loss differs"),
        row("conv4", "16", "0.5", "3.7", "3.88"),
    ]
    lines = training_step.table(rows).splitlines()
    assert lines[2] == "| LeNet-5, 64 | 3.06x | wrong |" and lines[3] == "| Conv4, 16 | - | 3.7x [3.88] |"
    assert len(training_step.plot(rows).axes) == 2


def test_bad_densities_are_refused(capsys):
    for name in ("training_step", "rebuild", "estimators", "memory", "inference", "federated", "workers", "layer"):
        with pytest.raises(SystemExit):
            importlib.import_module(f"benchmarks.{name}").main(["--densities", "0"])
        assert "--densities must be in" in capsys.readouterr().err


def git(folder, *command):
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", *who, *command], cwd=folder, check=True, capture_output=True)


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_the_commit_is_the_one_of_the_checkout_and_not_of_one_around_it(monkeypatch, tmp_path):
    monkeypatch.delenv("SPAFL_COMMIT", raising=False)
    (tmp_path / "file").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag does not replace the commit")
    head = (tmp_path / ".git" / "HEAD").read_text().split()[1]
    full = (tmp_path / ".git" / head).read_text()
    clean = commit.commit(tmp_path)
    assert len(clean) >= 7 and full.startswith(clean)
    (tmp_path / "file").write_text("2")
    assert commit.commit(tmp_path) == f"{clean}-dirty" and commit.commit(tmp_path, changes=False) == clean
    (tmp_path / "copy").mkdir()
    assert commit.commit(tmp_path / "copy") == "unknown"


def test_without_git_the_commit_is_what_the_copy_says_or_unknown(monkeypatch, tmp_path):
    monkeypatch.delenv("SPAFL_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "no tools"))
    (tmp_path / ".git").mkdir()
    assert commit.commit(tmp_path) == "unknown"
    (tmp_path / "build" / "gpu").mkdir(parents=True)
    (tmp_path / commit.FILE).write_text("abc1234\n")
    assert commit.commit(tmp_path) == "abc1234"
    monkeypatch.setenv("SPAFL_COMMIT", "def5678")
    assert commit.commit(tmp_path) == "def5678"
    monkeypatch.setattr(platform, "node", lambda: "a-host")
    monkeypatch.setattr(socket, "gethostname", lambda: "a-host")
    # What is written with every row: made without git, and nothing that tells the machine.
    for facts in (results.environment("made-up GPU", "none"), common._facts.__wrapped__()):
        assert facts["commit"] == "def5678"
        assert not [v for v in facts.values() if "a-host" in v or str(commit.ROOT) in v]


def test_an_interval_of_ratios_is_that_of_their_logarithms():
    low, middle, high = against.interval([1.0, 1.1, 1.21])
    # mean log(1.1), standard deviation log(1.1), t(.975, 2) = 4.3027
    assert middle == pytest.approx(1.1) and low * high == pytest.approx(1.21)
    assert high == pytest.approx(1.1 * 1.1 ** (4.302653 / 3**0.5), rel=1e-5)
    rows = [{"model": "lenet5", "density": "0.5", "before": "abc", "low": low} for low in ("0.969", "0.97")]
    assert len(against.missed(rows)) == 1 and "at least 0.969 times as fast as abc" in against.missed(rows)[0]


@pytest.mark.slow
@pytest.mark.skipif(not (against.ROOT / ".git").exists(), reason="no history")
def test_two_versions_are_timed_in_turns(tmp_path):
    assert against.main(["HEAD", "--quick", "--out", str(tmp_path / "rows.csv")]) == 0
    (row,) = common.read(tmp_path / "rows.csv")
    assert float(row["low"]) <= float(row["speedup"]) <= float(row["high"]) and (row["pairs"], row["turns"]) == (
        "2",
        "4",
    )
    assert "LeNet-5" in against.table([row]) and "x (" in against.table([row])
    with pytest.raises(SystemExit):
        against.main(["no-such-commit"])

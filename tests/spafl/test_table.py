"""Experiments: checked before any run, made once, gone on with, and summed up as by hand."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from spafl.cli import main
from spafl.errors import UserError
from spafl.experiment import carry_out, jobs_of, load_experiment, parse_seeds
from spafl.report.run_data import load_run
from spafl.sweep import parse_values, swept
from spafl.table import COLUMNS, Line, brief, notes_of, over_seeds, paired_difference

EXPERIMENT = """
title = "A small one"
note = "of the whole table"
reference = "spafl"
[published]
spafl = "89 %"
[run]
rounds = 2
data = {name = "synthetic", image = 28, classes = 4, train = 120, test = 60}
partition = {clients = 3, alpha = 1.0, min_train = 8, min_test = 4}
model = {name = "lenet5"}
training = {lr = 0.05, batch_size = 16, epochs = 1}
sampling = {clients_per_round = 2}
simulation = {device = "cpu", engine = "masked", workers = 1, checkpoint_every = 1}
[methods.spafl]
algorithm = {name = "spafl"}
[methods.spa_fed]
note = "dense & slow"
algorithm = {name = "fedspa"}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(EXPERIMENT)
    return path


def test_the_files_of_the_project_are_valid():
    files = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))
    found = {file.stem: {row.label for row in load_experiment(file).rows} for file in files}
    assert len(found) == 10
    assert "spafl-macs-.25" in found.pop("budgets")
    assert {"spafl-paper", "fedprox", "scaffold", "spafl-fixed"} <= found.pop("fmnist-lenet5-further")
    assert {"spafl-paper", "spafl-density-.4", "fedavg", "local"} == found.pop("fmnist-lenet5-500")
    for labels in found.values():
        assert {"spafl-paper", "fedavg", "local", "spafl-no-exchange"} <= labels


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title =", "titel =", "unknown key titel"),
        (
            'reference = "spafl"',
            'reference = "spa"',
            "reference must name one of the methods spafl, spa_fed; got 'spa'",
        ),
        ('{name = "fedspa"}', '{name = "fedspa", densty = 1}', "methods.spa_fed: unknown key algorithm.densty"),
        ("[methods.spafl]", "[methodes.spafl]", "unknown key methodes"),
    ],
)
def test_mistakes_are_found_before_any_run(path, old, new, said):
    path.write_text(EXPERIMENT.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_experiment(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_selection_is_compared_with_one_of_its_own():
    experiment = load_experiment(Path(__file__).parents[2] / "experiments" / "fmnist-lenet5.toml")
    for chosen, reference in [
        (["spafl-tuned", "spafl-paper"], "spafl-paper"), (["local", "spafl-tuned", "fedavg"], "spafl-tuned"),
        (["local", "fedavg"], "fedavg"),
    ]:  # fmt: skip
        assert experiment.only(chosen).reference == reference


def test_seeds_and_values():
    assert parse_seeds("1..3,7,2") == [1, 2, 3, 7]
    for text in ("", "a", "3..1", "-1"):
        with pytest.raises(UserError, match="--seeds takes whole numbers"):
            parse_seeds(text)
    assert parse_values(["a.b=1, 2"]) == {"a.b": ["1", "2"]}
    with pytest.raises(UserError, match="--vary takes"):
        parse_values(["a.b"])


def test_a_sweep_is_an_experiment_of_all_combinations(path):
    experiment = swept(load_experiment(path), {"training.lr": [0.1, 0.2], "training.epochs": ["1", "2"]})
    assert [row.label for row in experiment.rows][:2] == [
        "spafl training.lr=0.1 training.epochs=1", "spafl training.lr=0.1 training.epochs=2",
    ]  # fmt: skip
    assert len(experiment.rows) == 8 and experiment.reference == experiment.rows[0].label
    jobs = jobs_of(experiment, [4], Path("runs"))
    assert (jobs[3].config.training.lr, jobs[3].config.training.epochs, jobs[3].config.seed) == (0.2, 2, 4)
    assert len({job.folder for job in jobs}) == 8
    with pytest.raises(UserError, match=r"training\.lr"):
        swept(load_experiment(path), {"training.lr": [-1]})


def test_a_picture_calls_settings_of_a_sweep_by_their_last_part():
    assert (
        brief("spafl-paper algorithm.penalty=.001 algorithm.prune_head=false")
        == "spafl-paper penalty=.001 prune_head=false"
    )
    assert brief("my run 1.5 training.lr=.1") == "my run 1.5 lr=.1"
    for label in ("fedavg", "a training.lr=.1 algorithm.lr=.2", "v1.2 of a.b"):
        assert brief(label) == label


def test_figures_over_seeds_are_those_by_hand():
    own, other = {1: 80.0, 2: 84.0, 3: 83.0, 9: 1.0}, {1: 81.0, 2: 82.0, 3: 84.0}
    mean, half = paired_difference(own, other)
    differences = np.array([-1.0, 2.0, -1.0])
    assert mean == pytest.approx(0.0)
    low, high = stats.t.interval(0.95, 2, loc=0, scale=differences.std(ddof=1) / math.sqrt(3))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert paired_difference({1: 2.0}, {1: 1.0}) == (1.0, None) and paired_difference({1: 2.0}, {2: 1.0}) is None
    assert (
        over_seeds({1: 1.0, 2: 3.0}, 1) == "2.0 ± 1.4" and over_seeds({}, 1) == "-" and over_seeds({5: 2.0}, 0) == "2"
    )


def test_what_was_spent_of_budgets_is_noted():
    budgets = {("all", "macs", 0.25): {1: 0.2, 2: 0.4}, ("phone", "seconds", 2.0): {1: 1.9}}
    told = notes_of([Line("spafl", "", False, "", {}, None, {}, {}, budgets)], [1, 2])
    assert told[1:] == [
        "spafl: the budget is macs 0.25; in the last tenth of the rounds 0.300 ± 0.141 was spent.",
        "spafl: the budget of phone is seconds 2; in the last tenth of the rounds 1.900 was spent.",
    ]


def test_runs_are_made_once_gone_on_with_and_summed_up(path, tmp_path, capsys):
    arguments = ["table", str(path), "--seeds", "1,2", "--runs", str(tmp_path / "runs"), "--jobs", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "0 of 4 runs are there; 2 at a time" in printed.err
    jobs = jobs_of(load_experiment(path), [1, 2], tmp_path / "runs")
    assert [job.state for job in jobs] == ["done"] * 4
    with (tmp_path / "runs" / "small.csv").open() as file:
        rows = list(csv.DictReader(file))
    for job in jobs:
        run = load_run(job.folder)
        (row,) = [r for r in rows if (r["method"], r["seed"]) == (job.row.label, str(job.seed))]
        assert float(row["accuracy"]) == pytest.approx(100 * run.last.accuracy)
        assert float(row["payload_mb"]) == pytest.approx(run.last.cost.payload_bytes / 1e6)
        assert row["best_round"] in ("1", "2") and set(row) == {
            "method", "seed", *(c.key for c in COLUMNS), "difference_at_equal_work",
        }  # fmt: skip
    text = (tmp_path / "runs" / "small.md").read_text()
    assert text in printed.out + "\n" and "| 89 % " in text and "dense & slow" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| spa_fed")]
    assert "†" in line and "[" in line
    assert r"spa\_fed" in (tmp_path / "runs" / "small.tex").read_text()
    assert (tmp_path / "runs" / "small.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is made twice; what was cut off goes on.
    stamp = (jobs[0].folder / "metrics.jsonl").stat().st_mtime_ns
    (jobs[1].folder / "summary.json").unlink()
    assert jobs[1].state == "cut off"
    assert carry_out(jobs, 1) == {} and jobs[1].state == "done"
    assert (jobs[0].folder / "metrics.jsonl").stat().st_mtime_ns == stamp
    # Other settings never share a folder.
    assert main([*arguments, "--set", "training.lr=0.1"]) == 2
    assert "holds a run of another configuration: training.lr" in capsys.readouterr().err


def test_published_figures_make_a_table_where_nothing_was_run(path, tmp_path, capsys):
    arguments = ["table", str(path), "--no-run", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert len(rows) == 2 and rows[0].endswith("| published |") and rows[1].startswith("| spafl ")
    assert rows[1].endswith("| 89 %      |")
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".csv", ".md", ".tex"]
    path.write_text(path.read_text().replace('[published]\nspafl = "89 %"\n', ""))
    assert main(arguments) == 2 and "no run is complete" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_there(path, tmp_path, capsys):
    path.write_text(EXPERIMENT + "training = {lr = 1e30}\n")
    assert main(["table", str(path), "--runs", str(tmp_path / "runs"), "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "spa_fed, seed 1: spafl" in printed and "the loss of client" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("| spafl")]
    assert line.split("|")[2].strip() != "-"

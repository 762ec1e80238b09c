"""The committed tables are those of the committed runs."""

import csv
from pathlib import Path

import pytest

from spafl.experiment import Experiment, load_experiment
from spafl.sweep import swept
from spafl.table import make_table

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RESULTS = EXPERIMENTS / "results"
TABLES = sorted(path.stem for path in RESULTS.glob("*.csv"))


def _asked(name: str, methods: list[str]) -> Experiment:
    """The experiment of a table: that of the file, or the sweep whose rows name their settings."""
    if not name.endswith("-sweep"):
        return load_experiment(EXPERIMENTS / f"{name}.toml").only(methods)
    path = EXPERIMENTS / f"{name.removesuffix('-sweep')}.toml"
    values: dict[str, list[str]] = {}
    for label in methods:
        for setting in label.split()[1:]:
            key, _, value = setting.partition("=")
            if value not in values.setdefault(key, []):
                values[key].append(value)
    base = load_experiment(path).only({label.split()[0] for label in methods})
    return swept(base, values)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_made_from_the_runs_beside_them(name, tmp_path):
    with (RESULTS / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    seeds = sorted({int(row["seed"]) for row in rows}) or [1]
    if rows:
        experiment = _asked(name, list(dict.fromkeys(row["method"] for row in rows)))
    else:  # nothing could be run: published figures alone
        experiment = load_experiment(EXPERIMENTS / f"{name}.toml")
    make_table(experiment, seeds, RESULTS / "runs", tmp_path, run=False)
    for kind in ("md", "csv", "tex"):
        assert (tmp_path / f"{name}.{kind}").read_text() == (RESULTS / f"{name}.{kind}").read_text(), kind


def test_there_is_a_table():
    assert TABLES

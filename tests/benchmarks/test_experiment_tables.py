"""The experiments' tables on the pages are worked out from their CSV files."""

import pytest

from benchmarks import experiment_tables

HEAD = (
    "method,seed,accuracy,accuracy_worst_10pct,best_accuracy,density_layers,density_parameters,payload_mb,"
    "executed_gmacs,difference_at_equal_work\n"
)
ROWS = (
    "spafl-paper,1,80,60,81,.5,.25,10,100,\n"
    "spafl-paper,2,82,62,83,.3,.15,12,300,\n"
    "fedavg,1,85,50,90,,,2000,1000,-1\n"
    "fedavg,2,83,52,88,,,2000,1000,-3\n"
    "fedspa,2,92,70,92,.7,.5,1500,1000,2\n"
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    for name in ("digits", "fmnist-lenet5"):
        (tmp_path / f"{name}.csv").write_text(HEAD + ROWS)
    monkeypatch.setattr(experiment_tables, "RESULTS", tmp_path)


def _cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_a_line_gives_means_over_seeds_and_differences_paired_by_seed(results):
    head, _, paper, fedavg, fedspa = _cells(experiment_tables.table("digits"))
    assert head[6] == "to `paper`, points"
    assert paper == ["SpaFL `paper`", "81.0 ± 1.4 (82.0)", "61.0 ± 1.4", "0.400, 0.200", "200", "11.0", "", ""]
    assert fedavg[3:6] == ["1, 1", "1,000", "2,000.0"]
    # 5 and 1 points with both seeds, t(.975, 1) = 12.706: 12.706 * 2.828 / sqrt(2)
    assert fedavg[6:] == ["+3.0 [-22.4, +28.4]", "-2.0 [-14.7, +10.7]"]
    assert fedspa[0].endswith("(of seed 2)") and fedspa[3] == "0.700, 0.500 †" and fedspa[6:] == ["+10.0", "+2.0"]


def test_a_line_of_a_sweep_says_where_it_has_fewer_seeds(results):
    _, _, paper, _, fedspa = _cells(experiment_tables.sweep("digits"))
    assert paper == ["spafl-paper", "81.0 ± 1.4", "61.0 ± 1.4", "0.400, 0.200", "200"]
    assert fedspa == ["fedspa (of seed 2)", "92.0", "70.0", "0.700, 0.500", "1,000"]


def test_the_first_table_gives_sizes_a_person_can_read(results, monkeypatch):
    few = {label: experiment_tables.FIRST[label] for label in ("spafl-paper", "fedavg")}
    monkeypatch.setattr(experiment_tables, "FIRST", few)
    _, _, paper, fedavg = _cells(experiment_tables.first())
    assert paper[1:] == ["81.0 ± 1.4 (best round: 82.0)", "61.0", "0.2e12", "11 MB"]
    assert fedavg[1:] == ["84.0 ± 1.4 (best round: 89.0)", "51.0", "1.0e12", "2.0 GB"]


def test_every_row_of_the_experiments_has_words():
    for name in experiment_tables.NAMES:
        rows = experiment_tables.load_experiment(experiment_tables.EXPERIMENTS / f"{name}.toml").rows
        assert {row.label for row in rows} <= experiment_tables.WHAT.keys()

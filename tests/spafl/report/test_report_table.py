"""The table: the recorded numbers in human units, kinds of cost apart."""

import html
import json
import re

import pytest

from spafl.report import ReportError, comparison_table
from spafl.report.run_data import load_run
from spafl.report.table import comparison_html, duration, quantity


def final(folder, **changes):
    """Set the last round's numbers and return the folder."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    for path, value in changes.items():
        target, *keys = last, *path.split("__")
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def known(make_run):
    return final(
        make_run(rounds=2),
        evaluation__accuracy__mean=0.93456,
        evaluation__accuracy__std=0.0512,
        evaluation__accuracy__worst_10pct=0.801,
        density__layer_mean=0.5912,
        density__parameters=0.0704,
        cost__paper__macs=1.0319e12,
        cost__paper__communication_bits=453_700_000,
        cost__executed__macs=987_654_321_000,
        cost__payload__up_bytes=92_800,
        cost__payload__down_bytes=2_000_000,
        cost__seconds__train=244.2,
        cost__seconds__evaluate=1.0,
    )


def cells(table, row=3):
    return re.split(r"\s{2,}", table.splitlines()[row].strip())


def test_the_row_holds_the_recorded_numbers(known):
    table = comparison_table([known])
    assert cells(table, 1) == [
        *("run", "round", "mean", "std", "worst 10 %", "layer mean", "parameters"),
        *("MACs", "traffic", "MACs", "up", "down", "time"),
    ]
    assert cells(table) == [
        *("spafl", "2", "93.5", "5.1", "80.1", "0.591", "0.070"),
        *("1.03 T", "454 Mbit", "988 G", "92.8 kB", "2.00 MB", "4 min 05 s"),
    ]
    assert cells(table, 0) == ["accuracy (%)", "density", "paper's formulas", "executed", "payload", "measured"]


def test_costs_belong_to_the_round_of_the_accuracy(make_run):
    folder = make_run(rounds=4, evaluate_every=2)
    whole = cells(comparison_table([folder]))
    records = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    final(folder, evaluation=None)  # the last evaluated round is now the third
    row = cells(comparison_table([folder]))
    assert whole[1] == "4" and row[1] == "3" and row[2] != "-"
    seconds = [json.loads(record)["cost"]["seconds"]["total"] for record in records]
    assert (whole[-1], row[-1]) == (f"{seconds[3]:.1f} s", f"{seconds[2]:.1f} s")


def test_columns_are_aligned(known, make_run):
    runs = [known, make_run("b", name="a much longer name", algorithm="fedavg", rounds=12)]
    groups, header, rule, *rows = comparison_table(runs).splitlines()
    assert len(rows) == 2 and set(rule) == {"-"} and len(rule) == max(map(len, (groups, header, *rows)))
    for column in ("round", "std", "worst 10 %", "parameters", "traffic", "down", "time"):
        end = header.index(column) + len(column)
        for row in rows:
            assert row[end - 1] != " " and row[end : end + 2].strip() == ""
    for group, first, last in (("payload", "up", "down"), ("executed", "MACs", "MACs")):
        assert header.index(first) < groups.index(group) + len(group) <= header.rindex(last) + len(last)


def test_what_was_not_recorded_is_a_dash_not_a_zero(make_run):
    table = comparison_table([make_run("f", name="run", algorithm="fedavg", rounds=2)])
    assert cells(table)[6:8] == ["-", "-"] and cells(table)[10] == "-"
    unevaluated = comparison_table([make_run("u", rounds=2, evaluate_every=0)])
    assert cells(unevaluated)[2:5] == ["-", "-", "-"]


def test_the_algorithm_is_named_where_the_run_is_not(make_run):
    table = comparison_table([make_run("b", name="lr 0.02", algorithm="fedavg", rounds=1)])
    assert cells(table, 1)[:3] == ["run", "algorithm", "round"] and cells(table)[:3] == ["lr 0.02", "fedavg", "1"]


def test_an_unfinished_run_has_a_note(make_run):
    table = comparison_table([load_run(make_run(rounds=2, completed=False))])
    assert table.splitlines()[-1].startswith("note: spafl: the run has no summary.json")


def test_html_has_the_same_cells_escaped(known, make_run):
    odd = make_run("odd", name="<b>&'\"", algorithm="fedavg", rounds=2)
    runs = [load_run(known), load_run(odd)]
    page = comparison_html(runs)
    assert "<b>" not in page
    found = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    text = comparison_table(runs)
    assert found == cells(text, 3) + cells(text, 4)
    spans = [int(n) for n in re.findall(r'colspan="(\d+)"', page)]
    assert sum(spans) == len(found) // 2


def test_no_runs_is_an_error():
    with pytest.raises(ReportError, match="runs must name at least one run folder; got none"):
        comparison_table([])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "B", "-"),
        (0, "B", "0 B"),
        (580, "B", "580 B"),
        (0.5, "", "0.50"),
        (999.4, "B", "999 B"),
        (999.5, "B", "1.00 kB"),
        (999_600, "", "1.00 M"),
        (12_345, "bit", "12.3 kbit"),
        (9_996, "B", "10.0 kB"),
        (1.0319e12, "", "1.03 T"),
        (8.73e14, "", "873 T"),
        (3.2e21, "", "3200 E"),
    ],
)
def test_quantity(value, unit, text):
    assert quantity(value, unit) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7380, "2 h 03 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text

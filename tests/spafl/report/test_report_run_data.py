"""Loading a run folder: what is kept, what an unfinished run gives, and one line for everything that is wrong."""

import json

import numpy as np
import pytest

from spafl.report.run_data import ReportError, labels, load_run


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rewrite(folder, change, index=-1):
    """Apply ``change`` to one parsed line of metrics.jsonl."""
    records = lines(folder)
    change(records[index])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_finished_run(make_run):
    folder = make_run(rounds=5, evaluate_every=2)
    run, records = load_run(folder), lines(folder)
    assert (run.name, run.algorithm, run.model, run.data) == ("spafl", "spafl", "lenet5", "digits")
    assert run.completed and run.notes == () and run.clients == 20
    assert [p.round for p in run.points] == [0, 1, 2, 3, 4]
    assert [p.accuracy is not None for p in run.points] == [True, False, True, False, True]
    assert run.accuracies.tolist() == records[4]["evaluation"]["accuracy"]["clients"]
    assert run.last.cost.payload_bytes == sum(records[4]["cost"]["payload"].values())
    assert run.last.accuracy_worst == records[4]["evaluation"]["accuracy"]["worst_10pct"]
    assert run.layers == ["conv1", "conv2", "fc3", "fc4"]
    assert run.masks.round == 4 and list(run.masks.layers) == ["conv1"] and run.masks.everywhere.shape == (20, 20)
    kept = run.masks.layers["conv1"].astype(int)
    assert ["".join("01"[b] for b in row) for row in kept] == records[4]["first_layer"]["masks"]
    gap = np.subtract(records[4]["evaluation"]["train_accuracy"], records[4]["evaluation"]["accuracy"]["clients"])
    np.testing.assert_array_equal(run.gaps.gap, gap)
    assert run.gaps.density.tolist() == records[4]["density"]["clients"]
    np.testing.assert_array_equal(run.train, json.loads((folder / "partition.json").read_text())["train"])


def test_masks_of_all_layers(make_run, as_now):
    """All layers are read, and the one in whose filters clients differ most often is known."""
    folder = make_run("now", clients=4, rounds=3)
    before = load_run(folder)
    masks = {
        "same": ["01000"] * 4,  # sparse, the same everywhere
        "wide": ["1" * 40, "0" * 4 + "1" * 36, "1" * 40, "1" * 40],  # more filters differ, fewer of those it has
        "varied": ["11", "01", "10", "11"],
    }
    run = load_run(as_now(folder, masks))
    assert run.masks.round == 2 and list(run.masks.layers) == list(masks)
    for layer, rows in masks.items():
        assert ["".join("01"[int(b)] for b in row) for row in run.masks.layers[layer]] == rows
    assert run.masks.most_varied == "varied" and run.masks.everywhere.shape == (4, 47)
    assert run.accuracies.tolist() == before.accuracies.tolist() and run.gaps.gap.tolist() == before.gaps.gap.tolist()
    same = load_run(as_now(make_run("same", clients=4, rounds=1), {"full": ["11"] * 4, "same": ["10"] * 4}))
    assert same.masks.most_varied == "same"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["01", "01", "012"], r'masks\[2\]\.b must be a string of 2 zeros and ones, .*; got "012"'),
        (["01", "01", None], r"masks\[2\]\.b must be a non-empty string; got null"),
    ],
)
def test_a_wrong_mask_is_named(make_run, as_now, rows, message):
    folder = as_now(make_run(clients=3, rounds=1), {"a": ["1", "1", "0"], "b": rows})
    with pytest.raises(ReportError, match=message):
        load_run(folder)


def test_files_of_one_layer_are_read(make_run, as_now):
    """Of an earlier version: the name of the first layer in metrics.jsonl, its masks in the clients' files."""
    folder = as_now(make_run(clients=3, rounds=1), {"b": ["10", "11", "01"]})
    path = folder / "evaluations" / "round-000000.jsonl"
    records = [json.loads(text) for text in path.read_text().splitlines()]
    for record in records:
        record["first_layer"] = record.pop("masks")["b"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rewrite(folder, lambda line: line.update(first_layer={"name": "b"}))
    assert load_run(folder).masks.layers["b"].tolist() == [[1, 0], [1, 1], [0, 1]]


def test_the_row_speaks_of_the_last_evaluated_round_and_its_costs(make_run):
    folder = make_run(rounds=6)
    rewrite(folder, lambda line: line.update(evaluation=None))
    run = load_run(folder)
    assert run.last.round == 4
    assert run.last.cost.total_seconds == lines(folder)[4]["cost"]["seconds"]["total"]
    assert "summary.json ends at round 6, but the last evaluated round in metrics.jsonl is round 5" in run.notes[0]


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_a_killed_run_is_read_up_to_its_last_whole_line(make_run, cut):
    folder = make_run(rounds=4, completed=False)
    data = (folder / "metrics.jsonl").read_bytes()
    start = data.rindex(b"\n", 0, -1) + 1
    last = data[start:]
    (folder / "metrics.jsonl").write_bytes(data[:start] + last[:cut])
    run = load_run(folder)
    assert [p.round for p in run.points] == [0, 1, 2] and not run.completed
    assert run.notes[0] == "the last line of metrics.jsonl (line 4) is half written and was ignored"
    assert "no summary.json" in run.notes[1] and "read up to round 3" in run.notes[1]


def test_a_last_line_that_only_lacks_its_newline_is_whole(make_run):
    folder = make_run(rounds=3)
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:-1])
    run = load_run(folder)
    assert run.last.round == 2 and run.notes == ()


def test_a_run_without_evaluation(make_run):
    run = load_run(make_run(rounds=3, evaluate_every=0))
    assert run.evaluated is None and run.accuracies is None and run.gaps is None and run.masks is None
    assert run.last.round == 2 and run.notes == ()


@pytest.mark.parametrize("name", ["config.toml", "partition.json", "metrics.jsonl"])
def test_a_missing_file_is_named(make_run, name):
    folder = make_run()
    (folder / name).unlink()
    with pytest.raises(ReportError, match=rf"{name}: the file is missing; is .* a run folder\?"):
        load_run(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ReportError, match="nowhere: no such run folder"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.toml", "name = ", r"config\.toml: not valid TOML"),
        ("config.toml", "\xff", r"config\.toml: not valid TOML"),
        ("config.toml", 'name = "x"\n[model]\nname = "m"\n', r"config\.toml: algorithm is missing"),
        ("config.toml", 'name = "x"\n[algorithm]\nname = 3\n', r"algorithm\.name must be a non-empty string; got 3"),
        ("partition.json", "{", r"partition\.json: not valid JSON"),
        ("partition.json", '{"classes": 2, "train": []}', r"train must be a list with at least one client"),
        (
            "partition.json",
            '{"classes": 2, "train": [[1, -1]]}',
            r"train\[0\]\[1\] must be a whole number >= 0; got -1",
        ),
        (
            "partition.json",
            '{"classes": 2, "train": [[1, 2]], "test": [[1]]}',
            r"test\[0\] must be a list of 2 entries",
        ),
        (
            "partition.json",
            '{"classes": 2, "train": [[1, 2]], "test": []}',
            r"test must be a list of 1 entries; got \[\]",
        ),
        ("metrics.jsonl", "", r"metrics\.jsonl: holds no complete round yet"),
        ("metrics.jsonl", '{"rou', r"metrics\.jsonl: holds no complete round yet"),
        ("metrics.jsonl", '{"rou\n', r"metrics\.jsonl line 1: not valid JSON"),
        ("metrics.jsonl", "[]\n", r"line 1: the value must be a table of named values; got \[\]"),
        ("summary.json", "nope", r"summary\.json: not valid JSON"),
        ("summary.json", "{}", r"summary\.json: completed is missing"),
    ],
)
def test_a_corrupt_file_is_named(make_run, name, text, message):
    folder = make_run()
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(ReportError, match=message) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("round",), -1, r"line 6: round must be a whole number >= 0; got -1"),
        (("round",), 3, r"line 6: round 3 must come after round 4 of the line before"),
        (("cost", "payload", "up_bytes"), 1, r"line 6: cost up_bytes must be cumulative; it falls from 116000 to 1"),
        (("cost", "executed", "macs"), True, r"line 6: cost\.executed\.macs must be a number >= 0; got true"),
        (("cost", "seconds", "train"), float("nan"), r"cost\.seconds\.train must be a number >= 0; got NaN"),
        (("evaluation", "accuracy", "mean"), 93.1, r"evaluation\.accuracy\.mean must be a number in 0\.\.1; got 93\.1"),
        (("evaluation", "accuracy", "clients"), [0.5], r"evaluation\.accuracy\.clients must be a list of 20 entries"),
        (("density", "layers"), [1], r"density\.layers must be a table of named values; got \[1\]"),
        (("density", "clients"), None, r"density\.clients must be a list of 20 entries; got null"),
        (
            ("first_layer", "masks"),
            ["01"] * 19 + ["011"],
            r"first_layer\.masks\[19\] must be a string of 2 zeros and ones",
        ),
        (("first_layer", "masks"), ["01"] * 19 + ["0x"], r'masks\[19\] must be .* got "0x"'),
    ],
)
def test_a_wrong_field_is_named_with_its_line(make_run, path, value, message):
    folder = make_run(rounds=6)

    def change(line):
        for key in path[:-1]:
            line = line[key]
        line[path[-1]] = value

    rewrite(folder, change)
    with pytest.raises(ReportError, match=message) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


def test_a_damaged_line_in_the_middle_is_an_error_not_a_note(make_run):
    folder = make_run(rounds=4)
    parts = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    parts[1] = parts[1][:30] + "\n"
    (folder / "metrics.jsonl").write_text("".join(parts))
    with pytest.raises(ReportError, match=r"metrics\.jsonl line 2: not valid JSON"):
        load_run(folder)


def test_labels_are_distinct(make_run):
    same, again, other = (load_run(make_run(f, name=n, rounds=1)) for f, n in (("a", "x"), ("b", "x"), ("c", "y")))
    assert labels([same, again, other]) == ["x (a)", "x (b)", "y"]
    assert labels([same, same]) == ["x (a) #1", "x (a) #2"]
    assert labels([load_run(make_run("d", name="two\nlines\t", rounds=1))]) == ["two lines"]

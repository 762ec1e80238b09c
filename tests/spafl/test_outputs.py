"""What a run writes down, for others to read: the schema of its files, confusion matrices, tables and PDF."""

import csv
import importlib.resources
import json
import re

import numpy as np
import pytest
import torch

import spafl
from spafl.cli import main
from spafl.config import resolve_config
from spafl.outcomes import OUTCOMES
from spafl.report import ReportError, formats
from spafl.report.confusion import confusions
from spafl.simulation.problem import cut_data, load_data
from spafl.system.model import Played, Visit


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from small_problem import SMALL

    changes = {
        "evaluation": {"every": 2, "confusion": True},
        "rounds": 3,
        "partition": {**SMALL["partition"], "alpha": 5},
    }
    return spafl.run({**SMALL, **changes}, tmp_path_factory.mktemp("outputs") / "run")


def schema():
    return json.loads(importlib.resources.files("spafl").joinpath("schemas/metrics.schema.json").read_text("utf-8"))


def validators():
    """One for each kind of file."""
    jsonschema = pytest.importorskip("jsonschema")
    whole = schema()
    jsonschema.Draft202012Validator.check_schema(whole)
    make = jsonschema.Draft202012Validator
    parts = {name: make({**whole["$defs"][name], "$defs": whole["$defs"]}) for name in ("client", "partition")}
    # The summary holds a line, which is the schema's root.
    registry = (
        __import__("referencing")
        .Registry()
        .with_resource("metrics.schema.json", __import__("referencing").Resource.from_contents(whole))
    )
    summary = make({"$ref": "metrics.schema.json#/$defs/summary"}, registry=registry)
    return {"line": make(whole), "summary": summary, **parts}


def documents(folder):
    yield "partition", json.loads((folder / "partition.json").read_text())
    if (folder / "summary.json").exists():
        yield "summary", json.loads((folder / "summary.json").read_text())
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        yield "line", json.loads(text)
    for path in (folder / "evaluations").iterdir():
        for text in path.read_text().splitlines():
            yield "client", json.loads(text)


def test_the_files_of_a_run_are_what_the_schema_says(finished):
    checks, seen = validators(), []
    for kind, document in documents(finished.folder):
        checks[kind].validate(document)
        seen.append(kind)
    assert seen.count("line") == 3 and seen.count("client") == 10 and {"partition", "summary"} < set(seen)


@pytest.mark.parametrize(
    "path, value",
    [
        (("evaluation", "accuracy", "mean"), 1.5), (("round",), -1), (("cost", "executed", "steps"), 2.5),
        (("cost", "payload"), {}), (("density", "layers", "conv1"), None), (("sampled",), [1, 1]), (("evaluation",), 0),
    ],
)  # fmt: skip
def test_the_schema_refuses_what_no_run_writes(finished, path, value):
    check = validators()["line"]
    line = json.loads((finished.folder / "metrics.jsonl").read_text().splitlines()[1])
    at = line
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert not check.is_valid(line)


def undescribed(document, described, whole, path=""):
    """Keys of a document of which the schema says nothing."""
    while "$ref" in described:
        described = whole if described["$ref"] == "#" else whole["$defs"][described["$ref"].rpartition("/")[2]]
    for option in described.get("oneOf", ()):
        if document is not None and option != {"type": "null"}:
            yield from undescribed(document, option, whole, path)
    if isinstance(document, dict) and "properties" in described:
        for key, value in document.items():
            if key not in described["properties"]:
                if not isinstance(described.get("additionalProperties"), dict):
                    yield f"{path}.{key}"
            else:
                yield from undescribed(value, described["properties"][key], whole, f"{path}.{key}")


def test_every_field_that_a_run_writes_is_described(finished):
    whole = schema()
    kinds = {"line": whole, **{name: whole["$defs"][name] for name in ("client", "partition", "summary")}}
    for kind, document in documents(finished.folder):
        assert list(undescribed(document, kinds[kind], whole, kind)) == []


@pytest.fixture(scope="module")
def modelled(tmp_path_factory):
    """A run on modelled devices, with every outcome but one: a turn that is too large."""
    from small_problem import SMALL

    board = {"flops": 1e9, "down": 1e6, "up": 1e5, "memory": 1e9, "watts": 2.0}
    system = {"devices": {"board": 2, "slow": 1}, "classes": {"board": board, "slow": {**board, "flops": 2e7}}}
    system |= {"availability": 0.9, "failure": 0.3, "deadline": 3.0, "over_selection": 1.5}
    tiny = {"partition": {**SMALL["partition"], "min_train": 4}, "training": {**SMALL["training"], "batch_size": 64}}
    changes = {"rounds": 6, "system": system, "evaluation": {"every": 6}, **tiny}
    return spafl.run({**SMALL, **changes}, tmp_path_factory.mktemp("modelled") / "run")


@pytest.mark.slow
def test_the_schema_holds_for_modelled_devices(modelled):
    checks, whole = validators(), schema()
    kinds = {"line": whole, **{name: whole["$defs"][name] for name in ("client", "partition", "summary")}}
    for kind, document in documents(modelled.folder):
        checks[kind].validate(document)
        assert list(undescribed(document, kinds[kind], whole, kind)) == []
    lines = [document for kind, document in documents(modelled.folder) if kind == "line"]
    assert {outcome for line in lines for outcome in line["system"]["outcomes"]} >= {"in time", "late", "failed"}
    line = lines[0]
    for wrong in ({"seconds": -1}, {"outcomes": ["lost"]}, {"clients": [1, 1]}, {"away": 0.5}):
        assert not checks["line"].is_valid({**line, "system": {**line["system"], **wrong}})
    assert not checks["line"].is_valid({**line, "system": {"seconds": 1}})


def test_the_schema_knows_every_outcome():
    described = schema()["properties"]["system"]["properties"]
    played = Played(1.0, tuple(Visit(k, outcome, 1.0, 1.0) for k, outcome in enumerate(OUTCOMES)), 0)
    assert described["outcomes"]["items"]["enum"] == list(OUTCOMES) and described.keys() == played.record().keys()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "fedpm", "fjord", "heterofl", "local", "scaffold"])
def test_the_schema_holds_for_other_methods(small, tmp_path, algorithm):
    run = spafl.run({**small, "algorithm": {"name": algorithm}}, tmp_path / "run")
    checks, whole = validators(), schema()
    kinds = {"line": whole, **{name: whole["$defs"][name] for name in ("client", "partition", "summary")}}
    for kind, document in documents(run.folder):
        checks[kind].validate(document)
        assert list(undescribed(document, kinds[kind], whole, kind)) == []


def test_confusion_matrices_are_those_of_the_clients_models(finished):
    config = finished.config
    data = load_data(config)
    parts = cut_data(config, data)
    total = np.zeros((10, 10), dtype=np.int64)
    last = [row for row in finished.client_records() if row["round"] == 3]
    trained = {k for line in spafl.records.lines_of(finished.folder) for k in line["sampled"]}
    for client, part in enumerate(parts.test):
        found = finished.confusion(client=client)
        assert found.sum() == len(part)
        assert np.diag(found).sum() / len(part) == pytest.approx(last[client]["accuracy"])
        np.testing.assert_array_equal(found.sum(1), np.bincount(data.test_y[part], minlength=10))
        if client in trained:
            x = data.transform(torch.from_numpy(data.test_x[part]))
            with torch.no_grad():
                said = finished.model(client)(x).argmax(1).numpy()
            expected = np.zeros((10, 10), dtype=np.int64)
            np.add.at(expected, (data.test_y[part], said), 1)
            np.testing.assert_array_equal(found, expected)
        total += found
    np.testing.assert_array_equal(finished.confusion(), total)
    assert finished.confusion(round=2).sum() == total.sum()
    assert finished.plot("confusion").axes
    for arguments, words in (({"round": 1}, "no confusion matrices of round 1"), ({"client": 5}, "got 5")):
        with pytest.raises(spafl.UserError, match=words):
            finished.confusion(**arguments)


@pytest.mark.slow
def test_counting_confusions_changes_nothing_else(finished, tmp_path):
    raw = finished.config.model_dump()
    plain = spafl.run({**raw, "evaluation": {"every": 2}}, tmp_path / "run")
    for before, after in zip(plain.records(), finished.records()):
        assert {k: v for k, v in before.items() if "seconds" not in k} == {
            k: v for k, v in after.items() if "seconds" not in k
        }
    with pytest.raises(spafl.UserError, match=r"evaluation\.confusion = true records them"):
        plain.confusion()
    assert not plain.data.confused and "What is taken" not in plain.plot("accuracy").axes[0].get_title()


def test_a_damaged_confusion_is_named(tmp_path):
    (tmp_path / "evaluations").mkdir()
    file = tmp_path / "evaluations" / "round-000000.jsonl"
    for value in ([[0, 9, 1]], [[0, 1, -1]], [[0, 1]], 3):
        file.write_text(json.dumps({"client": 0, "confusion": value}) + "\n")
        with pytest.raises(ReportError, match=r"round-000000\.jsonl line 1: confusion is damaged"):
            confusions(tmp_path, 0, 3)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_report_for_other_programs(finished, tmp_path, capsys):
    out = tmp_path / "report"
    formats.write_csv_tables([finished.folder], out)
    formats.write_latex([finished.folder], out)

    def as_text(rows):
        return [{"run": "small", **{k: "" if v is None else str(v) for k, v in row.items()}} for row in rows]

    columns = list(dict.fromkeys(key for row in finished.records() for key in row))
    rounds = [{"run": "small", **{c: row.get(c) for c in columns}} for row in finished.records()]
    assert read(out / "rounds.csv") == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rounds]
    assert read(out / "clients.csv") == as_text(finished.client_records())
    counted = np.zeros((5, 10, 10), dtype=np.int64)
    for row in read(out / "confusion.csv"):
        counted[int(row["client"]), int(row["class"]), int(row["predicted"])] = int(row["samples"])
    np.testing.assert_array_equal(counted.sum(0), finished.confusion())

    lines = (out / "comparison.tex").read_text().splitlines()
    assert lines[0].startswith(r"\begin{tabular}{l") and lines[-1] == r"\end{tabular}"
    cells = len(re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines[0])[1])
    rows = [line for line in lines if line.endswith(r"\\")]
    spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", rows[0]))
    assert rows[0].count("&") + spans == rows[1].count("&") == rows[2].count("&") == cells - 1
    assert r"worst 10 \%" in rows[1] and "small" in rows[2]


@pytest.mark.slow
def test_the_command_writes_all_formats(finished, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["report", str(finished.folder), "--out", str(out), "--csv", "--latex", "--pdf"]) == 0
    printed = capsys.readouterr().out
    names = ("rounds.csv", "clients.csv", "confusion.csv", "comparison.tex", "report.pdf")
    assert all(str(out / name) in printed for name in names)
    pdf = (out / "report.pdf").read_bytes()
    pictures = sorted(p.name for p in out.glob("*.pdf") if p.name != "report.pdf")
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b(?!s)", pdf)) == 1 + len(pictures)
    assert {"accuracy_rounds.pdf", "confusion.pdf", "partition.pdf"} < set(pictures)
    assert sorted(p.stem for p in out.glob("*.png")) == [name[:-4] for name in pictures]


@pytest.mark.slow
def test_the_same_run_gives_the_same_pdf(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PICTURES", formats.PICTURES[-1:])
    first, second = (formats.write_pdf([finished.folder], tmp_path / name)[0].read_bytes() for name in "ab")
    assert first == second


def test_mistakes_of_a_report(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for write in (formats.write_csv_tables, formats.write_latex):
        with pytest.raises(ReportError, match="the report cannot be written"):
            write([finished.folder], tmp_path / "file")
    assert main(["report", str(tmp_path / "none"), "--csv"]) == 2


def test_confusions_need_classes_to_be_resolved_before_a_run(small):
    assert resolve_config({**small, "evaluation": {"confusion": True}}).objective(10).confusion == 10
    assert resolve_config(small).objective(10).confusion == 0

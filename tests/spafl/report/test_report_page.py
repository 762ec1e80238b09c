"""The page: complete, self-contained, escaped, and written whole or not at all."""

import base64
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from steered import steered_run

from spafl.report import ReportError, figures, words, write_report
from spafl.report.run_data import load_run
from spafl.report.table import reached, targets, targets_html

# Runs that record confusions are in test_outputs.py.
PICTURES = [picture for picture in figures.PICTURES if picture.stem not in ("confusion", "steering")]
STEMS = {picture.stem for picture in PICTURES}


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    """The page is tested here, not the resolution; this takes two thirds of the time away."""
    monkeypatch.setattr("spafl.report.page.DPI", 40)


@pytest.fixture
def two_pictures(monkeypatch):
    """Where it matters how files are written rather than what is in them."""
    some = tuple(p for p in figures.PICTURES if p.stem in ("accuracy_spread", "density"))
    monkeypatch.setattr("spafl.report.page.PICTURES", some)


class Reader(HTMLParser):
    """Collects everything a page can refer to, its text, and whether its tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.references, self.images, self.words, self.open, self.tags = [], [], [], [], []
        self.anchors, self.descriptions = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.anchors.append(value)
            if name == "alt":
                self.descriptions.append(value)
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                (self.images if value.startswith("data:image/png;base64,") else self.references).append(value)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(path):
    text = path.read_text()
    return text, Reader(text)


def test_one_run_into_its_own_folder(make_run):
    folder = make_run(rounds=3)
    page = write_report([folder])
    assert page == folder / "report" / "report.html"
    assert {path.name for path in page.parent.iterdir()} == {f"{stem}.png" for stem in STEMS} | {"report.html"}
    text, reader = read(page)
    assert reader.open == [] and set(reader.references) == {f"#{a}" for a in reader.anchors if a != "targets"}
    assert all(reader.descriptions) and len(set(reader.descriptions)) == len(reader.images)
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    assert [base64.b64decode(image.split(",")[1]) for image in reader.images] == [
        (page.parent / f"{picture.stem}.png").read_bytes() for picture in PICTURES
    ]
    assert text.index("<table>") < text.index("<img")
    words = "".join(reader.words)
    for picture in PICTURES:
        assert picture.caption in words and picture.title in words
    assert (folder / "config.toml").read_text() in words and '"torch": "2.13.0"' in words
    assert reader.tags.count("details") == 2 and "<details open" not in text
    assert "prefers-color-scheme: dark" in text


def test_several_runs_are_compared(make_run, tmp_path):
    runs = [make_run(n, name=n, algorithm=n, rounds=3) for n in ("spafl", "fedavg", "local")]
    text, reader = read(write_report(runs, tmp_path / "deep" / "out"))
    assert len(reader.images) == len(STEMS)
    assert "Not in the picture (no thresholds): fedavg, local." in text
    assert all(not (run / "report").exists() for run in runs)


def test_the_result_is_said_first_and_the_pictures_in_words(make_run):
    folder = make_run(rounds=3, seed=4)
    run = load_run(folder)
    text, reader = read(write_report([folder]))
    share = f"{100 * run.last.accuracy:.1f} %"
    said = next(words for words in reader.words if words.startswith("After 3 rounds the 20 clients' models are"))
    assert share in said and text.index("After 3 rounds") < text.index("<table>")
    ends = next(alt for alt in reader.descriptions if alt.startswith("Accuracy over rounds"))
    assert f"to {share} in round 3" in ends


def test_what_an_accuracy_costs(make_run, tmp_path):
    runs = [load_run(make_run(n, name=n, algorithm=n, rounds=6)) for n in ("spafl", "fedavg", "local")]
    best = sorted(max(run.curve("accuracy")[1]) for run in runs)
    wanted = targets(runs)
    assert wanted == sorted({int(100 * best[0]) / 100, int(100 * best[1]) / 100})
    for run in runs:
        for target in wanted:
            point = reached(run, target)
            earlier = [p for p in run.points if p.accuracy >= target]
            assert point == (earlier[0] if earlier else None)
    assert reached(runs[0], 1.01) is None and "not reached" not in targets_html(runs[:1])
    assert targets([load_run(make_run("none", rounds=1, evaluate_every=0))]) == []


def test_every_picture_is_told_in_words():
    assert words._SAYS.keys() == {picture.stem for picture in figures.PICTURES}


def test_the_page_of_a_run_with_budgets(make_run):
    devices = ["board", "board", "phone", "board"] + ["phone"] * 16
    folder, turns = steered_run(make_run, "{phone = {density = 0.5}, board = {macs = 0.2}}", devices)
    text, reader = read(write_report([folder]))
    said = next(alt for alt in reader.descriptions if alt.startswith("Budgets. "))
    assert f"density 0.5 of phone: {100 * turns['density'][-1, 0] / 0.5:.1f} % of it spent in the end" in said
    macs = np.median(turns["macs_share"][-1, 1:]) / 0.2
    assert f"macs 0.2 of board: {100 * macs:.1f} % of it" in said
    assert (folder / "report" / "steering.png").exists() and 'href="#steering"' in text


def test_seeds_are_one_method_where_methods_are_compared(make_run, tmp_path):
    """The luckiest run of a method is not its result."""
    make = [("spafl", 1), ("spafl", 2), ("spafl", 3), ("fedavg", 1)]
    folders = [make_run(f"{n}-{s}", name=f"{n} seed {s}", algorithm=n, seed=s, rounds=6) for n, s in make]
    runs = [load_run(folder) for folder in folders]
    mean = np.mean([run.last.accuracy for run in runs[:3]])
    said = words.headline(runs)
    assert said.startswith(f"Most accurate: spafl (3 seeds; {100 * mean:.1f} %); least sent: spafl (3 seeds; ")
    assert "spafl seed 1 (" in words.headline([runs[0], runs[3]])
    worst = min(max(run.curve("accuracy")[1]) for run in runs[:3])
    assert targets(runs[:3]) == sorted({int(90 * worst) / 100, int(99 * worst) / 100})
    for target in targets(runs):
        points = [reached(run, target) for run in runs[:3]]
        rounds = f"{np.mean([p.round + 1 for p in points]):.0f}" if all(points) else "reached by"
        row = targets_html(runs).split(f"<td>{100 * target:.0f} %</td>")[1]
        assert row.startswith(f'<td class="run">spafl (3 seeds)</td><td>{rounds}')
    text, _ = read(write_report(folders, tmp_path / "out"))
    assert (
        f"spafl (3 seeds; {100 * mean:.1f} %)" in text
        and "<h1>Comparison of spafl (3 seeds), fedavg seed 1</h1>" in text
    )
    assert "spafl (3 seeds): spafl, model lenet5" in text and "spafl seed 2: spafl, model" not in text
    (folders[1] / "summary.json").unlink()
    text, _ = read(write_report(folders, tmp_path / "out"))
    assert "spafl seed 2: spafl, model lenet5, data digits, 20 clients, 6 rounds recorded, not completed" in text


def test_the_accuracies_whose_price_is_told_can_be_chosen(make_run, tmp_path):
    folder = make_run(rounds=6)
    best = max(load_run(folder).curve("accuracy")[1])
    text, _ = read(write_report([folder], accuracies=[0.999, best - 0.125]))
    low, high = (text.index(f"<td>{100 * a:.4g} %</td>") for a in (best - 0.125, 0.999))
    assert low < high and "not reached" in text[high : high + 200] and "not reached" not in text[low:high]
    for bad in (0.0, 90.0, float("nan")):
        with pytest.raises(ReportError, match="accuracies must be fractions above 0, at most 1"):
            write_report([folder], accuracies=[bad])


def test_several_runs_need_a_place(make_run):
    runs = [make_run("a", rounds=1), make_run("b", rounds=1)]
    with pytest.raises(ReportError, match="out must name a folder when several runs are compared; got 2 runs"):
        write_report(runs)
    with pytest.raises(ReportError, match="runs must name at least one run folder; got none"):
        write_report([])


def test_a_run_going_on_without_evaluation(make_run):
    folder = make_run(rounds=2, evaluate_every=0, completed=False)
    text, reader = read(write_report([folder]))
    assert len(reader.images) == 2  # its densities and its partition
    assert (
        "Not shown: accuracy over rounds (not evaluated yet), what accuracy costs (not evaluated yet), accuracy over"
        in text
    )
    assert text.count("(not evaluated yet)") == 5 and "(no train accuracies recorded)." in text
    assert "not completed" in text and "no summary.json" in text


def test_names_are_escaped(make_run, tmp_path):
    nasty = '</title><script>alert("x")</script>&amp;'
    folder = make_run(name=nasty, algorithm="<i>", rounds=2, layers={"<b>": 3})
    summary = json.loads((folder / "summary.json").read_text())
    summary["environment"]["</pre><img src=x>"] = "<u>"
    (folder / "summary.json").write_text(json.dumps(summary))
    _, reader = read(write_report([folder, make_run("other", algorithm="fedavg", rounds=2)], tmp_path / "out"))
    assert {"script", "i", "b", "u"}.isdisjoint(reader.tags) and reader.open == []
    assert all(target.startswith("#") for target in reader.references)
    assert any(nasty in words for words in reader.words)


def test_a_failed_report_leaves_the_former_one(make_run, two_pictures):
    folder = make_run(rounds=2)
    before = write_report([folder]).read_bytes()
    (folder / "partition.json").write_text("{")
    with pytest.raises(ReportError, match=r"partition\.json"):
        write_report([folder])
    assert (folder / "report" / "report.html").read_bytes() == before


def test_a_picture_of_a_former_report_does_not_stay(make_run, tmp_path, two_pictures):
    out = tmp_path / "out"
    write_report([make_run("a", rounds=2)], out)
    (out / "mine.png").write_bytes(b"kept")
    write_report([make_run("b", algorithm="fedavg", rounds=2)], out)
    assert (out / "accuracy_spread.png").exists() and not (out / "density.png").exists()
    assert (out / "mine.png").read_bytes() == b"kept"


def test_the_same_run_gives_the_same_bytes(make_run, tmp_path, two_pictures):
    folder = make_run(rounds=2)
    first, second = (write_report([folder], tmp_path / name) for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_files_are_as_readable_as_the_owner_wants(make_run, two_pictures):
    before = os.umask(0o027)
    try:
        page = write_report([make_run(rounds=1)])
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in page.parent.iterdir()} == {0o640}


def test_a_write_that_breaks_off_leaves_the_old_file_and_no_litter(make_run, monkeypatch, two_pictures):
    folder = make_run(rounds=1)
    page = write_report([folder])
    before = {path.name: path.read_bytes() for path in page.parent.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spafl.report.page.os.replace", full)
    with pytest.raises(ReportError, match="the report cannot be written \\(No space left on device\\)"):
        write_report([folder])
    assert {path.name: path.read_bytes() for path in page.parent.iterdir()} == before


def test_out_that_is_a_file(make_run, tmp_path, two_pictures):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ReportError, match="taken: the report cannot be written"):
        write_report([make_run(rounds=1)], tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_reports_need_neither_torch_nor_a_display():
    unwanted = "'torch', 'spafl_kernels', 'matplotlib.pyplot'"
    code = f"import sys, spafl.report; print([m for m in ({unwanted}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

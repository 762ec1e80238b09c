"""The figures hold the recorded data, in one colour per run, and leave the user's matplotlib alone."""

import dataclasses
import json
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import scipy.stats
from steered import steered_run

from spafl.config import resolve_config
from spafl.cost import Cost
from spafl.report import ReportError, figures
from spafl.report.figures.pareto import front
from spafl.report.figures.sparsity import compared, label_similarity, mask_overlap, rank_correlation
from spafl.report.run_data import load_run, seed_groups

SPAFL, FEDAVG, LOCAL = figures.COLOURS[:3]


@pytest.fixture
def three(make_run):
    return [load_run(make_run(n, name=n, algorithm=n, rounds=6)) for n in ("spafl", "fedavg", "local")]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def curves(axes, colour):
    return [line for line in axes.lines if line.get_color() == colour]


def drawn(figure):
    """Render it; whatever cannot be drawn fails here."""
    figure.draw_without_rendering()  # all layout and text, without the pixels
    return figure


def test_accuracy_over_rounds(three):
    figure = drawn(figures.accuracy_over_rounds(three))
    mean, worst, trained, _ = figure.axes
    for run, colour in zip(three, (SPAFL, FEDAVG, LOCAL)):
        for axes, name in ((mean, "accuracy"), (worst, "accuracy_worst")):
            (line,) = curves(axes, colour)
            assert line.get_xdata().tolist() == [p.round + 1 for p in run.points]
            assert line.get_ydata().tolist() == [getattr(p, name) for p in run.points]
    assert legend(figure) == ["spafl", "fedavg", "local"]
    assert mean.get_ylabel() == "test accuracy, mean (%)" and trained.get_xlabel() == "round"
    (line,) = curves(trained, SPAFL)
    seen, shares = set(), []
    for record in map(json.loads, (three[0].folder / "metrics.jsonl").read_text().splitlines()):
        seen |= set(record["sampled"])
        shares.append(len(seen) / 20)
    np.testing.assert_allclose(line.get_ydata(), shares)


def test_runs_that_differ_in_their_seed_alone_are_a_mean_and_a_band(make_run, three):
    seeds = [load_run(make_run(f"s{i}", name=f"s{i}", rounds=4, seed=i)) for i in range(1, 4)]
    figure = drawn(figures.accuracy_over_rounds([*seeds, three[1]]))
    mean = figure.axes[0]
    values = np.array([run.curve("accuracy")[1] for run in seeds])
    (line,) = curves(mean, SPAFL)
    np.testing.assert_allclose(line.get_ydata(), values.mean(0))
    (band,) = mean.collections
    corners = {(round(x), round(y, 9)) for x, y in band.get_paths()[0].vertices}
    assert {(4, round(values[:, 3].min(), 9)), (4, round(values[:, 3].max(), 9))} <= corners
    assert legend(figure) == ["s1 (3 seeds)", "fedavg"]
    assert len(curves(mean, FEDAVG)) == 1


def test_runs_of_an_experiment_are_called_by_their_method(make_run):
    runs = [load_run(make_run(f"s{s}", name=f"spafl-paper seed {s}", seed=s, rounds=2)) for s in (1, 2)]
    assert legend(drawn(figures.accuracy_against_costs(runs))) == ["spafl-paper (2 seeds)"]


def test_seeds_of_two_releases_are_one_method(make_run):
    """A run that was made before a setting existed did what the setting's first value does."""
    runs = []
    for seed, early in ((1, True), (2, False)):
        folder = make_run(f"s{seed}", name=f"ours seed {seed}", algorithm="fedavg", seed=seed, rounds=1)
        asked = {
            "seed": seed, "name": f"ours seed {seed}", "algorithm": {"name": "fedavg"}, "model": {"name": "lenet5"},
            "data": {"name": "digits"}, "partition": {"clients": 20},
        }  # fmt: skip
        settings = resolve_config(asked).to_toml()
        earlier = [line for line in settings.splitlines() if not early or not line.startswith(("confusion", "dtype"))]
        (folder / "config.toml").write_text("\n".join(earlier))
        runs.append(load_run(folder))
    assert "confusion" in runs[1].config and "confusion" not in runs[0].config
    assert seed_groups(runs) == [[0, 1]]
    other = dataclasses.replace(runs[1], config=runs[1].config.replace("confusion = false", "confusion = true"))
    assert seed_groups([runs[0], other]) == [[0], [1]]


def test_the_same_seed_twice_is_no_spread(make_run):
    runs = [load_run(make_run(n, name=n, rounds=2)) for n in ("a", "b")]
    assert seed_groups(runs) == [[0], [1]]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_beats(seed):
    rng = np.random.default_rng(seed)
    costs, values = rng.integers(0, 6, 12).astype(float), rng.integers(0, 6, 12) / 5
    unbeaten = {
        (c, v)
        for c, v in zip(costs, values)
        if not any((c2 <= c and v2 >= v) and (c2, v2) != (c, v) for c2, v2 in zip(costs, values))
    }
    best = front(costs, values)
    assert {(costs[i], values[i]) for i in best} == unbeaten
    assert all(a < b for a, b in pairwise(costs[best]))


def test_the_front_joins_the_medians_of_seeds(make_run):
    """The luckiest seed of a method is none of its ends."""
    seeds = [load_run(make_run(f"s{s}", seed=s, rounds=3)) for s in (1, 2, 3)]
    other = load_run(make_run("other", name="other", algorithm="fedavg", rounds=3))
    payload, *_ = drawn(figures.accuracy_against_costs([*seeds, other])).axes
    (joined,) = [line for line in payload.lines if line.get_linestyle() == ":" and line.get_color() == "#888888"]
    ends = np.array([[run.last.cost.payload_bytes, run.last.accuracy] for run in seeds])
    xy = np.column_stack([joined.get_xdata(), joined.get_ydata()])
    np.testing.assert_allclose(xy[0], np.median(ends, axis=0))


def test_seeds_are_one_way_one_mark_and_their_spread(make_run):
    seeds = [load_run(make_run(f"s{s}", seed=s, rounds=3)) for s in (1, 2, 3)]
    payload, *_, seconds = drawn(figures.accuracy_against_costs(seeds)).axes
    for axes, cost in ((payload, "payload_bytes"), (seconds, "total_seconds")):
        ways = np.array([[(getattr(p.cost, cost), p.accuracy) for p in run.points] for run in seeds])
        found = [np.column_stack([c.get_xdata(), c.get_ydata()]) for c in curves(axes, SPAFL)]
        (end,) = [line for line in found if len(line) == 1]
        np.testing.assert_allclose(end[0], np.median(ways[:, -1], axis=0))
        (way,) = [line for line in found if len(line) == 3]
        np.testing.assert_allclose(way, np.median(ways, axis=0))
        spread = [line for line in found if len(line) == 2]
        least, most = ways[:, -1].min(0), ways[:, -1].max(0)
        assert any(np.allclose(line[:, 0], [least[0], most[0]]) and (line[:, 1] == end[0, 1]).all() for line in spread)
        assert any(np.allclose(line[:, 1], [least[1], most[1]]) and (line[:, 0] == end[0, 0]).all() for line in spread)


def test_accuracy_against_costs_ends_where_the_runs_end(three):
    figure = drawn(figures.accuracy_against_costs(three))
    payload, macs, seconds = figure.axes
    for axes, cost in ((payload, "payload_bytes"), (seconds, "total_seconds")):
        for run, colour in zip(three[:2], (SPAFL, FEDAVG)):
            (end,) = [line for line in curves(axes, colour) if len(line.get_xdata()) == 1]
            assert (end.get_xdata()[0], end.get_ydata()[0]) == (getattr(run.last.cost, cost), run.last.accuracy)
    assert [text.get_text() for text in macs.texts] == ["spafl"]  # the others count no operations
    assert "local (none)" in [text.get_text() for text in payload.texts]


@pytest.mark.parametrize("name", ["method", "spafl-paper penalty=.001 prune_head=as-built"])
def test_many_runs_are_named_beside_the_panels(make_run, name):
    """In the order of their ends, each by a mark of its own, and nothing is cut off."""
    runs = [load_run(make_run(f"r{i}", name=f"{name} {i}", seed=i, clients=12 + i)) for i in range(16)]
    figure = drawn(figures.accuracy_against_costs(runs))
    by_height = [run.name for run in sorted(runs, key=lambda run: -run.last.accuracy)]
    box = figure.get_window_extent()
    for axes in figure.axes:
        assert [text.get_text().removesuffix(" (none)") for text in axes.texts] == by_height
        marks = {(line.get_marker(), line.get_color()) for line in axes.lines if line.get_transform() == axes.transAxes}
        assert len(marks) == 16
        for text in axes.texts:
            place = text.get_window_extent()
            assert box.x0 <= place.x0 and place.x1 <= box.x1 and box.y0 <= place.y0 and place.y1 <= box.y1
        low, high = axes.get_ylim()
        assert all(low <= run.last.accuracy <= high for run in runs)


def test_every_clients_accuracy_in_every_round(three):
    over, against, *_ = drawn(figures.accuracy_by_client(three[:1])).axes
    rounds, values = three[0].history
    assert rounds.tolist() == [0, 1, 2, 3, 4, 5] and values.shape == (6, 20)
    np.testing.assert_allclose(np.sort(values[-1]), over.collections[0].get_array().reshape(20, 6)[:, -1])
    np.testing.assert_allclose(against.collections[0].get_offsets()[:, 0], three[0].train.sum(axis=1))
    np.testing.assert_allclose(against.collections[0].get_offsets()[:, 1], three[0].accuracies, atol=1e-6)


def test_overlap_likeness_and_rank_correlation_by_hand():
    kept = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=bool)
    np.testing.assert_allclose(mask_overlap(kept)[:, :2], [[1, 1 / 3], [1 / 3, 1], [0, 0], [0, 0]])
    assert mask_overlap(kept)[2, 3] == 1
    np.testing.assert_allclose(label_similarity(np.array([[3, 0], [3, 3], [0, 0]]))[0], [1, 0.5**0.5, 0])
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 50), rng.normal(size=50)
    assert rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert rank_correlation(np.ones(5), b[:5]) == 0


def test_of_many_clients_some_are_compared(make_run):
    run = load_run(make_run(rounds=1, clients=700))
    overlap, alike = compared(run)
    assert overlap.shape == alike.shape == (300, 300) and (np.diag(overlap) == 1).all()
    panel = drawn(figures.masks_and_labels([run])).axes[0]
    assert panel.get_ylabel() == "spafl, round 1, 300 of 700 clients"
    few = load_run(make_run("few", rounds=1, clients=9))
    assert compared(few)[0].shape == (9, 9)


def test_accuracy_over_payload_is_logarithmic_where_runs_are_far_apart(three):
    figure = drawn(figures.accuracy_over_payload(three))
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    for run, colour in zip(three[:2], (SPAFL, FEDAVG)):
        (line,) = curves(axes, colour)
        assert line.get_xdata().tolist() == [p.cost.up_bytes + p.cost.down_bytes for p in run.points]
    (level,) = curves(axes, LOCAL)
    assert set(level.get_ydata()) == {three[2].last.accuracy}
    assert legend(figure) == ["spafl", "fedavg", "local (none)"]
    assert "bytes" in axes.get_xlabel()


def test_accuracy_over_payload_is_linear_where_they_are_not(three, make_run):
    twice = load_run(make_run("twice", name="twice", rounds=6, up_bytes=50_000))
    assert drawn(figures.accuracy_over_payload([three[0], twice])).axes[0].get_xscale() == "linear"


def test_a_run_that_sends_nothing_alone(three):
    (axes,) = drawn(figures.accuracy_over_payload(three[2:])).axes
    assert len(axes.lines) == 1 and axes.get_xticks().size == 0


@pytest.mark.parametrize(("factor", "unit", "size"), [(1, "seconds", 1), (100, "minutes", 60), (4000, "hours", 3600)])
def test_accuracy_over_seconds_in_a_unit_that_suits(three, factor, unit, size):
    run = three[0]
    points = tuple(dataclasses.replace(p, cost=Cost(train_seconds=factor * p.cost.total_seconds)) for p in run.points)
    (axes,) = drawn(figures.accuracy_over_seconds([dataclasses.replace(run, points=points)])).axes
    assert axes.get_xlabel() == f"measured time ({unit})"
    assert axes.lines[0].get_xdata().tolist() == [p.cost.total_seconds / size for p in points]


def test_accuracy_spread_is_the_sorted_clients(three):
    (axes,) = drawn(figures.accuracy_spread(three)).axes
    for run, colour in zip(three, (SPAFL, FEDAVG, LOCAL)):
        (line,) = curves(axes, colour)
        assert line.get_ydata().tolist() == sorted(run.accuracies)
        assert line.get_xdata()[0] == 2.5 and line.get_xdata()[-1] == 97.5  # 20 clients of 5 % each


def test_a_run_keeps_its_colour_where_others_are_left_out(three):
    figure = drawn(figures.density_per_layer([three[1], three[0], three[2]]))
    assert legend(figure)[-2:] == [
        "mean of layers",
        "by parameters",
    ]  # the only run with thresholds, so its layers share the axes
    (axes,) = drawn(figures.accuracy_spread([dataclasses.replace(three[0], points=three[0].points[:0]), three[1]])).axes
    assert [line.get_color() for line in axes.lines] == [FEDAVG]


def test_density_of_one_run_by_layer(three):
    (axes,) = drawn(figures.density_per_layer(three)).axes
    layers = three[0].layers
    for line, layer in zip(axes.lines, layers):
        assert list(line.get_ydata()) == [p.layer_density[layer] for p in three[0].points]
    *_, mean, parameters = axes.lines
    assert list(mean.get_ydata()) == [p.density for p in three[0].points]
    assert list(parameters.get_ydata()) == [p.density_parameters for p in three[0].points]
    assert len(axes.lines) == len(layers) + 2


def test_density_of_several_runs_has_axes_per_layer(three, make_run):
    other = load_run(make_run("other", name="other", rounds=4, layers={"conv1": 8, "fc9": 3}, seed=5))
    figure = drawn(figures.density_per_layer([three[0], other]))
    shown = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert list(shown) == ["conv1", "conv2", "fc3", "fc4", "fc9", "by parameters"]
    (line,) = curves(shown["by parameters"], FEDAVG)
    assert list(line.get_ydata()) == [p.density_parameters for p in other.points]
    assert len(shown["conv1"].lines) == 2 and len(shown["fc3"].lines) == len(shown["fc9"].lines) == 1
    (line,) = curves(shown["fc9"], FEDAVG)  # the second colour: it is the second run
    assert list(line.get_ydata()) == [p.layer_density["fc9"] for p in other.points]
    assert legend(figure) == ["spafl", "other"]


def test_densities_of_seeds_have_one_name(make_run):
    runs = [load_run(make_run(f"s{s}", name=f"ours seed {s}", seed=s, rounds=2)) for s in (1, 2)]
    figure = drawn(figures.density_per_layer(runs))
    assert legend(figure) == ["ours (2 seeds)"] and len(figure.axes[0].lines) == 2


def test_filters_are_the_masks(three):
    image, share = drawn(figures.filters_by_client(three)).axes
    kept = three[0].masks.layers["conv1"]
    np.testing.assert_array_equal(np.asarray(image.images[0].get_array()), kept.T)
    np.testing.assert_allclose([bar.get_width() for bar in share.patches], 100 * kept.mean(axis=0))
    assert image.get_title(loc="left") == "spafl: conv1, round 6"


@pytest.mark.parametrize(("clients", "strips"), [(20, 1), (250, 1), (251, 2), (1000, 4), (3000, 8)])
def test_many_clients_wrap_and_none_is_lost(make_run, clients, strips):
    run = load_run(make_run(clients=clients, rounds=1, layers={"conv1": 6}))
    figure = figures.filters_by_client([run])
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == strips
    np.testing.assert_array_equal(np.hstack([np.asarray(i.get_array()) for i in images]), run.masks.everywhere.T)
    edges = [i.get_extent()[:2] for i in images]
    assert edges[0][0] == -0.5 and edges[-1][1] == clients - 0.5
    assert all(left[1] == right[0] for left, right in pairwise(edges))


def test_filters_are_of_the_layer_in_which_clients_differ(make_run, as_now):
    masks = {"conv1": ["11"] * 3, "conv2": ["101", "011", "111"], "fc": ["1000"] * 3}
    run = load_run(as_now(make_run(clients=3, rounds=1), masks))
    image, _ = drawn(figures.filters_by_client([run])).axes
    np.testing.assert_array_equal(np.asarray(image.images[0].get_array()), run.masks.layers["conv2"].T)
    assert image.get_title(loc="left") == "spafl: conv2, round 1"
    overlap, _ = compared(run)
    np.testing.assert_allclose(np.sort(overlap[np.triu_indices(3, 1)]), [4 / 6, 5 / 6, 5 / 6])


@pytest.mark.parametrize("filters", [81, 80])
def test_filters_that_nobody_keeps_are_left_out_where_rows_are_thin(make_run, as_now, filters):
    """Rows keep the numbers of their filters, and the title counts what is not there."""
    kept = {7: "110", 40: "111", filters - 1: "001"}
    masks = {"fc": ["".join(kept.get(f, "000")[client] for f in range(filters)) for client in range(3)]}
    run = load_run(as_now(make_run(clients=3, rounds=1), masks))
    image, share = drawn(figures.filters_by_client([run])).axes
    rows, title = (sorted(kept), "; 3 of its 81 filters, nobody keeps the others") if filters > 80 else (range(80), "")
    np.testing.assert_array_equal(np.asarray(image.images[0].get_array()), run.masks.layers["fc"].T[rows])
    assert len(share.patches) == len(rows)
    assert image.get_title(loc="left") == f"spafl: fc, round 1{title}"
    assert [image.yaxis.get_major_formatter()(row, 0) for row in (-1, 0, 0.5, 1, len(rows) - 1, len(rows))] == [
        "", str(rows[0]), "", str(rows[1]), str(filters - 1), ""
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fc", "shown"), [(["11"] * 3, []), (["10"] * 3, ["filters"]), (["10", "01", "11"], ["filters", "overlap"])]
)
def test_where_nothing_is_pruned_there_is_no_solid_block(make_run, as_now, fc, shown):
    run = load_run(as_now(make_run(clients=3, rounds=1), {"conv1": ["11"] * 3, "fc": fc}))
    assert [p.stem for p in figures.PICTURES if p.stem in ("filters", "overlap") and p.shows(run)] == shown


def test_gap_against_density_beside_runs_without_thresholds(three):
    figure = drawn(figures.generalisation_gap(three))
    sparse, bare = figure.axes
    (points,) = sparse.collections
    np.testing.assert_array_equal(points.get_offsets(), np.column_stack([three[0].gaps.density, three[0].gaps.gap]))
    for run, points in zip(three[1:], bare.collections, strict=True):
        np.testing.assert_array_equal(points.get_offsets()[:, 1], run.gaps.gap)
    assert bare.get_xlabel() == "no thresholds"
    for alike in (three[:1], three[1:]):
        assert len(drawn(figures.generalisation_gap(alike)).axes) == 1


def test_partition_shows_the_counts_once_for_runs_that_share_it(three, make_run):
    figure = drawn(figures.partition(three))
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 2
    for image, counts in zip(images, (three[0].train, three[0].test)):
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), 0), counts.T)
    np.testing.assert_array_equal(figure.axes[0].patches[0].get_data().values, three[0].train.sum(axis=1))
    assert figure.axes[0].get_title(loc="left") == "digits, 20 clients: spafl, fedavg, local"
    other = load_run(make_run("other", name="other", rounds=1, seed=9, clients=7))
    assert sum(bool(axes.images) for axes in drawn(figures.partition([*three, other])).axes) == 4


@pytest.mark.parametrize("picture", [p for p in figures.PICTURES if p.stem != "partition"], ids=lambda p: p.stem)
def test_nothing_to_show_is_said(make_run, picture):
    run = load_run(make_run(algorithm="fedavg", rounds=2, evaluate_every=0))
    assert not picture.shows(run)
    with pytest.raises(ReportError, match="no r"):
        picture.draw([run])


@pytest.mark.parametrize(("rounds", "clients"), [(1, 1), (2, 2)])
def test_the_smallest_runs_can_be_drawn(make_run, rounds, clients):
    run = load_run(make_run(rounds=rounds, clients=clients, layers={"fc": 1}))
    for picture in figures.PICTURES:
        if picture.shows(run):
            drawn(picture.draw([run]))


@pytest.mark.parametrize("name", ["$a_b$", "_hidden", "a$b", r"\frac{", "x" * 300, "%s {0}"])
def test_any_name_can_be_drawn(make_run, name):
    run = load_run(make_run(name=name, rounds=2, layers={"$l$": 3, "_m": 2}))
    figure = drawn(figures.accuracy_spread([run]))
    assert len(legend(figure)) == 1 and len(legend(figure)[0]) <= 42
    drawn(figures.density_per_layer([run]))
    drawn(figures.partition([run, run]))


def test_many_runs_can_be_told_apart(three):
    runs = [dataclasses.replace(three[0], name=f"run {i}") for i in range(9)]
    (axes,) = drawn(figures.accuracy_spread(runs)).axes
    looks = {(line.get_color(), line.get_linestyle(), str(line._dash_pattern)) for line in axes.lines}
    assert len(looks) == 9


def test_the_users_settings_neither_matter_nor_change(three):
    plain = drawn(figures.accuracy_spread(three)).get_facecolor()
    with matplotlib.rc_context({"axes.facecolor": "black", "text.usetex": True, "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        figure = figures.accuracy_spread(three)
        assert dict(matplotlib.rcParams) == before
    assert drawn(figure).get_facecolor() == plain
    assert {line.get_linewidth() for line in figure.axes[0].lines} == {figures.STYLE["lines.linewidth"]}


def test_the_path_of_a_coefficient(make_run):
    path, turns = steered_run(make_run, "{macs = 0.25}")
    run = load_run(path)
    coefficient, set_point, spent = drawn(figures.steered([run])).axes
    for panel, values in ((coefficient, turns["coefficient"]), (set_point, turns["set_point"])):
        (line,) = curves(panel, SPAFL)
        assert line.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(line.get_ydata(), np.median(values, axis=1))
    np.testing.assert_allclose(curves(spent, SPAFL)[0].get_ydata(), np.median(turns["macs_share"], axis=1) / 0.25)
    assert spent.get_ylabel() == "spent, % of the budget"


def test_the_paths_of_budgets_by_class(make_run):
    devices = ["board", "board", "phone", "board"] + ["phone"] * 16
    path, turns = steered_run(make_run, "{phone = {density = 0.5}, board = {macs = 0.2}}", devices)
    run = load_run(path)
    figure = drawn(figures.steered([run]))
    assert legend(figure) == ["density 0.5, phone", "operations 0.2, board"]
    spent = figure.axes[2]
    np.testing.assert_allclose(curves(spent, SPAFL)[0].get_ydata(), turns["density"][:, 0] / 0.5)
    np.testing.assert_allclose(
        curves(spent, FEDAVG)[0].get_ydata(), np.median(turns["macs_share"][:, 1:], axis=1) / 0.2
    )


def test_turns_that_are_not_of_the_target_are_said(make_run):
    with pytest.raises(ReportError, match=r"turns are not those of algorithm\.target"):
        load_run(steered_run(make_run, "{minutes = 0.25}")[0])

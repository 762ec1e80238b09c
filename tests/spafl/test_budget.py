"""Budgets: the model of a turn, the controller on plants it does not know, and whole runs that keep to them."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from spafl.algorithms import Upload
from spafl.algorithms.budget import (
    FLOOR,
    RATE,
    Budget,
    asked_for,
    budget_for,
    check_target,
    corrected,
    densities_of,
    first_set_point,
    predicted,
    push_for,
    pushed,
    reached,
    travel_of,
)
from spafl.algorithms.spafl import VARIANTS, SpaFL, SpaFLOptions
from spafl.config import deep_merge, resolve_config
from spafl.errors import UserError
from spafl.report.run_data import load_run
from spafl.simulation import run
from spafl_kernels import ThresholdLinear, threshold_layers
from spafl_kernels.training import MaskedTrainer, SGDOptions


def mean(densities):
    return sum(densities) / len(densities)


def density_of(scores, thresholds):
    return mean(densities_of(scores, thresholds))


def layers(seed, sizes=(6, 16, 80), spread=0.4):
    generator = torch.Generator().manual_seed(seed)
    scores = [0.1 * (1 + spread * torch.rand(n, generator=generator)) for n in sizes]
    return scores, [0.3 * s.min() * torch.rand(len(s), generator=generator) for s in scores]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("density", [0.3, 0.5, 0.77, 1.0])
def test_a_push_along_the_penalty_gives_the_density(seed, density):
    """Against the differential equation, integrated in small steps."""
    scores, thresholds = layers(seed)
    push = push_for(scores, thresholds, mean, density).common
    taus = [t.double() for t in thresholds]
    for _ in range(200):
        taus = [t + push / 200 * torch.exp(-t) for t in taus]
    step = max(1 / (len(s) * len(scores)) for s in scores)
    assert density_of(scores, taus) == pytest.approx(density, abs=step)


def test_operations_are_predicted_as_in_a_chain():
    assert predicted("macs", [0.5, 0.25, 1.0], [10, 100, 20]) == pytest.approx((5 + 100 * 0.125 + 20 * 0.25) / 130)
    assert predicted("density", [0.5, 0.25, 0.75], [1, 2, 3]) == 0.5
    scores, thresholds = layers(3, (40, 60, 80))
    push = push_for(scores, thresholds, lambda d: predicted("macs", d, [10, 100, 20]), 0.3).common
    left = densities_of(scores, [torch.log(t.exp() + push) for t in thresholds])
    assert predicted("macs", left, [10, 100, 20]) == pytest.approx(0.3, abs=0.02)


def test_nothing_is_pushed_where_nothing_has_to_change():
    scores = [torch.linspace(0.1, 0.2, 11)]
    assert push_for(scores, [torch.full((11,), 0.145)], mean, 6 / 11).common == 0.0
    assert push_for(scores, [torch.zeros(11)], mean, 1.0).common == 0.0
    assert push_for(scores, [torch.full((11,), 0.5)], mean, 1.0).common < math.exp(0.1) - math.exp(0.5)


def test_above_one_thresholds_are_pulled_harder():
    scores, high = [torch.linspace(0.1, 0.2, 11)], [torch.full((11,), 0.3)]
    once, twice = (push_for(scores, high, mean, asked) for asked in (1.0, 2.0))
    assert twice.common == pytest.approx(2 * once.common) and once.common < 0
    assert not once.limited and not twice.limited
    nothing = push_for(scores, [torch.zeros(11)], mean, 2.0)
    assert nothing.common == 0 and nothing.limited


def test_thresholds_are_pulled_down_for_a_higher_density():
    scores, thresholds = layers(1)
    high = [t + 0.11 for t in thresholds]
    assert density_of(scores, high) < 0.4
    push = push_for(scores, high, mean, 0.9).common
    assert push < 0
    assert density_of(scores, [torch.log(t.exp() + push) for t in high]) == pytest.approx(0.9, abs=0.06)


@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
def test_a_push_made_at_once_gives_the_density(density):
    """Up and down: the scores know of no threshold below 0, and thresholds stay finite."""
    scores, thresholds = layers(4)
    thresholds = [t + 0.08 for t in thresholds]
    push = push_for(scores, thresholds, mean, density)
    after = [pushed(t, a) for t, a in zip(thresholds, push.layers, strict=True)]
    assert density_of(scores, after) == pytest.approx(density, abs=1 / (len(scores[0]) * len(scores)))
    assert all(t.isfinite().all() and t.dtype == s.dtype for t, s in zip(after, scores, strict=True))


def test_a_pull_ends_at_0_and_leaves_what_is_below():
    """One threshold far below the others would end all of a layer at minus infinity, if the others are to come to 0."""
    threshold = torch.tensor([-0.4, 0.0, 0.9, 1.5])
    assert torch.allclose(pushed(threshold, 1 - math.exp(1.5)), torch.tensor([-0.4, 0.0, 0.0, 0.0]), atol=1e-6)


@pytest.mark.parametrize("density, others", [(0.2, 0.0), (0.9, 1.5)], ids=["pushed", "pulled"])
def test_thresholds_that_data_took_far_down_neither_run_away_nor_jump(small, tmp_path, monkeypatch, density, others):
    """From -88, ``exp(-tau)`` is not a float32; from -14, a step of the penalty would end at thousands."""
    first = SpaFL.server_state

    def far_down(self, model):
        state = first(self, model)
        for threshold in state.values():
            threshold.fill_(others)[::2] = torch.linspace(-100, -8, len(threshold[::2]))
        return state

    monkeypatch.setattr(SpaFL, "server_state", far_down)
    changes = {"algorithm": {"target": {"density": density}, "importance": "none"}, "rounds": 2}
    run(resolve_config(deep_merge(small, changes)), tmp_path / "run")
    (saved,) = (tmp_path / "run" / "checkpoints").glob("round-*1/server.safetensors")
    server = {name: t for name, t in load_file(saved).items() if name.endswith("threshold")}
    assert server and all(t.min() > FLOOR - 1 and t.max() < 2 for t in server.values())


def test_a_layers_last_filters_are_spared_and_the_others_go_on():
    scores, thresholds = layers(2)
    scores[1] = scores[1] / 10  # would be the first to go
    thresholds = [t / 100 for t in thresholds]
    push = push_for(scores, thresholds, mean, 0.35, 0.1)
    left = densities_of(scores, [torch.log(t.exp() + a) for t, a in zip(thresholds, push.layers, strict=True)])
    assert left[1] == pytest.approx(2 / 16) and push.layers[1] < push.common == push.layers[0] == push.layers[2]
    assert mean(left) == pytest.approx(0.35, abs=0.07) and not push.limited
    all_gone = push_for(scores, thresholds, mean, 0.001, 0.1)
    left = densities_of(scores, [torch.log(t.exp() + a) for t, a in zip(thresholds, all_gone.layers, strict=True)])
    assert all_gone.limited and left == [pytest.approx(2 / 6), pytest.approx(2 / 16), pytest.approx(9 / 80)]
    # A layer that has fewer is pulled back.
    pulled = push_for(scores, [thresholds[0], thresholds[1] + 1, thresholds[2]], mean, 0.35)
    assert pulled.layers[1] < 0 < pulled.layers[0]
    alone = push_for([torch.tensor([0.5])], [torch.tensor([0.0])], mean, 0.01)
    assert math.log(1 + alone.layers[0]) < 0.5 and alone.limited


@pytest.mark.parametrize("momentum, lifetime", [(0.0, False), (0.9, False), (0.9, True)])
def test_the_coefficient_moves_thresholds_as_far_as_meant(momentum, lifetime):
    """A trainer on a loss without a gradient: only the penalty acts."""
    from test_training import PLAIN, client

    torch.manual_seed(0)
    layer = ThresholdLinear(40, 50, bias=False)
    scores = [layer.scores().detach()]
    push = push_for(scores, [layer.threshold.detach()], mean, 0.4).common
    some = client(PLAIN.__class__(**{**vars(PLAIN), "lr": 0.01, "momentum": momentum, "epochs": 40}))
    steps = some.planned_steps
    c = push / travel_of(some, 0, lifetime)
    state = {n: torch.zeros_like(p) for n, p in layer.named_parameters()}
    if lifetime:  # momentum as it is after many turns with the same coefficient
        state["threshold"].fill_(-c / (1 - momentum))
    trainer = MaskedTrainer(layer, lambda out, y: (out * 0).sum())
    trainer.begin(SGDOptions(0.01, momentum, penalty=c), state)
    for _ in range(steps):
        trainer.step(torch.ones(2, 40), torch.zeros(2))
    trainer.finish()
    assert layer.density() == pytest.approx(0.4, abs=0.08)  # scores lie close together
    assert next(iter(threshold_layers(layer)))[1] is layer


PLANTS = {
    "density": lambda p: p,
    "density, half ignored": lambda p: p + 0.3 * (1 - p),
    "macs": lambda p: 0.05 + 0.95 * p**1.5,
    "seconds": lambda p: 4 + 60 * p,
}


@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.parametrize("start", [1.0, 0.02])
def test_the_controller_settles_on_plants_it_does_not_know(name, start):
    """With noise of 10 %, from far above and far below, without leaving its bounds; later turns are within 5 %."""
    plant, generator = PLANTS[name], torch.Generator().manual_seed(4)
    kind = name.split(",")[0]
    budget = Budget(kind, {"density": 0.4, "macs": 0.25, "seconds": 20.0}[kind])
    set_point, before, density, measured = first_set_point(budget), 1.0, start, []
    for _ in range(60):
        asked = asked_for(set_point, before, density)
        assert RATE * min(before, density) - 1e-12 <= asked <= max(before, density) / RATE + 1e-12
        before = asked
        noise = 1 + 0.1 * (2 * torch.rand((), generator=generator).item() - 1)
        brought = plant(asked) * noise
        measured.append(brought)
        density = min(1.0, brought if kind == "density" else asked)
        set_point = corrected(set_point, asked, budget, brought)
        assert 0 < set_point <= 4
    last = sum(measured[-20:]) / 20
    assert last == pytest.approx(budget.value, rel=0.05)
    steps = [abs(b / a - 1) for a, b in zip(measured[-20:], measured[-19:], strict=False)]
    assert max(steps) < 0.4  # nothing grows


def test_the_set_point_stands_still_while_the_turn_is_limited():
    budget = Budget("density", 0.1)
    assert corrected(0.1, 0.95, budget, 0.9) == 0.1
    assert corrected(0.1, 0.1, budget, 0.2) == pytest.approx(0.1 * 0.5**0.5)


def test_budgets_by_class_of_device():
    target = {"phone": {"density": 0.5}, "board": {"macs": 0.25}}
    check_target(target)
    assert budget_for(target, "phone") == Budget("density", 0.5)
    assert (
        budget_for(target, "other") is None and budget_for(target, None) is None and budget_for(None, "phone") is None
    )
    assert budget_for({"macs": 1}, None) == Budget("macs", 1.0)


@pytest.mark.parametrize(
    "tables, text",
    [
        ({"density": 0.0}, "algorithm.target: density must be a number in (0, 1]; got 0.0"),
        ({"density": "low"}, "algorithm.target: density must be a number in (0, 1]; got 'low'"),
        (
            {"density": 0.3, "macs": 0.2},
            "algorithm.target: a budget is one of density, macs, seconds; got density, macs",
        ),
        ({}, "algorithm.target: a budget is one of density, macs, seconds; got nothing"),
        ({"flops": 0.3}, "got flops"),
        ({"phone": {"density": 0.3}, "macs": 0.3}, "cannot be mixed; macs is no class"),
        ({"phone": {"density": 2}}, "algorithm.target: phone: density must be"),
        ({"phone": {"density": 0.5}}, "algorithm.target.phone: no client has such a device; there is no [system]"),
        ({"seconds": 5.0}, "seconds are those of modelled devices; they need [system]"),
        ({"macs": 0.5}, "the masked engine computes pruned filters too"),
    ],
)
def test_targets_that_are_none_are_refused_in_one_line(small, tables, text):
    with pytest.raises(UserError) as caught:
        resolve_config(deep_merge(small, {"algorithm": {"target": tables}}))
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"training": {"optimizer": "adam"}}, r"needs training\.optimizer = sgd, got adam"),
        ({"algorithm": {"trained": "weights"}}, r"target steers thresholds, which trained = weights freezes"),
    ],
)
def test_what_cannot_be_steered_is_refused(small, tmp_path, change, text):
    tables = deep_merge(small, {"algorithm": {"target": {"density": 0.5}, "importance": "none"}})
    with pytest.raises(UserError, match=text):
        run(resolve_config(deep_merge(tables, change)), tmp_path / "run")


def test_what_was_reached_is_the_mean_of_the_last_tenth():
    def line(density, macs):
        return {"turns": {"clients": [3, 0], "density": density, "macs_share": macs}}

    lines = [line([1.0, 1.0], [1.0, 1.0])] * 10 + [line([0.2, 0.4], [0.1, None])] * 2
    assert reached({"density": 0.3}, lines, None)["all"]["reached"] == pytest.approx(0.3)
    by_class = reached({"a": {"density": 0.3}, "b": {"macs": 0.2}}, lines, ["b", "a", "a", "a"])
    assert by_class["a"] == {"kind": "density", "budget": 0.3, "reached": pytest.approx(0.2), "turns": 2}
    assert by_class["b"] == {"kind": "macs", "budget": 0.2, "reached": None, "turns": 0}


def lines_of(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_coefficients_path_is_recorded_and_resumed(small, tmp_path):
    from folders import assert_same_folders

    tables = deep_merge(small, {"algorithm": {"target": {"macs": 0.5}}, "simulation": {"engine": "compact"}})
    run(resolve_config(tables), tmp_path / "whole")
    run(resolve_config({**tables, "rounds": 1}), tmp_path / "cut")
    run(resolve_config(tables), tmp_path / "cut", resume=True)
    assert_same_folders(tmp_path / "whole", tmp_path / "cut")
    lines = lines_of(tmp_path / "whole")
    for line in lines:
        turns = line["turns"]
        assert sorted(turns["clients"]) == sorted(line["sampled"])
        assert len(turns["coefficient"]) == len(turns["macs_share"]) == 3
        assert line["cost"]["payload"]["up_bytes"] == 4 * 580 * 3 * (line["round"] + 1)  # thresholds alone travel
    assert lines[0]["turns"]["macs_share"] == [pytest.approx(1.0, rel=0.02)] * 3  # nothing was pruned at the start
    assert len({c for line in lines for c in line["turns"]["coefficient"]}) > 6
    (met,) = load_run(tmp_path / "whole").budgets
    assert (met.name, met.kind, met.budget) == ("all", "macs", 0.5)
    assert met.reached == pytest.approx(mean(lines[-1]["turns"]["macs_share"]))


def test_operations_are_steered_where_skipping_is_not_expected_to_be_faster(small, tmp_path, monkeypatch):
    """Engine ``auto`` would run such a model masked, where nothing that is pruned is saved."""
    from spafl_kernels.compact.plan.estimate import Judge

    monkeypatch.setattr(Judge, "gain", lambda *_: 0.5)
    simulation = {"simulation": {"engine": "auto"}, "rounds": 1}
    run(resolve_config(deep_merge(small, {"algorithm": {"target": {"macs": 0.5}}, **simulation})), tmp_path / "steered")
    (line,) = lines_of(tmp_path / "steered")
    assert len(line["turns"]["macs_share"]) == 3
    of_density = resolve_config(deep_merge(small, {"algorithm": {"target": {"density": 0.5}}, **simulation}))
    assert not of_density.build_algorithm().needs_skipping


def on_digits(target, clients=10, **tables):
    return {
        "rounds": 100,
        "data": {"name": "digits"},
        "partition": {"scheme": "dirichlet", "clients": clients, "alpha": 0.3, "min_train": 16, "min_test": 4},
        "model": {"name": "lenet5"},
        "algorithm": {"name": "spafl", "target": target},
        "training": {"lr": 0.02, "batch_size": 16, "epochs": 1},
        "sampling": {"clients_per_round": clients},
        "evaluation": {"every": 100},
        "simulation": {"workers": 0, "device": "cpu", "checkpoint_every": 100},
        **tables,
    }


@pytest.mark.slow
def test_budgets_by_class_are_kept_where_a_turn_is_short(tmp_path):
    """Four or five steps from the same thresholds; half of the operations, and a quarter."""
    target = {"phone": {"macs": 0.5}, "raspberry-pi-4": {"macs": 0.25}}
    devices = {"devices": {"phone": 1.0, "raspberry-pi-4": 1.0}}
    run(resolve_config(on_digits(target, 20, system=devices, rounds=60)), tmp_path / "run")
    told = json.loads((tmp_path / "run" / "summary.json").read_text())["budget"]
    assert {name: told[name]["budget"] for name in told} == {"phone": 0.5, "raspberry-pi-4": 0.25}
    for budget in told.values():
        assert budget["reached"] == pytest.approx(budget["budget"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("target", [{"density": 0.3}, {"macs": 0.25}])
def test_a_budget_is_kept_on_digits(tmp_path, target):
    """Within 5 % in the mean of the last tenth of the rounds."""
    run(resolve_config(on_digits(target)), tmp_path / "run")
    kind, value = next(iter(target.items()))
    figure = {"density": "density", "macs": "macs_share"}[kind]
    last = [line["figures"][figure] for line in lines_of(tmp_path / "run")[-10:]]
    assert sum(last) / 10 == pytest.approx(value, rel=0.05)
    told = json.loads((tmp_path / "run" / "summary.json").read_text())["budget"]["all"]
    assert told == {"kind": kind, "budget": value, "reached": pytest.approx(sum(last) / 10), "turns": 100}


def test_importance_does_not_see_thresholds_come_back_to_the_floor():
    algorithm = SpaFL(SpaFLOptions(**VARIANTS["paper"]["algorithm"], target={"density": 0.5}))
    uploads = [Upload(k, {"t.threshold": torch.tensor([-7.0, 0.25])}, 10) for k in range(3)]
    server = {"t.threshold": torch.tensor([FLOOR, 0.5])}
    merged, _ = algorithm.merge(server, 0, uploads, 9)
    assert merged["t.threshold"].tolist() == [FLOOR, 0.25] and merged["t.delta"].tolist() == [0.0, -0.25]

"""Devices, traces and rounds on devices, against what is worked out by hand; whole runs that model them."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from spafl.algorithms.client import SavedBytes
from spafl.config import deep_merge, resolve_config
from spafl.errors import UserError
from spafl.report.devices import devices_html, devices_text
from spafl.report.run_data import Turns, load_run
from spafl.report.table import targets_html
from spafl.simulation import run
from spafl.simulation.checkpoint import load_latest
from spafl.system import PRESETS, Device, System, Trace, Usage, read_trace

PLAIN = Device(flops=100.0, down=80.0, up=8.0, memory=1000.0, watts=5.0, down_watts=1.0, up_watts=2.0)


def system(clients=4, seed=1, **rules):
    return System(
        clients, seed, {"plain": PLAIN, "slow": PLAIN.faster(0.5)}, rules.pop("shares", {"plain": 1}), **rules
    )


def usage(client, macs=500, down=10, up=3, memory=10):
    return Usage(client, macs, down, up, memory)


def test_time_and_energy_of_a_turn():
    some = system()
    assert some.seconds(usage(0)) == 1 + 10 + 3
    assert some.joules(usage(0)) == 1 * 1 + 10 * 5 + 3 * 2
    assert system(of_clients=["slow"] * 4).seconds(usage(0)) == 28


def test_a_round_without_rules_lasts_as_long_as_the_slowest():
    played = system().play(0, 0.0, 3, [usage(2), usage(0, macs=1000), usage(1)])
    assert played.seconds == 24 and played.merged == played.kept == {0, 1, 2}
    assert [v.client for v in played.visits] == [2, 0, 1]
    assert played.joules == pytest.approx(57 + 57 + 107)


def test_over_selection_ends_with_the_last_that_is_needed():
    played = system().play(0, 0.0, 2, [usage(k, macs=500 + 100 * k) for k in range(4)])
    assert played.seconds == 16 and played.merged == {0, 1} and played.kept == {0, 1, 2, 3}
    assert [v.outcome for v in played.visits] == ["in time"] * 2 + ["late"] * 2
    some = system(10, over_selection=1.3)
    chosen, away = some.asked(0, 0.0, 4)
    assert len(chosen) == len(set(chosen)) == 6 and away == 0


def test_a_deadline():
    late = [usage(0), usage(1, macs=2000)]
    played = system(deadline=20.0).play(0, 0.0, 2, late)
    assert played.seconds == 20 and played.merged == {0}
    assert system(deadline=20.0).play(0, 0.0, 1, late).seconds == 14  # all that are needed have come
    nobody = system(deadline=5.0).play(0, 0.0, 2, late)
    assert nobody.seconds == 5 and not nobody.merged and nobody.kept == {0, 1}


def test_turns_that_break_off_and_that_do_not_fit():
    some = system(100, failure=0.3)
    played = some.play(3, 0.0, 100, [usage(k) for k in range(100)])
    failed = [v for v in played.visits if v.outcome == "failed"]
    assert 15 < len(failed) < 45 and all(0 <= v.seconds < 14 and v.joules < 57 for v in failed)
    assert not played.kept & {v.client for v in failed}
    assert some.play(3, 0.0, 100, [usage(k) for k in range(100)]) == played  # the same draws
    assert some.play(4, 0.0, 100, [usage(k) for k in range(100)]) != played
    large = system().play(0, 0.0, 2, [usage(0), usage(1, memory=1001)])
    assert [v.outcome for v in large.visits] == ["in time", "too large"] and large.visits[1].joules == 0


def test_energy_of_a_turn_that_broke_off_while_it_computed():
    some = system()
    assert some._joules_until(usage(0), 1 + 4) == 1 + 4 * 5
    assert some._joules_until(usage(0), 14) == some.joules(usage(0))


def test_classes_and_speeds_of_clients():
    shares = {"plain": 2, "slow": 1}
    some = system(10, 7, shares=shares)
    assert sorted(some.classes).count("plain") == 7
    assert some.classes == system(10, 7, shares=shares).classes != system(10, 8, shares=shares).classes
    speeds = [math.log(d.flops / 100) for d in system(2000, 7, spread=0.5).devices]
    assert torch.tensor(speeds).std().item() == pytest.approx(0.5, rel=0.1)
    first = system(3, 7, spread=0.5).devices[0]
    assert first.down / first.flops == pytest.approx(0.8) and first.watts == 5


def test_availability_by_chance():
    some = system(1000, availability=0.3)
    counts = [len(some.there(r, 0.0)) for r in range(5)]
    assert all(240 < n < 360 for n in counts) and len(set(counts)) > 1
    chosen, away = some.asked(0, 0.0, 10)
    assert set(chosen) <= set(some.there(0, 0.0)) and away == 1000 - counts[0]
    few, _ = system(3, availability=0.5).asked(1, 0.0, 3)
    assert len(few) <= 3


def test_a_trace():
    trace = Trace(100.0, {0: [(10.0, 20.0), (50.0, 100.0)], 1: [(0.0, 30.0), (80.0, 100.0)], 2: [], 3: [(0.0, 100.0)]})
    assert [trace.until(0, t) for t in (5, 10, 19.5, 20, 170, 199)] == [None, 20, 20, None, 200, 200]
    assert trace.until(1, 90) == 130  # goes on where the next repetition begins
    assert trace.until(2, 0) is None and trace.until(3, 50) == trace.until(4, 50) == math.inf
    assert [trace.next(0, t) for t in (0, 15, 30, 100)] == [10, 15, 50, 110]
    assert trace.next(2, 0) == math.inf
    once = Trace(math.inf, {0: [(5.0, 9.0)]})
    assert once.until(0, 6) == 9 and once.until(0, 106) is None and once.next(0, 10) == math.inf


def test_who_leaves_while_it_trains_and_a_round_without_anybody():
    trace = Trace(1000.0, {0: [(0.0, 5.0)], 1: [(0.0, 50.0)]})
    some = system(2, trace=trace)
    played = some.play(0, 0.0, 2, [usage(0), usage(1)])
    assert [(v.outcome, v.seconds) for v in played.visits] == [("left", 5.0), ("in time", 14.0)]
    assert some.there(0, 3.0) == [0, 1] and some.there(0, 10.0) == [1] and some.there(0, 60.0) == []
    assert some.play(0, 60.0, 2, []).seconds == 940  # until somebody comes
    assert system(2, availability=0.5).play(0, 60.0, 2, []).seconds == 60


@pytest.mark.parametrize(
    "content, text",
    [
        ("[", "is not JSON"),
        ("[]", "must hold"),
        ('{"clients": {}, "perod": 3}', "holds 'perod', which is neither period nor clients"),
        ('{"clients": {}, "period": 0}', "period must be seconds above 0 or null; got 0"),
        ('{"clients": {"4": []}}', "'4' is no client of 0 to 3"),
        ('{"clients": {"1": [[3, 2]]}}', "client 1 needs [from, to] pairs"),
        ('{"clients": {"1": [[0, 2], [1, 4]]}}', "client 1 needs [from, to] pairs"),
        ('{"clients": {"1": [[0, true]]}}', "client 1 needs [from, to] pairs"),
        ('{"clients": {"1": 7}}', "client 1 needs [from, to] pairs"),
        ('{"clients": {"1": [[0, 9]]}, "period": 8}', "client 1 has a time after the period"),
    ],
)
def test_bad_traces_are_refused_in_one_line(tmp_path, content, text):
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_trace(path, 4)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_step_keeps_is_counted_once_and_without_the_parameters():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x = torch.randn(4, 5)
    with SavedBytes(model) as saved:
        loss = model(x).square().sum()
    assert saved.bytes == 4 * (4 * 5 + 4 * 7 + 4 * 3)  # the input, tanh's result (read twice), the output
    loss.backward()
    right = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), right, strict=True))


SYSTEM = {
    "devices": {"phone": 1, "board": 1},
    "classes": {"board": {"flops": 1e9, "down": 1e6, "up": 1e5, "memory": 1e9, "watts": 2.0}},
    "spread": 0.3, "failure": 0.2, "over_selection": 1.5, "deadline": 3.0,
}  # fmt: skip


def lines_of(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_devices_is_resumed_exactly_and_adds_up(small, tmp_path):
    """With AdamW, whose state is in the clients' rows."""
    from folders import assert_same_folders

    adamw = {"optimizer": "adamw", "lr": 0.002, "weight_decay": 0.01}
    tables = deep_merge(small, {"system": SYSTEM, "rounds": 4, "training": adamw})
    run(resolve_config(tables), tmp_path / "whole")
    run(resolve_config({**tables, "rounds": 2}), tmp_path / "cut")
    run(resolve_config(tables), tmp_path / "cut", resume=True)
    assert_same_folders(tmp_path / "whole", tmp_path / "cut")
    state = load_latest(tmp_path / "cut" / "checkpoints")
    assert state is not None
    counts = [own["momentum.step.conv1.weight"].item() for k in range(5) if (own := state.client(k))]
    assert len(set(counts)) > 1 and min(counts) > 0
    lines = lines_of(tmp_path / "whole")
    whole = [line["system"] for line in lines]
    assert [s["seconds"] for s in whole] == [line["system"]["seconds"] for line in lines_of(tmp_path / "cut")]
    assert lines[-1]["cost"]["modelled"]["seconds"] == pytest.approx(sum(s["seconds"] for s in whole))
    assert lines[-1]["cost"]["modelled"]["joules"] == pytest.approx(sum(sum(s["client_joules"]) for s in whole))
    assert len({o for s in whole for o in s["outcomes"]}) > 1
    read = load_run(tmp_path / "whole")
    assert read.turns is not None and read.turns.outcomes.sum() == 20 and len(read.turns.classes) == 5
    assert read.turns.joules.sum() == pytest.approx(lines[-1]["cost"]["modelled"]["joules"])
    assert read.last.cost.modelled_seconds == lines[-1]["cost"]["modelled"]["seconds"]
    assert "modelled time" in targets_html([read]) and "modelled energy" in targets_html([read])
    for line in lines:
        merged = [
            k for k, o in zip(line["system"]["clients"], line["system"]["outcomes"], strict=True) if o == "in time"
        ]
        assert sorted(line["turns"]["clients"]) == sorted(merged)
        assert len(line["sampled"]) == 5


def test_a_report_tells_who_is_late_and_who_never_takes_part():
    outcomes = np.array([[3, 1, 0, 0, 0], [0, 4, 1, 0, 0], [0, 0, 0, 0, 5], [2, 0, 0, 1, 0]])
    turns = Turns(["phone", "board", "board", "<b>"], outcomes, np.full(4, 10.0), np.full(4, 2000.0))
    text = devices_text(turns)
    assert text == (
        "Most often late: client 1 (board) in 4 of 5 turns; client 0 (phone) in 1 of 4 turns. "
        "Never took part: 1 (board), 2 (board)."
    )
    page = devices_html(["one"], [turns])
    assert "<tr><td>board</td><td>2</td><td>10</td><td>0</td><td>4</td><td>1</td><td>5</td><td>2</td>" in page
    assert "2.0 s" in page and "400 J" in page and "&lt;b&gt;" in page and "<b>" not in page
    assert devices_html(["one", "two"], [None, None]) == ""
    fine = Turns(["phone"], np.array([[2, 0, 0, 0, 0]]), np.ones(1), np.ones(1))
    assert devices_text(fine) == "Nobody was late. Everybody took part."


@pytest.mark.slow
def test_two_workers_give_the_times_of_one(small, tmp_path):
    tables = deep_merge(small, {"system": SYSTEM})
    for workers in (1, 2):
        run(resolve_config(deep_merge(tables, {"simulation": {"workers": workers}})), tmp_path / str(workers))
    assert [x["system"] for x in lines_of(tmp_path / "1")] == [x["system"] for x in lines_of(tmp_path / "2")]


@pytest.mark.slow
def test_who_never_fits_never_takes_part_and_rounds_may_come_to_nothing(small, tmp_path):
    tables = deep_merge(small, {"system": {"devices": {"microcontroller": 1}}})
    run(resolve_config(tables), tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    assert all(set(line["system"]["outcomes"]) == {"too large"} for line in lines)
    assert lines[-1]["turns"]["clients"] == [] and lines[-1]["train_loss"] is None


@pytest.mark.parametrize(
    "change, text",
    [
        ({"devices": {"toaster": 1}}, "system.devices: unknown class toaster; known: phone"),
        ({"devices": {}}, "system.devices"),
        ({"devices": {"phone": 0}}, "system.devices.phone"),
        ({"classes": {"x": {"flops": 1, "down": 1, "up": 1, "memory": 1}}}, "system.classes.x: no client has it"),
        ({"classes": {"phone": {"flops": 1}}}, "missing key system.classes.phone.down"),
        ({"clients": ["phone"]}, "one class for each of partition.clients = 5 is needed; got 1"),
        ({"clients": ["phone"] * 4 + ["board"]}, "system.clients: board is not in system.devices"),
        ({"failure": 1.0}, "system.failure"),
        ({"availability": 0.0}, "system.availability"),
        ({"over_selection": 0.5}, "system.over_selection"),
        ({"deadline": -1.0}, "system.deadline"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(small, change, text):
    with pytest.raises(UserError) as caught:
        resolve_config({**small, "system": {"devices": {"phone": 1.0}, **change}})
    assert text in str(caught.value).replace("'", "") and "\n" not in str(caught.value)


def test_a_budget_of_time_that_sending_exceeds_is_refused(small, tmp_path):
    tables = deep_merge(small, {"system": {"devices": {"phone": 1}}, "algorithm": {"target": {"seconds": 1e-3}}})
    tables["simulation"]["engine"] = "compact"
    with pytest.raises(UserError, match=r"0\.001 seconds are not enough for client 0 on a phone, which takes 0\.00"):
        run(resolve_config(tables), tmp_path / "run")


def test_every_preset_is_whole():
    assert set(PRESETS) == {"phone", "raspberry-pi-4", "microcontroller"}
    assert all(value > 0 for device in PRESETS.values() for value in vars(device).values())

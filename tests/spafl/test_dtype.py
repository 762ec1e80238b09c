"""Runs in float64: rounding decides nothing, so engines agree to the last digits, whatever the method."""

import json

import pytest
import torch

from spafl.algorithms import ALGORITHMS
from spafl.config import deep_merge, resolve_config
from spafl.errors import UserError
from spafl.export import client_model
from spafl.simulation import run
from spafl.simulation.checkpoint import load_latest
from spafl.simulation.placement import pick_device


def lines_of(tables, folder, **simulation):
    run(resolve_config(deep_merge(tables, {"simulation": simulation})), folder, quiet=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", [m if m == "spafl" else pytest.param(m, marks=pytest.mark.slow) for m in ALGORITHMS])
def test_engines_agree_to_the_last_digits(small, tmp_path, method):
    tables = deep_merge(small, {"training": {"dtype": "float64"}, "rounds": 2})
    if method != "spafl":
        tables["algorithm"] = {"name": method}
    found = {engine: lines_of(tables, tmp_path / engine, engine=engine) for engine in ("masked", "compact")}
    for masked, compact in zip(*found.values(), strict=True):
        assert masked["train_loss"] == pytest.approx(compact["train_loss"], rel=1e-10)
        assert masked["evaluation"]["accuracy"] == compact["evaluation"]["accuracy"]
        assert masked["density"] == compact["density"]
    states = [load_latest(tmp_path / engine / "checkpoints") for engine in found]
    for name, tensor in states[0].server.items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(tensor, states[1].server[name], rtol=1e-9, atol=1e-12)


def test_messages_are_twice_as_long_and_exports_are_float32(small, tmp_path):
    single = lines_of(deep_merge(small, {"rounds": 1}), tmp_path / "single")
    double = lines_of(deep_merge(small, {"rounds": 1, "training": {"dtype": "float64"}}), tmp_path / "double")
    assert double[0]["cost"]["payload"]["up_bytes"] == 2 * single[0]["cost"]["payload"]["up_bytes"] > 0
    trained = double[0]["sampled"][0]
    model, shape = client_model(tmp_path / "double", trained)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.zeros(1, *shape)).dtype == torch.float32


def test_numbers_to_predict(small, tmp_path):
    """Targets are stored as float32."""
    tables = deep_merge(small, {"training": {"dtype": "float64", "loss": "mse"}, "evaluation": {"tolerance": 0.5}})
    config = resolve_config(tables)
    from test_training import client  # the stand-in for a client

    turn = client(config.local_training())
    assert turn.as_target(torch.ones(2, 3)).dtype == turn.as_input(torch.zeros(2, 1)).dtype
    assert turn.as_target(torch.ones(2, dtype=torch.int64)).dtype == torch.int64


def test_what_does_not_go_with_it_is_refused(small, tmp_path):
    tables = deep_merge(small, {"training": {"dtype": "float64"}})
    with pytest.raises(
        UserError, match=r"communication\.encoding: int8 is for uploads of float32, and training\.dtype"
    ):
        run(resolve_config(deep_merge(tables, {"communication": {"encoding": "int8"}})), tmp_path / "a")
    with pytest.raises(UserError, match=r"simulation\.device: training\.dtype = float64 runs on a CPU alone"):
        pick_device(resolve_config(deep_merge(tables, {"simulation": {"device": "cuda"}})))
    with pytest.raises(UserError, match=r"training\.dtype: one of float32, float64; got"):
        resolve_config(deep_merge(small, {"training": {"dtype": "float16"}}))

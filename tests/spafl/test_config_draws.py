"""Configurations drawn from the schema and from around it: each runs, or ends in one line with exit code 2."""

import math
import typing

import numpy as np
import pytest
import tomli_w
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from spafl.algorithms import ALGORITHMS
from spafl.checked import alternatives
from spafl.cli import main
from spafl.config import RunConfig, load_config
from spafl.errors import UserError

# Configurations per block; blocks behind the second are slow.
BLOCKS = {0: 25, 1: 25, **dict.fromkeys(range(2, 26), 100)}

BASE = {
    "rounds": 1,
    "data": {"name": "synthetic", "train": 40, "test": 12, "classes": 4},
    "partition": {"scheme": "iid", "clients": 3},
    "model": {"name": "lenet5"},
    "algorithm": {"name": "spafl"},
    "training": {"epochs": 1, "batch_size": 8},
    "sampling": {"clients_per_round": 2},
    "simulation": {"workers": 1, "device": "cpu"},
}
SMALL = {
    "data.name": ["synthetic", "digits"],
    "data.root": [None],
    "data.file": [None],
    "partition.file": [None],
    "data.image": [28, 28, 32],
    "data.channels": [1, 3],
    "data.classes": [2, 5, 10],
    "data.train": [20, 47],
    "data.test": [10, 21],
    "partition.scheme": ["iid", "dirichlet", "pathological", "size"],
    "partition.clients": [1, 2, 5],
    "partition.alpha": [0.1, 1, 100.0],
    "partition.classes_per_client": [1, 2],
    "model.name": ["lenet5", "lenet5", "lenet5", "conv4"],
    "sampling.clients_per_round": [1, 2],
    "training.epochs": [1, 2],
    "rounds": [1, 2],
    "simulation.workers": [1],
    "simulation.device": ["cpu", "auto"],
    "training.batch_size": [1, 7, 64],
}
ODD = [
    True, False, 0, -1, 1, 2, 3, 0.5, -0.5, 1e-320, 1e30, 1e308, -1e308, math.inf, -math.inf, math.nan, 10**12, 10**18,
    2**63, -(2**63), 10**400, "", "1", "true", "off", "..", ".", "/etc", "~", "a/../b", "nul\0", "line\nbreak",
    "é" * 300, "x" * 100_000, "\ud800", "os:system", "..:x", ".x:Y", "spafl.algorithms:Algorithm", "no.such:Thing", ":",
    "a:", "a:b:c", [], [1], [[]], [[[[[[[[1]]]]]]]], {}, {"a": 1}, {"name": "spafl"},
]  # fmt: skip


def fields(model, prefix=""):
    """Every setting: its path and its field."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        elif name != "algorithm":
            yield prefix + name, field


def inside(rng, path, field):
    """A value the schema allows, small enough to run."""
    if path in SMALL:
        return SMALL[path][rng.integers(len(SMALL[path]))]
    kinds = alternatives(field.annotation)
    kind = kinds[rng.integers(len(kinds))]
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        return choices[rng.integers(len(choices))]
    if kind is bool:
        return bool(rng.integers(2))
    if kind not in (int, float, str):
        return None  # tables and lists: those around them are drawn
    low = next((float(m.ge) for m in field.metadata if isinstance(m, Ge)), 0.0)
    high = next((float(m.le) for m in field.metadata if isinstance(m, Le)), 1.0)
    if kind is int:
        return int(rng.integers(max(low, 1), max(low, 1) + 3))
    if kind is float:
        return float(rng.uniform(max(low, 1e-4), min(high, 1.0)))
    return field.default if isinstance(field.default, str) else "drawn"


def around(rng, field):
    """A value at, or just past, a bound of the schema, or of another kind altogether."""
    kinds = ((Ge, "ge"), (Gt, "gt"), (Le, "le"), (Lt, "lt"))
    bounds = [getattr(m, name) for m in field.metadata for kind, name in kinds if isinstance(m, kind)]
    if bounds and rng.random() < 0.4:
        bound = bounds[rng.integers(len(bounds))]
        return [bound, bound - 1, bound + 1, float(bound), -bound][rng.integers(5)]
    return ODD[rng.integers(len(ODD))]


def set_path(raw, path, value):
    *sections, key = path.split(".")
    for section in sections:
        if not isinstance(raw.get(section), dict):
            raw[section] = {}
        raw = raw[section]
    raw[key] = value


def draw(rng):
    """One configuration as nested tables."""
    raw = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
    algorithm = list(ALGORITHMS)[rng.integers(len(ALGORITHMS))]
    raw["algorithm"] = {"name": algorithm}
    if algorithm == "spafl" and rng.random() < 0.7:
        raw["algorithm"]["variant"] = ["fmnist", "cifar10", "cifar100", "paper", "tuned"][rng.integers(5)]
    known = [*fields(RunConfig), *fields(ALGORITHMS[algorithm].Options, "algorithm.")]
    for at in rng.choice(len(known), rng.integers(0, 8), replace=False):
        path, field = known[at]
        value = inside(rng, path, field)
        if value is not None:
            set_path(raw, path, value)
    if raw["data"]["name"] == "digits":
        raw["data"] = {"name": "digits"}
    scheme = raw["partition"]["scheme"]
    for option, schemes in (("alpha", ("dirichlet", "size")), ("classes_per_client", ("pathological",))):
        raw["partition"].pop(option, None)
        if scheme in schemes:
            raw["partition"][option] = SMALL[f"partition.{option}"][rng.integers(2)]
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        path, field = known[rng.integers(len(known))]
        set_path(raw, path, around(rng, field))
    if rng.random() < 0.1:  # the shape of the file itself
        places = ["data", "partition", "training", "algorithm", "data.nmae", "nonsense", "algorithm.penalt"]
        set_path(raw, places[rng.integers(len(places))], ODD[rng.integers(len(ODD))])
    return raw


def is_small(config):
    """Whether a run of it takes about a second."""
    t, p, d = config.training, config.partition, config.data
    if (d.train or 0) + (d.test or 0) > 10_000 or (d.classes or 0) > 1000 or (d.image or 0) > 64:
        return False
    steps = config.rounds * config.sampling.clients_per_round * (t.steps or t.epochs * 60)
    return steps < 2000 and p.clients <= 20 and config.simulation.workers == 1 and p.max_draws < 1000


@pytest.mark.parametrize("block", [pytest.param(block, marks=[pytest.mark.slow] * (block > 0)) for block in BLOCKS])
def test_every_configuration_runs_or_is_answered_in_one_line(block, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spafl.data.files.SYSTEM", ())
    rng = np.random.default_rng([2024, block])
    ended = {0: 0, 2: 0, "large": 0}
    for number in range(BLOCKS[block]):
        raw = draw(rng)
        path = tmp_path / "drawn.toml"
        try:
            path.write_text(tomli_w.dumps(raw), encoding="utf-8", errors="surrogatepass")
        except (TypeError, ValueError):  # not all of it can be said in TOML
            continue
        try:
            if not is_small(load_config(path)):
                ended["large"] += 1  # allowed, and its owner's time
                continue
        except UserError:
            pass
        status = main(["run", str(path), "--out", str(tmp_path / f"run{number}"), "--quiet", "--no-report"])
        err = capsys.readouterr().err
        assert status in (0, 2), (raw, err)
        if status:
            assert err.startswith("spafl: error: ") and err.count("\n") == 1 and len(err) < 1500, (raw, err)
            assert err[:-1].isprintable() or "\\ud800" in err, (raw, err)
        ended[status] += 1
    assert ended[0] > 0 and ended[2] > 0, ended

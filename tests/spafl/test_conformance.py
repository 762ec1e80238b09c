"""Recorded runs of the published code, replayed; and the tool notices when something differs."""

import json
from pathlib import Path

import numpy as np
import pytest
from own_recording import make_recording

from spafl.conformance import main

GOLDEN = Path(__file__).parents[1] / "golden"


def first_rounds(name, count, path):
    """A recording cut short: its first ``count`` rounds, and nothing of what came after them."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if not key.startswith("final/")}
    meta = json.loads(bytes(arrays.pop("meta")).decode())
    meta["rounds"] = meta["rounds"][:count]
    np.savez(path, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)
    return path


@pytest.mark.parametrize(
    "name", ["official_fmnist_lenet5", pytest.param("official_cifar10_conv4", marks=pytest.mark.slow)]
)
def test_recordings_agree(name, capsys):
    assert main([str(GOLDEN / f"{name}.npz")]) == 0
    assert "agrees within 1e-06" in capsys.readouterr().out


def test_the_first_rounds_of_a_long_recording_agree(tmp_path, capsys):
    assert main([str(first_rounds("official_cifar10_conv4", 2, tmp_path / "two.npz"))]) == 0
    assert "agrees within 1e-06" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "said"),
    [
        pytest.param("round1/client2/l2/conv2.weight", "round 2, client 2, conv2.weight: l2", marks=pytest.mark.slow),
        ("round2/global/fc3.threshold", "round 3, server, fc3.threshold"),
    ],
)
def test_a_changed_recording_is_pointed_at(tmp_path, capsys, key, said):
    with np.load(GOLDEN / "official_fmnist_lenet5.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays[key] = arrays[key] * (1 + 1e-4)
    np.savez(tmp_path / "changed.npz", **arrays)
    assert main([str(tmp_path / "changed.npz")]) == 1
    assert f"first in {said}" in capsys.readouterr().out


def test_unusable_files_are_refused(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("text.npz", "other.npz", "missing.npz"):
        assert main([str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "variant, recorded_name, model_name, classes, penalty",
    [
        pytest.param("cifar100", "ResNet18", "resnet18", 20, 1.0, marks=pytest.mark.slow),
        pytest.param("cifar10", "ViT", "vit", 10, 0.5, marks=pytest.mark.slow),
    ],
)
def test_the_compact_engine_replays_other_models(
    tmp_path, capsys, variant, recorded_name, model_name, classes, penalty
):
    path = tmp_path / "own.npz"
    rounds = make_recording(path, variant, recorded_name, model_name, classes, penalty)
    assert min(min(r["density"]) for r in rounds) < 0.97, "nothing was pruned, so nothing is shown"
    assert main([str(path), "--engine", "compact"]) == 0, capsys.readouterr().out
    assert model_name in capsys.readouterr().out

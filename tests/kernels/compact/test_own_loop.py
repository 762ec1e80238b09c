"""CompactModule in a loop of one's own: AdamW, collapse, torch.func."""

import pathlib
import runpy
import warnings

import pytest
import torch
from torch import nn

from spafl_kernels import CompactModule, MaskedTrainer, SGDOptions, collapse_guard_, convert, density, threshold_penalty

EXAMPLE = pathlib.Path(__file__).parents[3] / "examples" / "own_model_adamw.py"


def test_the_example_prunes_and_does_not_collapse(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = runpy.run_path(str(EXAMPLE))["train"](60, threshold_lr=1e-3)
    shares = density(net).values()
    assert min(shares) > 0 and min(shares) < 1
    assert "step 50: loss" in capsys.readouterr().out


def net():
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)))


def test_collapse_is_said_once_and_the_guard_brings_the_layer_back():
    model = net()
    compact, x = CompactModule(model), torch.randn(4, 6)
    optimizer = torch.optim.AdamW([model[0].threshold, model[2].threshold], lr=0.05)

    def step():
        optimizer.zero_grad()
        (compact(x).sum() + 10 * threshold_penalty(model)).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match=r"every filter of .*2 is pruned: .*collapse_guard_\(model\)"):
        for _ in range(12):
            step()
    assert density(model) == {"0": 0.0, "2": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    assert collapse_guard_(model) == ["0", "2"] and density(model) == {"0": 1.0, "2": 1.0}
    assert collapse_guard_(model, 0.5) == []
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1\); got 1"):
        collapse_guard_(model, 1)


def test_transforms_are_refused_in_words():
    model, x = net(), torch.randn(3, 4, 6)
    torch.func.vmap(model)(x)  # the layers support it
    with pytest.raises(RuntimeError, match=r"a CompactModule cannot run under torch\.func; transform the model itself"):
        torch.func.vmap(CompactModule(model))(x)
    trainer = MaskedTrainer(model)
    trainer.begin(SGDOptions(lr=0.1))
    with pytest.raises(RuntimeError, match=r"a trainer cannot run under torch\.func"):
        torch.func.vmap(lambda t: trainer.step(t, torch.arange(4)))(x)

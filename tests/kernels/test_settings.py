"""Environment variables: one convention, one place, one table."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import spafl_kernels
from spafl_kernels import settings

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "yes", "on"])
def test_strict_means_the_same_everywhere(value, monkeypatch):
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(print)  # which is not for a trace to leave out
    assert spafl_kernels.make_trainer(model).engine == "masked"
    spafl_kernels.CompactModule(model)
    monkeypatch.setenv("SPAFL_STRICT", value)
    assert settings.strict()
    for make in (spafl_kernels.make_trainer, lambda m: spafl_kernels.CompactModule(m)(torch.ones(1, 3))):
        with pytest.raises(spafl_kernels.Unsupported):
            make(model)
    with pytest.raises(RuntimeError, match="SPAFL_STRICT is set"):
        from spafl_kernels.gpu import choice

        choice.fall_back("of a reason")


@pytest.mark.parametrize("value", ["", "0", "false", "No", "off"])
def test_off(value, monkeypatch):
    monkeypatch.setenv("SPAFL_STRICT", value)
    assert not settings.strict()


def test_other_values_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("SPAFL_STRICT", "perhaps")
    with pytest.raises(ValueError, match=r"SPAFL_STRICT must be on \(1, true, yes, on\) or off .*; got 'perhaps'"):
        settings.strict()
    monkeypatch.setenv("SPAFL_NATIVE", "2")
    with pytest.raises(ValueError, match=r"SPAFL_NATIVE must be auto, on .* or off .*; got '2'"):
        settings.switch_or_auto("SPAFL_NATIVE")
    for value, meant in (("auto", None), ("True", True), ("off", False)):
        monkeypatch.setenv("SPAFL_NATIVE", value)
        assert settings.switch_or_auto("SPAFL_NATIVE") is meant
    monkeypatch.setenv("SPAFL_BACKEND", "fast")
    with pytest.raises(ValueError, match="SPAFL_BACKEND must be one of auto, narrow; got 'fast'"):
        settings.one_of("SPAFL_BACKEND", ("auto", "narrow"))


def test_every_variable_is_in_the_table_and_read_in_one_place():
    table = (ROOT / "docs" / "settings.md").read_text()
    for name, values, meaning in settings.VARIABLES:
        assert f"| `{name}` | {values} | {meaning} |" in table
    known = {name for name, _, _ in settings.VARIABLES}
    for path in (ROOT / "spafl_kernels").rglob("*.py"):
        text = path.read_text()
        assert path.name == "settings.py" or not re.search(r"environ\S*SPAFL", text), path
        assert set(re.findall(r"SPAFL_[A-Z_]+[A-Z]", text)) <= known | {"SPAFL_BUILD"}, path


def test_the_front_door():
    for name in ("make_trainer", "SGDOptions", "CompactModule", "export", "audit", "explain"):
        assert name in spafl_kernels.__all__ and callable(getattr(spafl_kernels, name)) and name in dir(spafl_kernels)
    written = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert spafl_kernels.__version__ in (written[1], "0+unknown")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = spafl_kernels.nothing
    code = (
        "import sys; import spafl_kernels; assert 'spafl_kernels.compact' not in sys.modules\n"
        "from spafl_kernels import *; from spafl_kernels.ops import *\n"
        "assert CompactModule and make_trainer and threshold_step"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

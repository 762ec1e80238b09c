"""A run is continued by releases that have more settings, and never with another value of any."""

import sys
import textwrap

import pytest
from folders import assert_same_folders

from spafl.algorithms import ALGORITHMS
from spafl.cli import main
from spafl.config import deep_merge, resolve_config
from spafl.errors import UserError
from spafl.later import completed, reduced
from spafl.simulation import run, same_run
from spafl.simulation.checkpoint import Checkpoints
from spafl.simulation.same_run import run_digest

DEVICES = {"devices": {"own": 1.0}, "classes": {"own": {"flops": 1e9, "down": 1e6, "up": 1e6, "memory": 1e9}}}

# Of checkpoints that exist. A new setting that changes one belongs in spafl.later.LATER, or an algorithm's `later`;
# only where a default changes, or a published variant, is the new digest right: runs of before have another value then.
DIGESTS = {
    "spafl": "b0af8fec0e966ca9",
    "fedavg": "fabb628bd26ffd38",
    "local": "9c892154e8fda4c9",
    "fedprox": "323d12fd400f0f92",
    "ditto": "20300682a308bb8d",
    "fedper": "d9dd8b84836cec2f",
    "scaffold": "eb5b1279b08c88ca",
    "fedpm": "3b3be933c074352c",
    "heterofl": "b3b187c30f08b33f",
    "fjord": "b35b86c30aefc81b",
    "feddst": "99895fd555ad8395",
    "fedspa": "d85c741beee0b3c6",
    "fedp3": "95acce66ca3eb228",
    "devices": "03a5ffe4b1c3a055",
}


def defaults(algorithm):
    """A configuration that leaves all that it can to defaults."""
    tables = {"data": {"name": "digits"}, "model": {"name": "lenet5"}, "algorithm": {"name": algorithm}}
    return tables | ({"algorithm": {"name": "spafl"}, "system": DEVICES} if algorithm == "devices" else {})


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "devices"])
def test_digests_are_those_of_checkpoints_that_exist(algorithm):
    assert run_digest(resolve_config(defaults(algorithm)))[:16] == DIGESTS[algorithm]


def test_a_later_setting_at_its_old_value_is_not_there():
    later = {"privacy": {"noise": 0}, "privacy.clip": 1, "system.classes.*.cores": 2}
    old = {"training": {"lr": 1}, "system": {"classes": {"a": {"flops": 1}, "b": {"flops": 2}}}}
    new = {
        "training": {"lr": 1},
        "system": {"classes": {"a": {"flops": 1, "cores": 2}, "b": {"flops": 2, "cores": 2}}},
        "privacy": {"noise": 0, "clip": 1},
    }
    assert completed(old, later) == new and reduced(new, later) == old
    assert completed(new, later) == new and reduced(old, later) == old
    other = deep_merge(new, {"privacy": {"clip": 3}, "system": {"classes": {"b": {"cores": 4}}}})
    left = reduced(other, later)
    assert left["privacy"] == {"noise": 0, "clip": 3} and left["system"]["classes"]["b"] == {"flops": 2, "cores": 4}
    assert completed({"system": None}, later)["system"] is None


def test_sections_take_part(small_config, monkeypatch):
    config, other = small_config(), small_config(sampling={"min_uploads": 2})
    assert run_digest(small_config(training={"dtype": "float64"})) != run_digest(config)
    before = run_digest(config)
    monkeypatch.setattr(same_run, "LATER", {"sampling.min_uploads": 1})
    assert run_digest(config) != before and run_digest(other) != run_digest(config)
    monkeypatch.setattr(same_run, "LATER", {"sampling.min_uploads": 2})
    assert run_digest(other) != before  # what a release without the setting wrote


RELEASE = """
    from typing import ClassVar
    from spafl.algorithms import SpaFL

    class Mine(SpaFL):
        class Options(SpaFL.Options):
            {option}
        later: ClassVar = {later}
"""


@pytest.fixture
def release(small, tmp_path, monkeypatch):
    """``release(option, later)``: from now on the program is that one; returns a maker of configurations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))

    def release(option="pass", later=None):
        (tmp_path / "releases.py").write_text(textwrap.dedent(RELEASE.format(option=option, later=later or {})))
        sys.modules.pop("releases", None)
        tiny = {"data": {"train": 20, "test": 10}, "sampling": {"clients_per_round": 1}}
        tiny |= {"partition": {"clients": 2, "min_train": 4, "min_test": 1}}
        tables = deep_merge(small, tiny | {"algorithm": {"name": "releases:Mine"}})
        return lambda **changes: resolve_config(deep_merge(tables, changes))

    yield release
    sys.modules.pop("releases", None)


def test_a_run_of_a_release_without_a_setting_is_continued(release, tmp_path):
    first = release()
    run(first(rounds=1), tmp_path / "run", quiet=True)
    assert "extra" not in (tmp_path / "run" / "config.toml").read_text()

    second = release("extra: float = 0.5", {"extra": 0.5})
    with pytest.raises(UserError, match=r"another configuration: algorithm\.extra is 0\.5 there and 0\.75 here"):
        run(second(rounds=2, algorithm={"extra": 0.75}), tmp_path / "run", resume=True, quiet=True)

    run(second(rounds=2), tmp_path / "run", resume=True, quiet=True)
    assert "extra = 0.5" in (tmp_path / "run" / "config.toml").read_text()
    assert Checkpoints(tmp_path / "run" / "checkpoints", run_digest(first())).load()[0].state.round == 1


@pytest.mark.slow
def test_releases_after_that_one(release, tmp_path):
    run(release()(rounds=1), tmp_path / "run", quiet=True)
    changed = release("extra: float = 0.75", {"extra": 0.5})  # another default, later still
    with pytest.raises(UserError, match=r"another configuration: algorithm\.extra is 0\.5 there and 0\.75 here"):
        run(changed(rounds=2), tmp_path / "run", resume=True, quiet=True)

    silent = release("extra: float = 0.5")  # nobody has said what it did before
    with pytest.raises(UserError, match="belongs to a run of another configuration"):
        run(silent(rounds=2), tmp_path / "run", resume=True, quiet=True)

    second = release("extra: float = 0.5", {"extra": 0.5})
    run(second(rounds=2), tmp_path / "run", resume=True, quiet=True)
    run(second(rounds=2), tmp_path / "whole", quiet=True)
    assert_same_folders(tmp_path / "whole", tmp_path / "run")

    changed = release("extra: float = 0.75", {"extra": 0.5})
    command = ["run", "--resume", str(tmp_path / "run"), "--set", "rounds=3", "--allow-code", "--no-report", "--quiet"]
    assert main(command) == 0 and "extra = 0.5" in (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(UserError, match=r"algorithm\.extra is 0\.5 there and 0\.75 here"):
        run(changed(rounds=3), tmp_path / "run", resume=True, quiet=True)

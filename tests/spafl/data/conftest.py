"""Data sets that this machine happens to hold must not reach the tests."""

import pytest

from spafl.data import files


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch, tmp_path_factory):
    """Only the root that a test names is searched."""
    monkeypatch.setattr(files, "SYSTEM", ())
    monkeypatch.delenv("SPAFL_DATA", raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))

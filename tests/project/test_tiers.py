"""What the two tiers run: the rules of the repository's conftest.py, on tests made up here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import dataclasses, pytest

@dataclasses.dataclass
class Tile:
    rows: int
    columns: int

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_partly(n): pass

@pytest.mark.sweep
@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize("b", "xy")
def test_product(a, b): pass

@pytest.mark.sweep
@pytest.mark.parametrize("tile", [Tile(1, 1), Tile(1, 2), Tile(2, 1), Tile(2, 2)])
@pytest.mark.parametrize("of", [len, str, pytest.param(int, marks=pytest.mark.slow)])
def test_objects(tile, of): pass
"""
EVERY = {
    "test_slow", "test_partly[1]", "test_partly[2]", *(f"test_product[{b}-{a}]" for a in (1, 2, 3) for b in "xy"),
    *(f"test_objects[{of}-tile{n}]" for of in ("len", "str", "int") for n in range(4)),
}  # fmt: skip
# Of the product every number and every letter, of the tiles every number of rows and of columns and both functions.
FAST = {
    "test_partly[1]", "test_product[x-1]", "test_product[y-2]", "test_product[x-3]", "test_objects[len-tile0]",
    "test_objects[str-tile3]",
}  # fmt: skip


@pytest.mark.parametrize("tier, expected", [("0", FAST), ("1", EVERY)])
def test_what_a_tier_runs(tier, expected, tmp_path):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: s\n    sweep: s\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "--strict-markers", "--collect-only", "-p", "no:cacheprovider"]
    environment = {**os.environ, "SPAFL_SLOW_TESTS": tier, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]
    assert len(found) == len(set(found)) and set(found) == expected, done.stdout + done.stderr

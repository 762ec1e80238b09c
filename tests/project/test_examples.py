"""The examples run as they stand; notebooks hold what they print."""

import importlib.util
import json
import sys
from pathlib import Path

import matplotlib
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def code_cells(name):
    cells = json.loads((EXAMPLES / name).read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def load(name):
    """A script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_executed_from_top_to_bottom(name):
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [line for output in outputs for line in output.get("text", ()) if "/home/" in line or "/root/" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run_as_scripts(name, tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for number, cell in enumerate(code_cells(name), 1):
        exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)


@pytest.mark.slow
def test_the_parts_of_ones_own(tmp_path):
    run = load("own_parts").main(tmp_path)
    assert run.records()[-1]["accuracy"] > 0.55
    assert set(run.config.code) == {"data.name", "partition.scheme", "model.name", "algorithm.name"}


@pytest.mark.slow
def test_int8_is_as_accurate_and_smaller(tmp_path):
    pytest.importorskip("onnxruntime")
    example = load("export_int8")
    found = example.main(tmp_path, {**example.CONFIG, "rounds": 8})
    assert abs(found["int8"][0] - found["float32"][0]) < 0.03
    sizes = {name: (tmp_path / "export" / f"client-{name}.onnx").stat().st_size for name in ("3", "int8")}
    assert sizes["int8"] < 0.75 * sizes["3"]

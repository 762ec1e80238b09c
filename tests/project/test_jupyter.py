"""A run with worker processes in a kernel of Jupyter, where there is no main module to guard."""

import json

import pytest
from environments import environment, tell

# Installed for the test alone: nobody needs Jupyter to work on this.
PACKAGES = ("ipykernel==7.4.0", "nbclient==0.11.0")

EXECUTE = """
import sys, nbformat, nbclient
from pathlib import Path

cells = [nbformat.v4.new_code_cell(text) for text in Path(sys.argv[1]).read_text().split("# cell")]
notebook = nbformat.v4.new_notebook(cells=cells)
nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
print("".join(output.get("text", "") for cell in cells for output in cell.outputs))
"""

CELLS = """
import spafl
from spafl.algorithms import SpaFL
from spafl.records import lines_of

tables = {
    "rounds": 2, "name": "kernel",
    "data": {"name": "synthetic", "image": 28, "channels": 1, "classes": 10, "train": 60, "test": 30, "seed": 1},
    "partition": {"clients": 3, "alpha": 1.0, "min_train": 4, "min_test": 1},
    "model": {"name": "lenet5"}, "algorithm": {"name": "spafl"}, "sampling": {"clients_per_round": 2},
    "training": {"epochs": 1, "batch_size": 16}, "simulation": {"engine": "masked", "device": "cpu"},
}
# cell
class Mine(SpaFL):  # of the kernel's main module: workers get it by value
    def train(self, client, message, round):
        import os, time
        from pathlib import Path
        Path(f"worker-{os.getpid()}").touch()
        end = time.monotonic() + 60  # a worker that is slow to start would find nothing left to do
        while len(list(Path().glob("worker-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return super().train(client, message, round)
# cell
import os
from pathlib import Path

run = spafl.run({**tables, "algorithm": {"name": Mine}}, "two", simulation={"workers": 2})
found = {int(path.name.partition("-")[2]) for path in Path().glob("worker-*")}
print("workers", len(found), os.getpid() in found)
# cell
one = spafl.run({**tables, "algorithm": {"name": Mine}}, "one", simulation={"workers": 1})
lines = zip(lines_of(run.folder), lines_of(one.folder), strict=True)
same = [a["evaluation"] == b["evaluation"] for a, b in lines]
print("same", same)
"""


@pytest.mark.slow
def test_a_notebook_runs_two_workers_without_a_main_guard(tmp_path):
    python, variables = environment(tmp_path / "venv", *PACKAGES)
    (tmp_path / "cells.py").write_text(CELLS)
    (tmp_path / "execute.py").write_text(EXECUTE)
    said = tell(python, "execute.py", "cells.py", "done.ipynb", env=variables, cwd=tmp_path, timeout=1800)
    assert "workers 2 False" in said and "same [True, True]" in said
    cells = json.loads((tmp_path / "done.ipynb").read_text())["cells"]
    assert all(output["output_type"] == "stream" for cell in cells for output in cell["outputs"])

"""What a user installs: the archives hold everything, and the wheel runs where there is no checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tell(*command, **more):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The sdist, and the wheel built from it; without the extension, which takes minutes to compile."""
    folder = tmp_path_factory.mktemp("release")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    checkout = folder / "checkout"
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout / name)
    tell(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=checkout)
    (sdist,) = folder.glob("*.tar.gz")
    environment = os.environ | {"SPAFL_BUILD_CPP": "0"}
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sdist)
    tell(*command, env=environment, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel, [name for name in tracked.stdout.split("\0") if name]


def test_the_archives_hold_every_source_and_every_data_file(archives):
    sdist, wheel, tracked = archives
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = [name for name in tracked if name.startswith(("csrc/", "spafl_kernels/", "python/spafl/"))]
    assert not set(sources) - packed
    assert not [name for name in packed if name.endswith((".so", "_build.json"))]
    installed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {n.removeprefix("python/") for n in sources if not n.startswith("csrc/") and not n.endswith(".md")}
    assert not wanted - installed


def test_the_metadata_says_what_is_needed(archives):
    names = zipfile.ZipFile(archives[1]).namelist()
    (path,) = [name for name in names if name.endswith("METADATA")]
    lines = zipfile.ZipFile(archives[1]).read(path).decode().split("\n\n")[0].splitlines()
    plain = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert plain == ["Requires-Dist: torch>=2.11", "Requires-Dist: numpy>=1.26"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in project["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in lines


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_an_empty_environment(archives, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    constraints = ROOT / "requirements-dev.txt"
    (torch,) = [line for line in constraints.read_text().splitlines() if line.startswith("torch==")]
    tell(*pip, torch, "-c", constraints, env=clean)
    tell(*pip, archives[1], "-c", constraints, env=clean)
    layers = (
        "import spafl_kernels, sys; print('pydantic' in sys.modules, spafl_kernels.ThresholdLinear(3, 2).weight.shape)"
    )
    assert tell(python, "-c", layers, env=clean, cwd=tmp_path) == "False torch.Size([2, 3])\n"
    refused = subprocess.run([tmp_path / "venv/bin/spafl", "--version"], capture_output=True, text=True, env=clean)
    assert refused.returncode == 1 and "pip install 'spafl-kernels[sim]'" in refused.stderr
    tell(*pip, f"{archives[1]}[sim]", "-c", constraints, env=clean)
    shown = tell(python, "-m", "spafl.demo", "--seeds", "1", "--rounds", "2", env=clean, cwd=tmp_path)
    assert "fedavg" in shown

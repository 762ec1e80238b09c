# make demo   set up and run the main job on embedded real data
# make test   set up and run the fast tests: under eight minutes on two idle cores
# make fashion-mnist   set up and compare SpaFL, FedAvg and Local on Fashion-MNIST, 20 rounds, in three minutes
# make bench  measure everything that needs no GPU, on an idle machine; rewrites the tables and pictures
# make test-all  every test: an hour; says how long it took, and which tests took longest
# make flower, make flower-demo   set up Flower in an environment of its own and run its tests, or the demo on it
# make gpu-report OUT=folder   a short visit to a GPU: everything that decides, in nine minutes; make gpu-pack before it
# make test-gpu, make bench-gpu, make tune-gpu   on a machine with a GPU, with the PyTorch it has; nothing is downloaded
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo fashion-mnist test test-all bench gpu-pack gpu-report test-gpu bench-gpu tune-gpu lint docs clean flower flower-demo

setup: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; set PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m spafl.demo

# Where the data are not on this machine, the command says how to get them.
# All three side by side, also on two cores: one after two others would leave a core idle for a third of the time.
fashion-mnist: $(STAMP)
	$(BIN)/spafl table experiments/fmnist-lenet5.toml --methods spafl-tuned,fedavg,local \
	  --set rounds=20 --set evaluation.every=20 --jobs 3 --runs runs/fashion-mnist

test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto

test-all: $(STAMP)
	SPAFL_SLOW_TESTS=1 $(BIN)/python -m pytest -q -n auto --durations=40

bench: $(STAMP)
	$(BIN)/python -m benchmarks all

# Flower pins packages that the development environment has newer: it gets an environment of its own.
FLOWER := .venv-flower
FLOWER_STAMP := $(FLOWER)/.installed
FLOWER_PATH := PYTHONPATH="$(CURDIR):$(CURDIR)/python"

$(FLOWER_STAMP): requirements-flower.txt
	$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-flower.txt
	@touch $(FLOWER_STAMP)

flower: $(STAMP) $(FLOWER_STAMP)
	$(FLOWER_PATH) SPAFL_SLOW_TESTS=1 $(FLOWER)/bin/python -m pytest -q -n 2 --durations=20 tests/flower

flower-demo: $(STAMP) $(FLOWER_STAMP)
	$(FLOWER_PATH) $(FLOWER)/bin/python -m spafl.flower.demo

# The interpreter that holds the CUDA build of PyTorch; the development environment pins a CPU one.
GPU_PYTHON ?= $(PYTHON)
GPU_PATH := PYTHONPATH="$(CURDIR):$(CURDIR)/python"

# Most of the time compiles kernels; pytest-xdist, where it is there, does that on several cores.
GPU_PARALLEL = $(shell $(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo '-n 8')

# On a machine without a GPU: kernels, extension and packages for a visit, in build/gpu. AHEAD_PYTHON: an interpreter with
# Triton alone, of the Python version of the machine with the GPU; with it, launching stubs are compiled as well.
AHEAD_PYTHON ?= $(BIN)/python
gpu-pack: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.ahead.pack --python $(AHEAD_PYTHON)

# On a machine with one, from a checkout with or without build/gpu.
OUT ?= runs/gpu-report
gpu-report:
	$(GPU_PATH) $(GPU_PYTHON) -m benchmarks.gpu.report --out $(OUT)

test-gpu:
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PATH) $(GPU_PYTHON) -m spafl_kernels.env
	$(GPU_PATH) $(GPU_PYTHON) -m pytest -q -rs -m gpu $(GPU_PARALLEL) tests/kernels/gpu

bench-gpu:
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PATH) $(GPU_PYTHON) -m benchmarks.gpu

# Once per device, before bench-gpu: writes the tile sizes that the kernels then use.
tune-gpu:
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PATH) $(GPU_PYTHON) -m benchmarks.gpu --tune
	$(GPU_PATH) $(GPU_PYTHON) -m benchmarks.gpu --tables

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, in build/docs: no network once the packages are there. Warnings are errors.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

clean:
	rm -rf $(VENV) $(FLOWER) build *.egg-info

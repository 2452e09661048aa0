# make demo [ARGS=--quick]: the three jobs on the samples, one table.   make test: the default tests.   make lint: style.
# make bench-gpu ARGS="--output DIR --minutes 60": test and measure on one GPU.   make test-...: longer tests (CONTRIBUTING.md).
# make mutants: put small faults into the code, one at a time, and see whether the tests notice (CONTRIBUTING.md).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

help:
	@sed -n 's/^# //p' Makefile

.PHONY: help demo test test-slow test-soak test-long test-cluster bench-gpu mutants lint clean

demo: $(VENV)/ready
	$(BIN)/python demo.py $(ARGS)

test: $(VENV)/ready-dev
	$(PYTEST)

test-slow: $(VENV)/ready-dev
	$(PYTEST) -m slow

test-long: $(VENV)/ready-dev
	$(PYTEST) -m "slow or soak or tmpfs"

test-soak: $(VENV)/ready-dev
	$(BIN)/python -m pytest -m "soak or tmpfs"

test-cluster: $(VENV)/ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "net or slurm"

bench-gpu: $(VENV)/ready-dev
	$(BIN)/python benchmarks/gpu.py $(ARGS)

mutants: $(VENV)/ready-dev
	$(BIN)/python -m pip install -q "mutmut==3.8.*" "coverage>=7.10"
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) output/demo

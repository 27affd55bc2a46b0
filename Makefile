# Lachesis: the developer's verbs. `make help` lists them.
.DEFAULT_GOAL := help
PYTHON ?= python3
N ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(WHEELS),--no-index --find-links $(WHEELS))
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: help setup demo test test-long check fmt bench bench-gpu clean

help: ## list these verbs
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/installed ## make .venv with .venv/bin/lachesis (WHEELS=DIR: no network; TORCH_INDEX=URL: another build of torch)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lachesis needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch, then the rest; this takes a few minutes the first time."
	$(PIP) $(TORCH_FROM) torch==2.13.0
	$(PIP) -c constraints.txt -e '.[worker,dev]'
	@touch $@

demo: setup ## simulate a cohort and run the main job on it, to a report
	$(BIN)/lachesis demo

test: setup ## the tests, two files at a time, each process with servers of its own (T=path for some, N=4 for more at a time)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(N) --dist loadfile $(T)

test-long: setup ## the slow tests: training seeds, faults
	$(BIN)/python -m pytest -m long $(T)

check: setup ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: setup ## mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## measure, side by side (ONLY=load,label for some rows)
	$(BIN)/python -m tests.bench $(ONLY)

bench-gpu: setup ## check and measure what wants an accelerator, in one go (docs/benchmarks.md)
	$(BIN)/python -m tests.bench.gpu

clean: ## remove caches, not the environment and not any store
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

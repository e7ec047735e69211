# One command each: `make demo` to see it work, `make test` and `make check` to change it.
# Needs Python 3.11 or newer and a package index; everything is installed into $(VENV), nothing elsewhere.

PYTHON ?= python3
VENV ?= .venv
# As many as there are cores, at most 8; each holds some 1.5 GB, so where memory is short: make test WORKERS=2
WORKERS ?= $(shell $(PYTHON) -c "import os; print(max(2, min(8, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)))")
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo quick test check clean

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.demo-installed  ## Distil a small detector and write runs/demo/report.html.
	$(BIN)/drkd demo

quick: $(VENV)/.demo-installed  ## A short run that shows that everything works, not that it learns.
	$(BIN)/drkd demo --quick

# One thread a worker: workers with a thread pool each would fight over the cores.
test: $(VENV)/.dev-installed  ## Run the tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=25 --durations-min=10 $(PYTEST_ARGS)

check: $(VENV)/.dev-installed  ## Lint, format, types, layers.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## Remove caches and build products; keeps the environment and the runs.
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found. Install Python 3.11 or newer, or name it: make demo PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "drkd needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name a newer one: make demo PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The install is editable: only a change of pyproject.toml makes it stale. Python compiles what it
# imports, when it first does: pip would compile all of torch and the rest, most of it never read.
# Where Python is told to keep nothing, as many images of containers tell it, it would compile all
# of what it imports at every start instead.
unexport PYTHONDONTWRITEBYTECODE
$(VENV)/.demo-installed: pyproject.toml | $(BIN)/python
	$(PIP) install --no-compile -e ".[demo]"
	@touch $@

$(VENV)/.dev-installed: pyproject.toml | $(BIN)/python
	$(PIP) install --no-compile -e ".[dev,demo,imagenet]"
	@touch $@ $(VENV)/.demo-installed

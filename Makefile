# make quickstart   train a small model from a local S3 server and sample from it (at most 10 minutes on 2 cores)
# make test         the tests; `make slow` runs the long ones too, `make lint` the formatter, linter and type checker
# make layers       draw docs/images/layers.svg from the imports; `make plans` writes the tables of docs/planning.md
# Needs Python 3.11 or newer and make. Everything is installed into .venv; `make clean` removes it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
SHELL := /bin/bash
PARALLEL := -n 2 --dist loadfile  # files of tests side by side; fixtures of a file are made once

# The repository root must stay off sys.path: its folders (kernels, eval, ...) are imported as megadit.kernels, ...
export PYTHONSAFEPATH := 1

.PHONY: quickstart test slow lint layers plans clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/megadit.stamp
	@$(BIN)/megadit quickstart

test: $(VENV)/tools.stamp
	$(BIN)/pytest $(PARALLEL)

slow: $(VENV)/tools.stamp
	$(BIN)/pytest $(PARALLEL) -m "slow or not slow"

# mypy cannot follow the folder mapping of setup.py, so it checks a built tree.
lint: $(VENV)/tools.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/lint && $(BIN)/python setup.py --quiet build_py --build-lib build/lint
	MYPYPATH=build/lint $(BIN)/mypy -p megadit

layers:
	$(PYTHON) docs/layers.py

plans: $(VENV)/megadit.stamp
	$(BIN)/python docs/plans.py

clean:
	rm -rf $(VENV) build dist megadit.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch first and by itself: it brings its own dependencies, and nothing after it may replace it.
$(VENV)/packages.stamp: requirements/torch.txt requirements/lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megadit needs Python 3.11 or newer, not " + sys.version.split()[0])'
	@echo "Setting up $(VENV) (once; about two minutes and 1.5 GB)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install -r requirements/torch.txt -c requirements/lock.txt
	@$(PIP) install --no-deps --no-build-isolation -r requirements/lock.txt
	@touch $@

$(VENV)/megadit.stamp: $(VENV)/packages.stamp setup.py
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/tools.stamp: $(VENV)/megadit.stamp requirements/tools.txt
	@$(PIP) install --no-deps --no-build-isolation -r requirements/tools.txt
	@touch $@

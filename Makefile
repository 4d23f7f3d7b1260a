# make test   everything CI runs, in a virtual environment of its own (.venv)
# make setup  the virtual environment with the command line: .venv/bin/resonance
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test lint format clean

setup: .venv/.installed

.venv/.installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Resonance needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	@# torch first: the pinned version decides which build everything else is installed against.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "`grep '^torch==' requirements.txt`" || \
		{ echo "The package index could not be reached or has no such torch. Check the network or PIP_INDEX_URL, then run make again."; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint
	$(BIN)/python -m pytest

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info

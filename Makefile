# make test   everything CI runs, in a virtual environment of its own (.venv)
# make setup  the virtual environment with the command line: .venv/bin/resonance
# make demo   a model fine-tuned for one simulated speaker, from recordings to report, offline once set up
PYTHON ?= python3
BIN := .venv/bin

DEMO ?= resonance-demo
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NO_INDEX := echo "Packages could not be installed; what pip says is above. No connection to the package index? Check the" \
	"network and the proxy (HTTPS_PROXY), or name a mirror: make PIP_INDEX_URL=https://… . Then run make again: what is" \
	"installed already is kept."; exit 1

.PHONY: setup demo test lint format clean

setup: .venv/.installed

.venv/.installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Resonance needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.11"; exit 1; }
	@echo "Installing into .venv: torch first, then the packages of requirements-dev.txt. This takes some minutes."
	@$(PYTHON) -m venv .venv
	@# torch first: the pinned version decides which build everything else is installed against.
	@$(PIP) "`grep '^torch==' requirements.txt`" || { $(NO_INDEX); }
	@$(PIP) -r requirements-dev.txt || { $(NO_INDEX); }
	@$(PIP) --no-deps -e . || { $(NO_INDEX); }
	@touch $@

demo: setup
	@$(BIN)/resonance demo --output_dir "$(DEMO)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint
	@# Files side by side, the longest first (tests/conftest.py); four at most, because each takes a gigabyte or so.
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info

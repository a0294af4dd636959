# `make test` on a fresh machine needs Python 3.11 or newer and a C++ compiler; `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv with the pinned versions (the other targets do it, too)

# torch comes first and pinned, so that pip can take a local CPU build; left free, it may pull gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is not Python 3.11 or newer"; echo "hint: make PYTHON=/path/to/python3.11 ..."; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## decode with and without the built-in drafter
	$(BIN)/flashdraft demo
	$(BIN)/flashdraft demo --kernel int8

# One torch thread a worker; tests of threads and of time run afterwards, alone. -rs tells why a test was left out, as
# those of the chat page are where there is no Chromium.
test: lint ## lint, types and every test, two at a time (WORKERS=N)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n $(WORKERS) --dist worksteal -m "not alone"
	$(BIN)/python -m pytest -m alone

lint: $(READY) ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## measure speed, tau and T = 1 (docs/measured.md)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/bench.sh

docs: $(READY) ## build the documentation into site/, strictly and with nothing fetched
	$(BIN)/python recipes/command_reference.py docs/reference/commands.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean: ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . \( -path ./.venv -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

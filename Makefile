# Every target makes what it needs, in .venv; nothing is installed by hand. `make` alone prints this list.
# Needs: python3 >= 3.11 with venv, make, and for the native kernels a C++ compiler.

PYTHON ?= python3
MODEL ?= smollm2-135m
PROMPT ?= Why is the sky blue?

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE $(shell find src csrc -not -name '__pycache__' -not -name '*.pyc' -not -name '*.so')

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
unexport PYTHONPATH

.PHONY: help
help: ## print this list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(VENV)/.package ## install, pull the default model, benchmark it shortly, let it answer
	$(BIN)/tokenmill pull $(MODEL)
	$(BIN)/tokenmill bench $(MODEL) --weights w8a8 --batch 1,8 --prompt 128 --output 32
	$(BIN)/tokenmill run $(MODEL) "$(PROMPT)"

.PHONY: test
# The longest file first, so that no worker ends alone with it.
test: $(VENV)/.dev ## the suite without its long forms (under 12 minutes on 2 cores)
	$(BIN)/tokenmill pull $(MODEL)
	$(BIN)/python -m pytest tests/stateful tests/server tests/fast -m "fast or server or stateful" -n 2 --dist loadfile --durations=10
	$(BIN)/python -m pytest -m "model or train" -n 2 --dist loadfile --durations=15

.PHONY: test-fast
test-fast: $(VENV)/.dev ## tests that need no weights
	$(BIN)/python -m pytest -m fast -n 2 --dist loadfile --durations=10

.PHONY: check
check: $(VENV)/.dev ## format, lint, types, rules of the house
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/fast/test_house.py tests/fast/test_house_rules.py

.PHONY: format
format: $(VENV)/.dev ## put the code into the format that `make check` asks for
	$(BIN)/ruff format src tests scripts benchmarks
	$(BIN)/ruff check --fix src tests scripts benchmarks

.PHONY: peers
peers: $(VENV)/.package ## make the environments of the systems that tokenmill is compared with
	$(BIN)/python -m benchmarks.peers --prepare

.PHONY: bench
bench: $(VENV)/.package ## tokenmill and its peers in turns, in one run; writes the table of README.md
	$(BIN)/tokenmill pull $(MODEL)
	$(BIN)/python -m benchmarks.peers --model $(MODEL) --json build/bench.json --page README.md

.PHONY: test-all
test-all: $(VENV)/.dev ## the long forms: every instruction set, sanitizers, full counts; result in docs/results
	$(BIN)/python scripts/requirements.py fuzz > $(VENV)/fuzz.txt
	$(PIP) install -r $(VENV)/fuzz.txt || echo "no fuzzer for this Python: its test will be skipped"
	$(BIN)/tokenmill pull $(MODEL)
	$(BIN)/python scripts/test_all.py

.PHONY: wheel
wheel: $(VENV)/.dev ## one manylinux wheel with every instruction set, tried in a fresh environment
	rm -rf dist wheelhouse build/wheel-venv
	$(PIP) wheel --no-deps --no-build-isolation -w dist .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w wheelhouse dist/*.whl
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip --disable-pip-version-check --quiet install wheelhouse/*.whl
	cd build && wheel-venv/bin/python -c "import tokenmill.kernels._native" && wheel-venv/bin/tokenmill doctor
	ls -l wheelhouse

.PHONY: clean
clean: ## remove what was built, and .venv
	rm -rf $(VENV) build dist wheelhouse .mypy_cache .ruff_cache .pytest_cache

# What stands in .venv is recorded by stamps: .build (tools of the build), .package (tokenmill itself),
# .dev (tools and libraries of the tests).
$(VENV)/.build: pyproject.toml scripts/requirements.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tokenmill needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/requirements.py build > $(VENV)/build.txt
	$(PIP) install -r $(VENV)/build.txt
	@touch $@

$(VENV)/.package: $(VENV)/.build $(SOURCES)
	$(PIP) install --no-build-isolation -Cbuild-dir=build/package .
	@touch $@

# torch is asked for by its full version first: the extra then finds it installed.
$(VENV)/.dev: $(VENV)/.package pyproject.toml
	$(PIP) install torch==2.13.0
	$(BIN)/python scripts/requirements.py dev train postgres > $(VENV)/dev.txt
	$(PIP) install -r $(VENV)/dev.txt
	@touch $@

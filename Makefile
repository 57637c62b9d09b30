# `make demo` and `make test` set up what they need in .venv, once. `make help` lists the rest.
#
# Your own environment instead of .venv (CUDA, say): make test BIN=/path/to/env/bin

BIN := .venv/bin
PYTHON := $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
# One core for torch where there are two: the engine under test needs the other. On larger machines
# vLLM binds its threads itself and is left alone.
ENV := VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 $(if $(filter 1 2,$(shell nproc)),OMP_NUM_THREADS=1)
BENCH_JSON := build/bench-capacity.json
# Paths or options for pytest: make test T='tests/engine -x'
T := tests

# Set-up only if .venv is what runs.
SETUP := $(if $(filter file,$(origin BIN)),setup)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check format needle shapes bench clean distclean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup:  ## .venv with everything in it; does nothing the second time
	@$(PYTHON) requirements/setup_cpu.py

demo: $(SETUP)  ## a real vllm serve, stock against plugin, in numbers
	$(ENV) $(BIN)/vllm-spindle demo

# With PYTEST_STATUS=FILE the exit status goes there, so that pytest's summary stays the last line.
test: $(SETUP)  ## every test, real vLLM included
	@$(ENV) $(BIN)/python -m pytest $(T) $(if $(PYTEST_STATUS),; echo $$? > $(PYTEST_STATUS))

test-fast: $(SETUP)  ## the tests that need no vLLM
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/property

check: $(SETUP)  ## formatting, lint, types; what CI and pre-commit ask for
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(SETUP)  ## formatting and the fixes ruff is sure of
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

needle: $(SETUP)  ## train models/needle again, from generated data
	$(BIN)/python models/needle/train.py --out models/needle

shapes: $(SETUP)  ## train models/shapes again, from generated pictures; goes on where it was killed
	$(BIN)/python models/shapes/train.py --out models/shapes

bench: $(SETUP)  ## capacity and speed, stock against plugin (JSON in BENCH_JSON)
	@mkdir -p $(dir $(BENCH_JSON))
	$(ENV) $(BIN)/vllm-spindle bench capacity --model models/needle --json $(BENCH_JSON)

clean:  ## build outputs and caches; keeps .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## .venv too
	rm -rf .venv

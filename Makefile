# `make demo` and `make test` set up what they need in .venv, once. `make help` lists the rest.
#
# Your own environment instead of .venv (CUDA, say): make test BIN=/path/to/env/bin

BIN := .venv/bin
PYTHON := $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
# One core for torch where there are two: the engine under test needs the other. On larger machines
# vLLM binds its threads itself and is left alone.
ENV := VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 $(if $(filter 1 2,$(shell nproc)),OMP_NUM_THREADS=1)
BENCH_JSON := build/bench-capacity.json
# README's table: 4 tasks x 17 questions x 3 seeds. More budgets: make quality QUALITY_BUDGETS=0.5,0.4,0.3,0.25,0.2,0.15
# In float32: the same figures on every machine, and faster where a CPU has no bfloat16 instructions.
QUALITY_SEEDS := 3
QUALITY_BUDGETS := 0.5,0.25,0.15
QUALITY = --lengths 512 --num-questions 17 --seeds $(QUALITY_SEEDS) --budgets $(QUALITY_BUDGETS) \
	--dtype float32 --num-workers $(shell nproc) --plots
# Paths or options for pytest: make test T='tests/engine -x'
T := tests
# A file's tests together, a worker a core. WORKERS=0: one process, with output as it comes.
WORKERS := auto
XDIST := -n $(WORKERS) --maxprocesses 4 --dist loadscope --no-loadscope-reorder

# Set-up only if .venv is what runs.
SETUP := $(if $(filter file,$(origin BIN)),setup)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check format needle recall text shapes crowd bench quality kvpress clean distclean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup:  ## .venv with everything in it; does nothing the second time
	@$(PYTHON) requirements/setup_cpu.py

demo: $(SETUP)  ## a real vllm serve, stock against plugin, in numbers
	$(ENV) $(BIN)/vllm-spindle demo

# With PYTEST_STATUS=FILE the exit status goes there, so that pytest's summary stays the last line.
test: $(SETUP)  ## every test, real vLLM included
	@$(ENV) $(BIN)/python -m pytest $(XDIST) $(T) $(if $(PYTEST_STATUS),; echo $$? > $(PYTEST_STATUS))

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

recall: $(SETUP)  ## train models/recall again, from generated data; goes on where it was killed
	OMP_NUM_THREADS=1 $(BIN)/python models/recall/train.py --out models/recall

text: $(SETUP)  ## train models/text again, from Python's own sources; goes on where it was killed
	OMP_NUM_THREADS=1 $(BIN)/python models/text/train.py --out models/text

shapes: $(SETUP)  ## train models/shapes again, from generated pictures; goes on where it was killed
	$(BIN)/python models/shapes/train.py --out models/shapes

crowd: $(SETUP)  ## train models/crowd again, from models/shapes; goes on where it was killed
	OMP_NUM_THREADS=1 $(BIN)/python models/crowd/train.py --out models/crowd

bench: $(SETUP)  ## capacity and speed, stock against plugin (JSON in BENCH_JSON)
	@mkdir -p $(dir $(BENCH_JSON))
	$(ENV) $(BIN)/vllm-spindle bench capacity --model models/needle --json $(BENCH_JSON)

quality: $(SETUP)  ## README's "What do I lose?": every method, both bundled models; goes on where it stopped
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(BIN)/python -m pip install --quiet 'matplotlib>=3.9,<4'
	$(ENV) $(BIN)/vllm-spindle eval --model models/needle $(QUALITY) --tasks single,multikey_1,multikey_2,multikey_3 \
		--out build/quality/needle
	$(ENV) $(BIN)/vllm-spindle eval --model models/recall $(QUALITY) --tasks multikey_2,multivalue,multiquery,variables \
		--out build/quality/recall

kvpress: $(SETUP)  ## .venv-kvpress with kvpress 0.5.5, then its presses beside our baselines
	@test -x .venv-kvpress/bin/python || $(PYTHON) -m venv .venv-kvpress
	@.venv-kvpress/bin/python -c 'import kvpress' 2>/dev/null || { \
		.venv-kvpress/bin/python -m pip install --quiet --only-binary=:all: -r requirements/kvpress.txt && \
		.venv-kvpress/bin/python -m pip install --quiet --no-deps kvpress==0.5.5; }
	$(ENV) $(BIN)/python benchmarks/kvpress_side.py --out benchmarks/results/kvpress_side.json

clean:  ## build outputs and caches; keeps .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## .venv and .venv-kvpress too
	rm -rf .venv .venv-kvpress

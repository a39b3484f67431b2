# Everything a developer or CI runs. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# More words for pip, for instance an index that holds torch builds for CPUs only.
PIP_ARGS ?=
# More words for pytest: make test PYTEST_ARGS='-k packing'
PYTEST_ARGS ?=
# How many tests run at a time; 0 runs them in pytest's own process, as a debugger needs it.
TEST_WORKERS ?= 2
# make torture: how many random kills, and the seed that repeats them.
FAULT_KILLS ?= 200
FAULT_SEED ?= 20260
SOURCES := api engine shared worker
# Tests and checks never reach for a model hub.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=passive

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-rl dev test test-all torture test-clients client-envs check format bench bench-engine bench-head-memory bench-tenants bench-durability bench-disk-log bench-edge bench-sampling bench-prompts bench-adapters bench-gpu test-gpu gpu-packages docs golden proto lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the server, the demo's and the developers' packages

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "gradstream needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned packages of constraints.txt (the first time takes some minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,demo]'
	@touch $@
	@echo "ready: $(BIN)/gradstream --help"

demo: setup ## train SmolLM2-135M to speak Shakespeare through the tinker SDK, a few minutes on a CPU
	@$(BIN)/python -m examples.speak_shakespeare

demo-rl: setup ## teach SmolLM2-135M to name words by a reward, with a plot of it, some minutes on a CPU
	@$(BIN)/python -m examples.name_a_word

dev: setup ## serve the tiny test model on loopback until Ctrl-C
	$(BIN)/gradstream serve --config configs/tiny.yaml

test: setup ## run the tests, the slow ones left out
	$(OFFLINE) $(BIN)/python -m pytest tests -m 'not slow' -n $(TEST_WORKERS) --dist worksteal -rs --tb=short $(PYTEST_ARGS)

test-all: setup ## run every test
	$(OFFLINE) $(BIN)/python -m pytest tests -rs --tb=short $(PYTEST_ARGS)

torture: setup ## kill, cut, fill and damage everything for about two hours: FAULT_KILLS=200 FAULT_SEED=20260
	$(OFFLINE) GRADSTREAM_FAULT_KILLS=$(FAULT_KILLS) GRADSTREAM_FAULT_SEED=$(FAULT_SEED) \
	  $(BIN)/python -m pytest tests/faults -rs --tb=short $(PYTEST_ARGS)

client-envs: setup ## make the environments of the stock clients that the contract tests run, below .cache/clients
	@$(BIN)/python tools/client_envs.py --pip-args='$(PIP_ARGS)'

test-clients: client-envs ## run the stock clients against a server: three versions of the tinker SDK, cookbook recipes, the xorl client
	$(OFFLINE) $(BIN)/python -m pytest tests/contract/clients -n $(TEST_WORKERS) --dist loadfile -rs --tb=short $(PYTEST_ARGS)

check: setup ## format, lint, types, import contracts, dead code, dependencies, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/vulture
	$(BIN)/deptry $(SOURCES)
	$(BIN)/python tools/generate_proto.py --check

format: setup ## rewrite the sources as ruff formats them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## measure the server against bare torch + peft on a tiny model
	$(OFFLINE) $(BIN)/python -m bench.latency

bench-engine: setup ## measure training beside transformers.Trainer + peft in the same run
	$(OFFLINE) $(BIN)/python -m bench.engine

bench-head-memory: setup ## measure the memory of vocabulary logits, ours beside all of them at once
	$(OFFLINE) $(BIN)/python -m bench.head_memory

bench-tenants: setup ## measure many small tenants at once, and a small one beside a heavy one
	$(OFFLINE) $(BIN)/python -m bench.tenants

bench-durability: setup ## measure what each durability setting costs, and recovery times
	$(OFFLINE) $(BIN)/python -m bench.durability

bench-disk-log: setup ## measure what an append to the log on disk costs, and reading it
	$(BIN)/python -m bench.disk_log

bench-edge: setup ## measure the HTTP edge: submits, decoding, parked polls, a burst of large bodies
	$(BIN)/python -m bench.edge

bench-sampling: setup ## measure the sampler against transformers' generate, base model and LoRA
	$(OFFLINE) $(BIN)/python -m bench.sampling

bench-prompts: setup ## measure what shared prompts save: groups of completions, each datum for itself and together
	$(OFFLINE) $(BIN)/python -m bench.prompts

bench-adapters: setup ## measure 1,000 registered adapters, 64 of them active: memory, cuts, recovery
	$(OFFLINE) $(BIN)/python -m bench.adapters

# A machine with a GPU may have no more than Python, torch and transformers: these use its own interpreter, and set nothing up.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU_ENV := PYTHONPATH=build/gpu-packages:engine:shared:api:worker:.
# What the engine needs beyond torch's and transformers' own packages.
GPU_PACKAGES := msgspec structlog zstandard

bench-gpu: ## measure training on one NVIDIA GPU: tokens/s and MFU of Qwen3-shaped models
	$(GPU_ENV) HF_HUB_OFFLINE=1 $(GPU_PYTHON) -m bench.gpu --server

test-gpu: ## run the tests that need a GPU; they are skipped where there is none
	$(GPU_ENV) HF_HUB_OFFLINE=1 $(GPU_PYTHON) -m pytest -c tests/gpu.ini --rootdir=. --confcutdir=tests/unit/engine -m gpu \
	  $(shell grep -rl --include='test_*.py' 'mark\.gpu' tests/unit/engine)

gpu-packages: setup ## fetch into build/gpu-packages what bench-gpu and test-gpu need on a bare machine with Python 3.12
	rm -rf build/gpu-packages build/gpu-wheels
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  -c constraints.txt -d build/gpu-wheels $(GPU_PACKAGES)
	for wheel in build/gpu-wheels/*.whl; do $(BIN)/python -m zipfile -e $$wheel build/gpu-packages; done

proto: setup ## write the protobuf modules from their .proto files
	$(BIN)/python tools/generate_proto.py

docs: setup ## write the pages that are made from the code: config, endpoints, losses
	$(BIN)/python -m tools.config_docs
	$(BIN)/python tools/endpoints.py > docs/endpoints.md
	$(BIN)/python -m tools.losses_docs

golden: setup ## record the run in tests/golden again, when the log's format or the arithmetic changed on purpose
	$(OFFLINE) $(BIN)/python -m tools.golden_log

lock: setup ## pin in constraints.txt what .venv holds
	$(BIN)/python tools/lock.py

clean: ## remove caches and build products; .venv, outputs and models stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

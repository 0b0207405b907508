# Every target but gpu-check sets the environment up first; nothing is installed outside ./.venv.
SHELL := bash
PY := .venv/bin/python
STAMP := .venv/.installed
# Ranks of `make train` (default: the GPUs, 8 at most; 8 on a machine without), and overrides or
# options handed on: make train NPROC=2 ARGS="train.steps=20"
NPROC ?=
ARGS ?=
# Processes that share the default suite's files: worlds of 2 to 4 ranks leave cores idle while they
# start and wait. The long grid measures times and runs in one.
WORKERS ?= 2
# Version of torch that `make test-torch` runs with.
TORCH ?= 2.11
# The last commit before packages were renamed and features got descriptors.
GOLDEN ?= b3f27df

.DEFAULT_GOAL := help
.PHONY: help setup train test test-full test-torch golden coverage lint format plan bench gpu-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP) ## create ./.venv and install the project with pinned versions
	@:

$(STAMP): pyproject.toml constraints.txt constraints-cu12.txt setup.py \
		launch/setup.sh launch/find_python.sh launch/choose_cuda.sh
	@launch/setup.sh

# CUDA=12 or 13 other than what is installed: again.
ifneq ($(filter 12 13,$(CUDA)),)
ifneq ($(CUDA),$(shell cat .venv/.cuda 2>/dev/null))
$(STAMP): again
endif
endif
.PHONY: again
again:

train: $(STAMP) ## the main job: the 30B on 8 GPUs that fit it, a smaller model on fewer, its twin on CPUs
	ranks=$(or $(NPROC),$$($(PY) -m moe_train.backend.cuda.ranks --most 8)) && \
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node $$ranks train.py $(ARGS)

test: $(STAMP) ## the default test-suite, in WORKERS processes (2)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-full: $(STAMP) ## the default suite and the long grids
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m '' $(ARGS)

test-torch: ## the tests of the kernels with another torch: make test-torch TORCH=2.11
	@launch/test_torch.sh $(TORCH) $(ARGS)

golden: $(STAMP) ## losses and gradient norms against a reference commit (GOLDEN=hash), bit for bit
	$(PY) -m tests.golden $(GOLDEN)

coverage: $(STAMP) ## line coverage of the tests without worlds; fails below the floor in pyproject.toml
	OMP_NUM_THREADS=1 $(PY) -m coverage run -m pytest -q -m 'not full and not world' $(ARGS)
	$(PY) -m coverage report

lint: $(STAMP) ## ruff, formatting, types, shell scripts
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/shellcheck launch/*.sh launch/*.sbatch .ci/run

format: $(STAMP) ## rewrite the sources in the one format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

plan: $(STAMP) ## layout, parameters and legality of a configuration, without starting it
	@.venv/bin/moe-train plan $(ARGS)

bench: $(STAMP) ## a step of ours against others'; writes benchmarks/results/latest.json
	OMP_NUM_THREADS=1 $(PY) -m benchmarks $(ARGS)

gpu-check: ## what only a GPU can prove, without set-up; CHECKS=a,b picks, OUT=folder of the report
	@launch/gpu_check.sh $(if $(CHECKS),--checks $(CHECKS)) $(if $(OUT),--out $(OUT)) $(ARGS)

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find moe_train tests -name __pycache__ -type d -exec rm -rf {} +

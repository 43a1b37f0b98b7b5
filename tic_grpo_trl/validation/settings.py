"""Checks of a configuration that need nothing but its values; every error names the option and the fix."""

import json
import math
import numbers
import os
import types
import typing
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Any

from ..algorithms import ANCHORED_LOSS_TYPES, OTHER_LOSS_TYPES
from ..objective import LEVELS


if TYPE_CHECKING:
    from ..config import TICGRPOConfig


_PLAIN = {bool, int, float, str, types.NoneType}
_MAY_BE_NONE = ("top_k", "max_grad_norm")  # which mean "off" then
_MAY_BE_INFINITE = ("delta", "max_grad_norm")

# Smallest value, largest value, an example; "(" and ")" leave the end itself out
_COUNT = ("[", 1, math.inf, ")", 1)
_SHARE = ("[", 0, 1, "]", 0.5)
_POSITIVE = ("(", 0, math.inf, ")", 1.0)
_NOT_NEGATIVE = ("[", 0, math.inf, ")", 0)
_RANGES = {
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "steps_per_generation": _COUNT,
    "generation_batch_size": _COUNT,
    "num_generations": ("[", 2, math.inf, ")", 8),
    "num_generations_eval": _COUNT,
    "num_iterations": _COUNT,
    "max_completion_length": ("[", 1, math.inf, ")", 512),
    "vllm_max_model_length": _COUNT,
    "vllm_tensor_parallel_size": _COUNT,
    "vllm_gpu_memory_utilization": ("(", 0, 1, "]", 0.3),
    "vllm_importance_sampling_clip_max": _POSITIVE,
    "vllm_importance_sampling_clip_min": _NOT_NEGATIVE,
    "ref_model_sync_steps": _COUNT,
    "ref_model_mixup_alpha": _SHARE,
    "top_entropy_quantile": _SHARE,
    "temperature": _POSITIVE,
    "top_p": ("(", 0, 1, "]", 1.0),
    "top_k": ("[", -1, math.inf, ")", 0),
    "min_p": _SHARE,
    "repetition_penalty": _POSITIVE,
    "beta": _NOT_NEGATIVE,
    "sapo_temperature_neg": _POSITIVE,
    "sapo_temperature_pos": _POSITIVE,
    "learning_rate": ("[", 0, math.inf, ")", 1e-6),
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": ("[", 0, math.inf, "]", 1.0),
    "adam_beta1": ("[", 0, 1, ")", 0.9),
    "adam_beta2": ("[", 0, 1, ")", 0.999),
    "adam_epsilon": ("(", 0, math.inf, ")", 1e-8),
    "warmup_steps": _NOT_NEGATIVE,
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_total_limit": _COUNT,
    "pad_to_multiple_of": _COUNT,
    "num_completions_to_print": _NOT_NEGATIVE,
}
_CHOICES = {
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("server", "colocate"),
}
# without those that may be the name of a file
_DICTIONARIES = (
    "model_init_kwargs",
    "generation_kwargs",
    "chat_template_kwargs",
    "lr_scheduler_kwargs",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
)


def _kinds(config: "TICGRPOConfig") -> dict[str, set[type]]:
    """The types that each field may have."""
    kinds = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds[name] = set(typing.get_args(hint)) if is_union else {hint}
    return kinds


def _plain(config: "TICGRPOConfig") -> dict[str, set[type]]:
    """The fields whose value is a number, a truth value, a text or nothing."""
    return {name: kinds for name, kinds in _kinds(config).items() if kinds <= _PLAIN}


def convert_types(config: "TICGRPOConfig"):
    """Numbers and truth values given as texts become what they say: YAML reads 1e-6 as one. Others are refused."""
    for name, kinds in _plain(config).items():
        value = getattr(config, name, None)
        if value is not None:
            setattr(config, name, _settled(name, kinds, value))
        elif kinds <= {int, float} and name not in _MAY_BE_NONE:
            raise ValueError(f"{name}=None: give a number, or leave {name} out for its default.")
    for name, kinds in _kinds(config).items():
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Enum):
                _settle_choice(config, name, [member.value for member in kind])


def _settle_choice(config: "TICGRPOConfig", name: str, choices: list[str]):
    value = getattr(config, name, None)
    if value is False and "no" in choices:  # YAML reads a plain no as that
        setattr(config, name, "no")
    elif getattr(value, "value", value) not in choices:
        raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(choices)}.")


def _settled(name: str, kinds: set[type], value: Any) -> Any:
    if str in kinds:
        if isinstance(value, str | os.PathLike | Enum) or not kinds <= {str, types.NoneType}:
            return value
        if name == "scale_rewards" and isinstance(value, bool):
            return value
        raise TypeError(f"{name}={value!r} must be a text.")
    if bool in kinds:
        text = str(value).lower()
        if isinstance(value, bool) or text in ("true", "false"):
            return text == "true"
        if isinstance(value, numbers.Integral) and value in (0, 1):
            return bool(value)
        raise TypeError(f"{name}={value!r} must be true or false.")
    number: Any = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"{name}={value!r} must be a number.") from None
    if type(number) not in (int, float):  # a number of NumPy's, if any
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise TypeError(f"{name}={value!r} must be a number.")
        number = float(number)
    if float in kinds:
        return number if int in kinds else float(number)  # torch's Adam wants both betas of one type
    if not float(number).is_integer():
        raise ValueError(f"{name}={value!r} must be a whole number.")
    return int(number)


def check_ranges(config: "TICGRPOConfig"):
    """Numbers that TRL and transformers take although nothing good can come of them."""
    for name, (opens, least, most, closes, example) in _RANGES.items():
        value = getattr(config, name, None)
        if not isinstance(value, int | float):
            continue
        above = value > least if opens == "(" else value >= least
        below = value < most if closes == ")" else value <= most
        if not (above and below):
            raise ValueError(f"{name}={value} must lie in {opens}{least}, {most}{closes}, such as {example}.")
    for name in _plain(config):
        value = getattr(config, name, None)
        if isinstance(value, float) and not math.isfinite(value) and (value != value or name not in _MAY_BE_INFINITE):
            raise ValueError(f"{name}={value} must be a finite number.")
    if config.top_k == -1 and not config.use_vllm:
        raise ValueError("top_k=-1 is vLLM's value for no limit, which transformers refuses: set top_k=0.")
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"Unknown {name} {getattr(config, name)!r}: choose {' or '.join(map(repr, choices))}.")
    if config.max_steps != -1 and config.max_steps < 1:
        raise ValueError(f"max_steps={config.max_steps} must be at least 1, or -1 for num_train_epochs to decide.")
    if config.max_steps == -1 and not config.num_train_epochs > 0:
        raise ValueError(f"num_train_epochs={config.num_train_epochs} must be positive, or set max_steps.")
    for name in _DICTIONARIES:
        _check_dictionary(name, getattr(config, name, None))
    weights = config.reward_weights
    if weights is not None and not (
        isinstance(weights, list | tuple)
        and all(isinstance(w, numbers.Real) and not isinstance(w, bool) and math.isfinite(w) for w in weights)
    ):
        raise ValueError(f"reward_weights={weights!r} must be a list of finite numbers, one for each reward function.")


def _check_dictionary(name: str, value: Any):
    if isinstance(value, str):  # a flag gives JSON
        with suppress(ValueError):
            value = json.loads(value)
    if not (value is None or isinstance(value, dict)):
        raise ValueError(f"{name}={value!r} must be a dictionary, as a flag in JSON.")


def check_weight(config: "TICGRPOConfig"):
    """The three axes: known values that go together."""
    level, mode = config.importance_sampling_level, config.clip_mode
    if level not in LEVELS:
        raise ValueError(f"Unknown importance_sampling_level {level!r}: choose one of {', '.join(LEVELS)}.")
    if (level == "none") != (mode == "none"):
        raise ValueError(
            f"importance_sampling_level={level!r} does not go with clip_mode={mode!r}: without importance sampling "
            "the weight is 1 and nothing can be clipped. Remove clip_mode, or change the level."
        )
    if config.scale_rewards not in ("none", "group", "batch"):
        raise ValueError(f"Unknown scale_rewards {config.scale_rewards!r}: choose 'none', 'group' or 'batch'.")
    if config.loss_type not in (*ANCHORED_LOSS_TYPES, *OTHER_LOSS_TYPES):
        raise ValueError(f"Unknown loss_type {config.loss_type!r}: choose one of {', '.join(ANCHORED_LOSS_TYPES)}.")
    if config.is_anchored and config.loss_type in OTHER_LOSS_TYPES:
        raise ValueError(
            f"loss_type={config.loss_type!r} defines its own importance weight, so it does not go with "
            f"importance_sampling_level={level!r} and clip_mode={mode!r}: choose a loss_type of "
            f"{', '.join(ANCHORED_LOSS_TYPES)}, or importance_sampling_level='token' with clip_mode='two_sided'."
        )
    if config.loss_type == "dr_grpo" and config.max_completion_length is None:
        raise ValueError(
            "loss_type='dr_grpo' divides by the constant T = max_completion_length, which is None: set "
            "max_completion_length, or choose another loss_type."
        )
    if config.length_scaled_cap and level != "trajectory":
        raise ValueError(
            f"length_scaled_cap={config.length_scaled_cap} bounds a trajectory ratio and means nothing at "
            f"importance_sampling_level={level!r}: remove it, or set importance_sampling_level='trajectory'."
        )


def check_bounds(config: "TICGRPOConfig"):
    """The bounds of the weight."""
    if config.epsilon_high is not None and not (0 < config.epsilon_high < math.inf):
        raise ValueError(f"epsilon_high={config.epsilon_high} must be a positive number, such as 0.28.")
    if config.epsilon is not None and not (0 < config.epsilon <= 1):
        raise ValueError(f"epsilon={config.epsilon} must lie in (0, 1], such as 0.2: the weight is bounded below by 0.")
    if config.length_scaled_cap is not None and not (0 <= config.length_scaled_cap < math.inf):
        raise ValueError(f"length_scaled_cap={config.length_scaled_cap} must be a positive number, such as 0.01.")
    if config.delta is not None and not config.delta > 1 + (config.epsilon_high or 0):
        raise ValueError(
            f"delta={config.delta} must be greater than 1 + epsilon_high = {1 + (config.epsilon_high or 0)}: it is the "
            "looser upper bound for negative advantages. Raise delta, or remove it."
        )


def check_guards(config: "TICGRPOConfig"):
    """The limits that act while a run goes on."""
    if config.max_non_finite_steps < 1:
        raise ValueError(f"max_non_finite_steps={config.max_non_finite_steps} must be at least 1, such as 3.")
    if config.min_ess is not None and not 0 <= config.min_ess <= 1:
        raise ValueError(
            f"min_ess={config.min_ess} is a share of the mini-batch's responses: choose a number between 0 and 1, such "
            "as 0.1, or remove it."
        )
    if config.completions_total_limit is not None and config.completions_total_limit < 1:
        raise ValueError(
            f"completions_total_limit={config.completions_total_limit} must be at least 1, or None to keep all "
            "tables; log_completions=False writes none."
        )
    if config.reward_timeout is not None and not (0 < config.reward_timeout < math.inf):
        raise ValueError(f"reward_timeout={config.reward_timeout} must be a positive number of seconds, or None.")

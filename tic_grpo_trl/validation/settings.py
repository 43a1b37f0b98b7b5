"""Check a configuration's values before anything is loaded. Every error names the option and the fix."""

import math
import numbers
import os
import types
import typing
from argparse import ArgumentTypeError
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers.hf_argparser import string_to_bool

from ..algorithms import ANCHORED_LOSS_TYPES, OTHER_LOSS_TYPES
from ..objective import CORRECTION_MODES, PRODUCT_LEVELS
from .algorithm import LENGTH_SCALED
from .suggestions import did_you_mean


@dataclass(frozen=True)
class Range:
    """Limit a number to an interval."""

    interval: str  # such as "(0, 1]": a round bracket excludes its end, a square one includes it
    example: float  # to suggest

    def __contains__(self, value: float) -> bool:
        low, high = map(float, self.interval[1:-1].split(","))
        above = low < value or (self.interval[0] == "[" and value == low)
        return above and (value < high or (self.interval[-1] == "]" and value == high))


# Fields of TRL and transformers whose bad values would go unnoticed, fail late or fail without their name
_RANGES = {
    Range("[1, inf)", 1): "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "steps_per_generation generation_batch_size num_generations_eval num_iterations vllm_tensor_parallel_size "
    "ref_model_sync_steps save_total_limit pad_to_multiple_of",
    Range("[2, inf)", 8): "num_generations",
    Range("(0, inf)", 1): "logging_steps save_steps eval_steps sapo_temperature_neg sapo_temperature_pos "
    "vllm_importance_sampling_clip_max",
    Range("(0, inf)", 1e-8): "adam_epsilon",
    Range("[0, inf)", 0.0): "beta weight_decay vllm_importance_sampling_clip_min",
    Range("[0, inf)", 1e-6): "learning_rate",
    Range("[0, inf]", 1.0): "max_grad_norm",
    Range("[0, 1]", 1.0): "top_entropy_quantile ref_model_mixup_alpha",
    Range("(0, 1]", 1.0): "top_p",
}
_INHERITED: dict[str, Any] = {name: limits for limits, names in _RANGES.items() for name in names.split()}
_INHERITED["vllm_importance_sampling_mode"] = CORRECTION_MODES
_MAY_BE_NONE = ("top_k", "max_grad_norm")  # None turns them off
_MAY_BE_INFINITE = ("delta", "max_grad_norm")


def convert_types(config: Any):
    """Convert numbers and booleans that are given as strings. YAML, for example, reads `1e-6` as a string."""
    for name, hint in typing.get_type_hints(type(config)).items():
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = set(typing.get_args(hint)) if is_union else {hint}
        value = getattr(config, name, None)
        if value is None:
            if kinds <= {int, float} and name not in _MAY_BE_NONE:
                raise ValueError(f"{name}=None must be a number. Remove {name} to use its default.")
        elif kinds <= {bool, int, float, str, types.NoneType}:
            setattr(config, name, _converted(name, kinds, value))
        elif value is False and any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds):
            setattr(config, name, "no")  # YAML reads a plain no, as in eval_strategy: no, as False


def _converted(name: str, kinds: set[type], value: Any) -> Any:
    if str in kinds:
        if isinstance(value, str | os.PathLike | Enum) or kinds - {str, types.NoneType}:
            return value
        raise TypeError(f"{name}={value!r} must be a string.")
    if bool in kinds:
        try:
            return string_to_bool(str(value))
        except ArgumentTypeError:
            raise TypeError(f"{name}={value!r} must be a boolean, true or false.") from None
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise TypeError(f"{name}={value!r} must be a number.")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{name}={value!r} must be a number.") from None
    if float in kinds:
        return value if int in kinds and type(value) is int else number
    if not number.is_integer():
        raise ValueError(f"{name}={value!r} must be an integer.")
    return value if type(value) is int else int(number)


def _constraints(config: Any) -> dict[str, Any]:
    """Return the `Range` or the tuple of choices of each field that has one."""
    hints = typing.get_type_hints(type(config), include_extras=True).items()
    declared = {name: hint.__metadata__[0] for name, hint in hints if typing.get_origin(hint) is typing.Annotated}
    return declared | _INHERITED


def check_choices(config: Any):
    """Refuse strings that are not among a field's choices."""
    for name, choices in _constraints(config).items():
        value = getattr(config, name)
        if isinstance(choices, tuple) and value is not None and value not in choices:
            hint = did_you_mean(str(value), choices)
            raise ValueError(f"Unknown {name} {value!r}.{hint} Choose one of {', '.join(choices)}.")


def check_ranges(config: Any):
    """Refuse numbers out of range, and NaN or infinity where they make no sense."""
    for name, limits in _constraints(config).items():
        value = getattr(config, name, None)
        if isinstance(limits, Range) and isinstance(value, int | float) and value not in limits:
            raise ValueError(f"{name}={value} must be in {limits.interval}, for example {limits.example}.")
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value) and (value != value or name not in _MAY_BE_INFINITE):
            raise ValueError(f"{name}={value} must be a finite number.")
    if config.max_steps != -1 and config.max_steps < 1:
        raise ValueError(f"max_steps={config.max_steps} must be at least 1, or -1 to train for num_train_epochs.")
    if config.max_steps == -1 and config.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs={config.num_train_epochs} must be positive, or set max_steps.")
    if config.top_k == -1 and not config.use_vllm:
        raise ValueError("top_k=-1 means no limit to vLLM only: set top_k=0.")
    kwargs = config.generation_kwargs
    if not (kwargs is None or isinstance(kwargs, dict) or str(kwargs).startswith("{")):  # a flag gives JSON
        raise ValueError(f"generation_kwargs={kwargs!r} must be a dictionary.")
    multiple = config.pad_to_multiple_of
    if not (multiple is None or str(multiple).lower() in ("auto", "none", "null") or str(multiple).isdigit()):
        raise ValueError(f"pad_to_multiple_of={multiple!r} must be a whole number, 'auto' or None.")
    weights = config.reward_weights
    if isinstance(weights, list) and not all(isinstance(w, numbers.Real) and math.isfinite(w) for w in weights):
        raise ValueError(f"reward_weights={weights} must be a list of finite numbers, one per reward function.")


def check_combinations(config: Any):
    """Refuse settings of the algorithm that contradict each other."""
    level, mode = config.importance_sampling_level, config.clip_mode
    if (level == "none") != (mode == "none"):
        raise ValueError(
            f"importance_sampling_level={level!r} cannot be combined with clip_mode={mode!r}: without importance "
            "sampling every weight is 1, so there is nothing to clip. Remove clip_mode, or change the level."
        )
    if config.is_anchored and config.loss_type in OTHER_LOSS_TYPES:
        raise ValueError(
            f"loss_type={config.loss_type!r} defines its own importance weight, so it cannot be combined with "
            f"importance_sampling_level={level!r} and clip_mode={mode!r}: choose a loss_type of "
            f"{', '.join(ANCHORED_LOSS_TYPES)}, or importance_sampling_level='token' with clip_mode='two_sided'."
        )
    if config.loss_type == "dr_grpo" and config.max_completion_length is None:
        raise ValueError(
            "loss_type='dr_grpo' divides by the constant T = max_completion_length, which is None: set "
            "max_completion_length, or choose another loss_type."
        )
    for name in LENGTH_SCALED:
        if (sigma := getattr(config, name)) and level not in PRODUCT_LEVELS:
            raise ValueError(
                f"{name}={sigma} bounds a trajectory ratio, so it cannot be combined with importance_sampling_level="
                f"{level!r}: remove it, or set importance_sampling_level='trajectory' or 'prefix'."
            )
    upper = 1 + (config.epsilon_high or 0)
    if config.delta is not None and not config.delta > upper:
        raise ValueError(
            f"delta={config.delta} must be greater than 1 + epsilon_high = {upper}, because it is the looser upper "
            "bound for negative advantages: raise delta, or remove it."
        )
    if config.min_ess is not None and config.fp16:
        raise ValueError(
            f"min_ess={config.min_ess} skips updates, which the loss scaler of fp16=True doesn't allow: set "
            "fp16=False (and bf16=True), or remove min_ess."
        )
    corrects, correction = config.vllm_importance_sampling_correction, config.vllm_importance_sampling_mode
    if config.behaviour_policy == "sampler" and corrects:
        raise ValueError(
            "behaviour_policy='sampler' already divides by the sampler's probabilities, so "
            "vllm_importance_sampling_correction=True would correct twice: remove one of them."
        )
    if config.use_vllm and corrects and correction.startswith("token_") and level in PRODUCT_LEVELS:
        raise ValueError(
            f"vllm_importance_sampling_mode={correction!r} gives every token its own factor, which cannot be combined "
            "with a product of token ratios as the weight. Choose 'sequence_mask' or 'sequence_truncate', "
            "behaviour_policy='sampler', or importance_sampling_level='token'."
        )

"""Checks of a configuration that need nothing but its values; every error names the option and the fix."""

import math
from typing import TYPE_CHECKING

from .arms import ANCHORED_LOSS_TYPES, OTHER_LOSS_TYPES
from .objective import LEVELS


if TYPE_CHECKING:
    from .config import TICGRPOConfig


def check_axes(config: "TICGRPOConfig"):
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
    if config.loss_type not in ANCHORED_LOSS_TYPES + OTHER_LOSS_TYPES:
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
    if config.reward_timeout is not None and not (0 < config.reward_timeout < math.inf):
        raise ValueError(f"reward_timeout={config.reward_timeout} must be a positive number of seconds, or None.")

"""Refuse settings that the rules for whole mini-batches can't be computed with."""

from typing import Any

from ..objective import PRODUCT_LEVELS


def check_mini_batch(config: Any):
    """Refuse a configuration in which an update's mini-batch is not known before its first backward pass.

    Raises:
        ValueError: naming the option and the fix.
    """
    if not config.uses_mini_batch:
        return
    level, rule = config.importance_sampling_level, ""
    if config.clip_mode == "adaptive":
        rule = "clip_mode='adaptive'"
        if level not in PRODUCT_LEVELS:
            raise ValueError(
                f"{rule} caps a product of token ratios, so it cannot be combined with importance_sampling_level="
                f"{level!r}: set importance_sampling_level='trajectory' or 'prefix', or another clip_mode."
            )
    steps, window = config.steps_per_generation, config.gradient_accumulation_steps
    if steps % window:
        raise ValueError(
            f"{rule} needs updates of one rollout each, but steps_per_generation={steps} is not a multiple of "
            f"gradient_accumulation_steps={window}: set updates_per_rollout, or algorithm='tic_grpo_capped'."
        )

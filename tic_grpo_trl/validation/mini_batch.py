"""Refuse settings that the rules for whole mini-batches can't be computed with."""

from typing import Any

from ..objective import PRODUCT_LEVELS


BASELINE, FACTOR = "advantage_baseline='minimum_variance'", "scale_lr_by_ess=True"


def check_mini_batch(config: Any):
    """Refuse a configuration in which an update's mini-batch is not whole, or not known before its backward passes.

    Raises:
        ValueError: naming the option and the fix.
    """
    if config.clip_mode == "adaptive" and config.importance_sampling_level not in PRODUCT_LEVELS:
        raise ValueError(
            "clip_mode='adaptive' caps a product of token ratios, so it cannot be combined with "
            f"importance_sampling_level={config.importance_sampling_level!r}: set importance_sampling_level="
            "'trajectory' or 'prefix', or another clip_mode."
        )
    is_adaptive, has_baseline = config.clip_mode == "adaptive", config.advantage_baseline == "minimum_variance"
    if config.baseline_norms != "tokens" and not has_baseline:
        config.notes.append(
            f"baseline_norms={config.baseline_norms!r} has no effect with "
            f"advantage_baseline={config.advantage_baseline!r}."
        )
    rules = {
        "clip_mode='adaptive'": is_adaptive,
        BASELINE: has_baseline,
        FACTOR: bool(config.scale_lr_by_ess),
    }
    steps, window = config.steps_per_generation, config.gradient_accumulation_steps
    for rule in [rule for rule, holds in rules.items() if holds]:
        if steps % window:
            raise ValueError(
                f"{rule} needs updates of one rollout each, but steps_per_generation={steps} is not a multiple of "
                f"gradient_accumulation_steps={window}: set updates_per_rollout, or an algorithm without this rule."
            )
    if has_baseline and config.scale_rewards != "none":
        raise ValueError(
            f"{BASELINE} replaces the mean of a group's rewards, so it cannot be combined with "
            f"scale_rewards={config.scale_rewards!r}: set scale_rewards='none', or advantage_baseline='group_mean'."
        )
    if has_baseline and steps > window and not config.partition_by_prompt:
        raise ValueError(
            f"{BASELINE} needs mini-batches of complete groups, which partition_by_prompt=False splits: set "
            "partition_by_prompt=True, or advantage_baseline='group_mean'."
        )
    optim = str(getattr(config.optim, "value", config.optim))
    if config.scale_lr_by_ess and ("lomo" in optim or "layerwise" in optim):
        raise ValueError(
            f"{FACTOR} scales the learning rate of one optimizer, but optim={optim!r} updates weights without it, "
            "within the backward pass: choose another optim, or set scale_lr_by_ess=False."
        )

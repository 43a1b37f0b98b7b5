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
    for name, rule, is_read in (
        ("baseline_norms", "advantage_baseline", has_baseline),
        ("gradient_noise_scale", "clip_mode", is_adaptive),
    ):
        if not is_read and (value := getattr(config, name)) != getattr(type(config), name):
            config.notes.append(f"{name}={value!r} has no effect with {rule}={getattr(config, rule)!r}.")
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
        if config.max_carry_over and config.behaviour_policy == "trainer":
            raise ValueError(
                f"{rule} needs ratios to the policies that sampled the responses, but with max_carry_over="
                f"{config.max_carry_over} and behaviour_policy='trainer' they leave out what came before the rollout: "
                "set behaviour_policy='sampler'."
            )
    for name, unscaled in {"scale_rewards": "none", "multi_objective_aggregation": "sum_then_normalize"}.items():
        if has_baseline and (value := getattr(config, name)) != unscaled:
            raise ValueError(
                f"{BASELINE} replaces the mean of a group's rewards, so it cannot be combined with {name}={value!r}: "
                f"set {name}={unscaled!r}, or advantage_baseline='group_mean'."
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


def check_images(trainer: Any):
    """Refuse a model with images where responses are differentiated one by one."""
    args = trainer.args
    if args.advantage_baseline == "minimum_variance" and args.baseline_norms == "gradients" and trainer._is_vlm:
        raise ValueError(
            "baseline_norms='gradients' cannot be computed for a model with images: set baseline_norms='tokens'."
        )

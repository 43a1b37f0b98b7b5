"""Refuse settings that responses can't be carried over with, before anything is generated."""

import math
from typing import Any

from .sampling_options import check_sampling_options


def check_carry_over(args: Any):
    """Refuse a configuration whose `max_carry_over` contradicts its other settings."""
    if not args.max_carry_over:
        if args.oversampling != type(args).oversampling:
            args.notes.append(f"oversampling={args.oversampling} has no effect with max_carry_over=0.")
        return
    given = f"max_carry_over={args.max_carry_over}"
    off = "or max_carry_over=0"
    if args.max_completion_length is None:
        raise ValueError(
            f"{given} needs max_completion_length, which is None: set it to the most tokens of a response."
        )
    if args.use_transformers_continuous_batching:
        raise ValueError(
            f"{given} needs an engine that can be interrupted: set use_transformers_continuous_batching=False, {off}."
        )
    if args.behaviour_policy == "trainer" and not (args.use_vllm and args.vllm_importance_sampling_correction):
        raise ValueError(
            f"{given} trains on responses of earlier weights, which behaviour_policy='trainer' corrects for only with "
            "use_vllm=True and vllm_importance_sampling_correction=True: set behaviour_policy='sampler'."
        )
    check_sampling_options(args)
    if args.behaviour_policy == "trainer":
        args.notes.append(
            f"{given} with behaviour_policy='trainer' weights a response by two factors, P_θ/P_old and TRL's bounded "
            "correction P_old/P_behaviour. behaviour_policy='sampler' is one exact ratio."
        )


def check_trainer(trainer: Any, prompts: int):
    """Refuse inputs and batches of a trainer that carry-over can't handle; `prompts` are those of a pool's rollout."""
    args, schedule = trainer.args, trainer.schedule
    given = f"max_carry_over={args.max_carry_over}"
    environments = trainer.environment_factories is not None
    unsupported = {
        "tools, whose answers are tokens that no policy sampled": trainer.tools and not environments,
        "environment_factory, because an environment's state can't wait in a pool": environments,
        "rollout_func, which generates by itself": trainer.rollout_func is not None,
        "a model with images, because the pool holds token ids only": trainer._is_vlm,
    }
    for what, used in unsupported.items():
        if used:
            raise ValueError(f"{given} cannot be combined with {what}: set max_carry_over=0.")
    if not schedule.starts_on_policy:
        raise ValueError(
            f"{given} needs rollouts of whole updates, but steps_per_generation * num_iterations = "
            f"{schedule.rollout_steps} is not divisible by gradient_accumulation_steps = "
            f"{schedule.gradient_accumulation_steps}: set updates_per_rollout, or max_carry_over=0."
        )
    on_server = args.use_vllm and args.vllm_mode == "server"
    responses = schedule.per_device_train_batch_size * schedule.steps_per_generation
    if not on_server and responses % schedule.num_generations:
        raise ValueError(
            f"{given} needs whole groups on every process, but per_device_train_batch_size * steps_per_generation = "
            f"{responses} is not divisible by num_generations = {schedule.num_generations}: make it divisible, set "
            "vllm_mode='server', or max_carry_over=0."
        )
    if args.oversampling > 1 and int(args.oversampling * prompts) == prompts:
        least = math.ceil(100 * (prompts + 1) / prompts) / 100
        raise ValueError(
            f"oversampling={args.oversampling} begins no prompt ahead, because a rollout has {prompts} of them on each "
            f"engine: set it to {least:g} or more, or to 1 to wait for all."
        )

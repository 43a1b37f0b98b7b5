"""Reject batch sizes that don't divide evenly or don't fit, with the nearest valid values."""

import math
from typing import Any

from ..rollout.schedule import RolloutSchedule


def nearest_multiples(value: int, of: int) -> list[int]:
    """Return `value` if it is a multiple of `of`, otherwise the positive multiples just below and above."""
    below = value // of * of
    return [value] if below == value else [n for n in (below, below + of) if n]


def nearest_divisors(value: int, of: int, least: int = 2) -> list[int]:
    """Return the divisors of `of` just below and above `value`, from `least` on."""
    divisors = [n for n in range(least, of + 1) if of % n == 0]
    return [*[n for n in divisors if n < value][-1:], *[n for n in divisors if n > value][:1]]


def _least_factor(value: int, of: int) -> int:
    """Return the smallest n for which n x `value` is a multiple of `of`."""
    return of // math.gcd(of, value)


def _either(values: list[int]) -> str:
    return " or ".join(f"{value:,}" for value in values)


def check_batches(args: Any, processes: int) -> RolloutSchedule:
    """Check that the batch sizes of a `TICGRPOConfig`, or of its fields, divide evenly; return their schedule."""
    per_step, whole = args.per_device_train_batch_size * processes, args.generation_batch_size
    if args.steps_per_generation is None and whole is not None and whole % per_step:
        raise ValueError(
            f"generation_batch_size {whole} is not divisible by per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x {processes} processes = {per_step}. Nearest: "
            f"generation_batch_size {_either(nearest_multiples(whole, per_step))}."
        )
    batches = RolloutSchedule.of(args, processes)
    size, steps, group = batches.per_device_train_batch_size, batches.steps_per_generation, batches.num_generations
    if group < 2:
        raise ValueError(f"num_generations {group}: a group needs two responses or more. Nearest: num_generations 2.")
    if batches.responses % group:
        size_step = _least_factor(processes * steps, of=group)
        whole_updates = batches.gradient_accumulation_steps if float(batches.updates).is_integer() else 1
        steps_step = math.lcm(_least_factor(processes * size, of=group), whole_updates)
        raise ValueError(
            f"per_device_train_batch_size {size} x steps_per_generation {steps} x {processes} processes = "
            f"{batches.responses} responses per rollout, which is not divisible by num_generations {group}. Nearest: "
            f"per_device_train_batch_size {_either(nearest_multiples(size, size_step))}; or steps_per_generation "
            f"{_either(nearest_multiples(steps, steps_step))}; or num_generations "
            f"{_either(nearest_divisors(group, batches.responses))}."
        )
    eval_size, eval_group = args.per_device_eval_batch_size, args.num_generations_eval or group
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no" and eval_size * processes % eval_group:
        step = _least_factor(processes, of=eval_group)
        raise ValueError(
            f"per_device_eval_batch_size {eval_size} x {processes} processes = {eval_size * processes} responses, "
            f"which is not divisible by num_generations_eval {eval_group}. Nearest: per_device_eval_batch_size "
            f"{_either(nearest_multiples(eval_size, step))}; or num_generations_eval "
            f"{_either(nearest_divisors(eval_group, eval_size * processes, least=1))}."
        )
    shards = args.vllm_tensor_parallel_size
    if args.use_vllm and args.vllm_mode == "colocate" and processes % shards:
        raise ValueError(
            f"{processes} processes are not divisible by vllm_tensor_parallel_size {shards}. Nearest: "
            f"vllm_tensor_parallel_size {_either(nearest_divisors(shards, processes, least=1))}."
        )
    return batches


def check_length(args: Any, max_prompt_length: int | None):
    """Check that a prompt and a completion of full length fit into `vllm_max_model_length`."""
    if args.use_vllm and args.vllm_mode == "colocate" and args.vllm_max_model_length:
        longest = (max_prompt_length or 0) + args.max_completion_length
        if longest > args.vllm_max_model_length:
            raise ValueError(
                f"max_prompt_length {max_prompt_length or 0:,} + max_completion_length {args.max_completion_length:,} "
                f"= {longest:,} tokens, more than vllm_max_model_length {args.vllm_max_model_length:,}. Nearest: "
                f"vllm_max_model_length {longest:,}."
            )


def check_prompts(batches: RolloutSchedule, num_prompts: int):
    """Check that the data has enough prompts for one rollout."""
    if num_prompts >= batches.prompts:
        return
    window = batches.gradient_accumulation_steps if batches.steps_per_generation > 1 else 1
    size = batches.processes * batches.per_device_train_batch_size
    step = math.lcm(window, _least_factor(size, of=batches.num_generations))
    fits = num_prompts * batches.num_generations // size // step * step
    nearest = f"steps_per_generation {fits}" if fits else "a smaller per_device_train_batch_size"
    raise ValueError(
        f"A rollout takes {batches.prompts:,} prompts, but the data has only {num_prompts:,}, so no update would be "
        f"made. Nearest: {nearest}."
    )

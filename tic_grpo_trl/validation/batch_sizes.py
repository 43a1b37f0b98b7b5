"""Derive batch sizes from one another, and reject those that don't divide or fit, with the nearest valid values."""

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


def _nearest(fixes: dict[str, list[int]]) -> str:
    return "Nearest: " + "; or ".join(f"{name} {_either(values)}" for name, values in fixes.items() if values) + "."


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


def derive_batches(args: Any):
    """Set the batch sizes that follow from those of an update, a rollout and an evaluation.

    `responses_per_update` sets `gradient_accumulation_steps`, `updates_per_rollout` sets `steps_per_generation`, and
    `responses_per_eval_batch` sets `per_device_eval_batch_size`, each for the number of processes.

    Raises:
        ValueError: if the processes cannot share the responses equally, or an explicit value contradicts.
    """
    size, responses, updates = args.per_device_train_batch_size, args.responses_per_update, args.updates_per_rollout
    if responses is not None:
        processes = args.world_size
        factors = f"per_device_train_batch_size {size} x {_processes(processes)}"
        has_own_rollout = args.steps_per_generation is not None or args.generation_batch_size is not None
        of_groups = 1 if has_own_rollout else _least_factor(updates or 1, of=args.num_generations)
        sizes = []
        if responses % math.lcm(processes, of_groups) == 0:
            sizes = nearest_divisors(size, responses // processes, least=1)
        fixes = {
            "responses_per_update": nearest_multiples(responses, math.lcm(size * processes, of_groups)),
            "per_device_train_batch_size": sizes,
        }
        window = _share("responses_per_update", responses, size * processes, f"{factors} = {size * processes}", fixes)
        _set(args, "gradient_accumulation_steps", window, "responses_per_update", size * processes, factors)
    args.gradient_accumulation_steps = args.gradient_accumulation_steps or 1
    if updates is not None:
        window = args.gradient_accumulation_steps
        factors = f"gradient_accumulation_steps {window}"
        _set(args, "steps_per_generation", updates * window, "updates_per_rollout", 1 / window, factors)
    if (batch := args.responses_per_eval_batch) is not None:
        processes = args.world_size
        whole = math.lcm(processes, args.num_generations_eval or args.num_generations)
        fixes = {"responses_per_eval_batch": nearest_multiples(batch, whole)}
        share = _share("responses_per_eval_batch", batch, processes, _processes(processes), fixes)
        _set(args, "per_device_eval_batch_size", share, "responses_per_eval_batch", processes, _processes(processes))
    args.per_device_eval_batch_size = args.per_device_eval_batch_size or 8


def _share(name: str, total: int, of: int, factors: str, fixes: dict[str, list[int]]) -> int:
    if total % of:
        raise ValueError(f"{name} {total:,} is not divisible by {factors}. {_nearest(fixes)}")
    return total // of


def _set(args: Any, name: str, value: int, source: str, factor: float, factors: str):
    """Set an option to the value that follows from the option `source`, unless it was given another one."""
    given = getattr(args, name)
    if given not in (None, value):
        fitting = round(float(given * factor), 6)
        raise ValueError(
            f"{name} {given:,} contradicts {source} {getattr(args, source):,}, which with {factors} makes it "
            f"{value:,}: remove one of them. "
            + _nearest({name: [value], source: [int(fitting)] if fitting.is_integer() and fitting else []})
        )
    setattr(args, name, value)


def check_batches(args: Any, processes: int) -> RolloutSchedule:
    """Check that the batch sizes of a `TICGRPOConfig`, or of its fields, divide evenly; return their schedule."""
    per_step, whole = args.per_device_train_batch_size * processes, args.generation_batch_size
    if args.steps_per_generation is None and whole is not None and whole % per_step:
        raise ValueError(
            f"generation_batch_size {whole} is not divisible by per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x {processes} processes = {per_step}. "
            + _nearest({"generation_batch_size": nearest_multiples(whole, per_step)})
        )
    batches = RolloutSchedule.of(args, processes)
    size, steps, group = batches.per_device_train_batch_size, batches.steps_per_generation, batches.num_generations
    if group < 2:
        raise ValueError(f"num_generations {group}: a group needs two responses or more. Nearest: num_generations 2.")
    if batches.responses % group:
        raise ValueError(
            f"per_device_train_batch_size {size} x steps_per_generation {steps} x {processes} processes = "
            f"{batches.responses} responses per rollout, which is not divisible by num_generations {group}. "
            + _nearest(_fixes(args, batches) | {"num_generations": nearest_divisors(group, batches.responses)})
        )
    eval_size, eval_group = args.per_device_eval_batch_size, args.num_generations_eval or group
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no" and eval_size * processes % eval_group:
        fixes = {"per_device_eval_batch_size": nearest_multiples(eval_size, _least_factor(processes, of=eval_group))}
        if (batch := args.responses_per_eval_batch) is not None:
            fixes = {"responses_per_eval_batch": nearest_multiples(batch, math.lcm(processes, eval_group))}
        raise ValueError(
            f"per_device_eval_batch_size {eval_size} x {processes} processes = {eval_size * processes} responses, "
            f"which is not divisible by num_generations_eval {eval_group}. "
            + _nearest(fixes | {"num_generations_eval": nearest_divisors(eval_group, eval_size * processes, least=1)})
        )
    shards = args.vllm_tensor_parallel_size
    if args.use_vllm and args.vllm_mode == "colocate" and processes % shards:
        raise ValueError(
            f"{processes} processes are not divisible by vllm_tensor_parallel_size {shards}. "
            + _nearest({"vllm_tensor_parallel_size": nearest_divisors(shards, processes, least=1)})
        )
    return batches


def _fixes(args: Any, batches: RolloutSchedule) -> dict[str, list[int]]:
    """Return the nearest values of the options that the user set with which a rollout consists of complete groups."""
    processes, size, group = batches.processes, batches.per_device_train_batch_size, batches.num_generations
    window, steps = batches.gradient_accumulation_steps, batches.steps_per_generation
    if args.updates_per_rollout is None:
        whole_updates = window if float(batches.updates).is_integer() else 1
        step = math.lcm(_least_factor(processes * size, of=group), whole_updates)
        fixes = {"steps_per_generation": nearest_multiples(steps, step)}
    else:
        step = _least_factor(batches.update_responses, of=group)
        fixes = {"updates_per_rollout": nearest_multiples(args.updates_per_rollout, step)}
    if args.responses_per_update is None:
        sizes = nearest_multiples(size, _least_factor(processes * steps, of=group))
        return {"per_device_train_batch_size": sizes} | fixes
    if args.updates_per_rollout is not None or steps == window:
        step = math.lcm(processes * size, _least_factor(args.updates_per_rollout or 1, of=group))
        fixes = {"responses_per_update": nearest_multiples(args.responses_per_update, step)} | fixes
    return fixes


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


def check_prompts(args: Any, batches: RolloutSchedule, num_prompts: int):
    """Check that the data has enough prompts for one rollout."""
    if num_prompts >= batches.prompts:
        return
    whole_updates = batches.steps_per_generation > 1 or args.updates_per_rollout is not None
    window = batches.gradient_accumulation_steps if whole_updates else 1
    size = batches.processes * batches.per_device_train_batch_size
    step = math.lcm(window, _least_factor(size, of=batches.num_generations))
    fits = num_prompts * batches.num_generations // size // step * step
    if not fits:
        update = "responses_per_update" if args.responses_per_update is not None else "per_device_train_batch_size"
        nearest = f"a smaller {update}"
    elif args.updates_per_rollout is not None:
        nearest = f"updates_per_rollout {fits // window}"
    else:
        nearest = f"steps_per_generation {fits}"
    raise ValueError(
        f"A rollout takes {batches.prompts:,} prompts, but the data has only {num_prompts:,}, so no update would be "
        f"made. Nearest: {nearest}."
    )

"""Derive batch sizes from one another, and reject those that don't divide or fit, with the nearest valid values."""

import math
from typing import Any

from ..rollout.schedule import RolloutSchedule


OF_COPY = ("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")  # a new config lacks one


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


def counted(count: float, noun: str) -> str:
    """Return a number and its noun, such as "1 prompt" and "2 passes"."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{round(count, 2):,.10g} {noun if count == 1 else plural}"


def derive_batches(args: Any):
    """Set the batch sizes that follow from those of an update, a rollout and an evaluation.

    `responses_per_update` sets `gradient_accumulation_steps`, `updates_per_rollout` sets `steps_per_generation`, and
    `responses_per_eval_batch` sets `per_device_eval_batch_size`, each for the number of processes.

    Raises:
        ValueError: if the processes cannot share the responses equally, or an explicit value contradicts.
    """
    _forget_derived(args)
    if args.responses_per_update is not None:
        _derive_update(args, args.responses_per_update)
    args.gradient_accumulation_steps = args.gradient_accumulation_steps or 1
    if args.updates_per_rollout is not None:
        _derive_rollout(args, args.updates_per_rollout)
    if args.responses_per_eval_batch is not None:
        _derive_evaluation(args, args.responses_per_eval_batch)
    args.per_device_eval_batch_size = args.per_device_eval_batch_size or 8


def _forget_derived(args: Any):
    """Unset what a copied or saved config derived, perhaps for another batch size or number of processes.

    Such a config has both `steps_per_generation` and `generation_batch_size`, and their quotient is what a step then
    had on all processes. Values that don't agree with it were changed in the copy, and stay.
    """
    steps, rollout, window = args.steps_per_generation, args.generation_batch_size, args.gradient_accumulation_steps
    if not (steps and rollout):
        return
    updates, evaluated = args.updates_per_rollout, args.per_device_eval_batch_size
    if window and args.responses_per_update == window * rollout / steps and updates in (None, steps / window):
        args.gradient_accumulation_steps = args.steps_per_generation = None
        if updates is not None:
            args.generation_batch_size = None
    processes = rollout / steps / args.per_device_train_batch_size
    if evaluated and args.responses_per_eval_batch == evaluated * processes:
        args.per_device_eval_batch_size = None


def _derive_update(args: Any, responses: int):
    size, processes = args.per_device_train_batch_size, args.world_size
    per_step = size * processes
    product = f"per_device_train_batch_size {size} x {counted(processes, 'process')}"
    has_own_rollout = args.steps_per_generation is not None or args.generation_batch_size is not None
    of_groups = 1 if has_own_rollout else _least_factor(args.updates_per_rollout or 1, of=args.num_generations)
    sizes = []
    if responses % math.lcm(processes, of_groups) == 0:
        sizes = nearest_divisors(size, responses // processes, least=1)
    fixes = {
        "responses_per_update": nearest_multiples(responses, math.lcm(per_step, of_groups)),
        "per_device_train_batch_size": sizes,
    }
    window = _share("responses_per_update", responses, per_step, f"{product} = {per_step}", fixes)
    given = args.gradient_accumulation_steps
    _set(args, "gradient_accumulation_steps", window, "responses_per_update", given and given * per_step, product)


def _derive_rollout(args: Any, updates: int):
    window, given = args.gradient_accumulation_steps, args.steps_per_generation
    fitting = given // window if given and given % window == 0 else None
    because = f"gradient_accumulation_steps {window}"
    _set(args, "steps_per_generation", updates * window, "updates_per_rollout", fitting, because)


def _derive_evaluation(args: Any, responses: int):
    processes, given = args.world_size, args.per_device_eval_batch_size
    of_groups = math.lcm(processes, args.num_generations_eval or args.num_generations)
    fixes = {"responses_per_eval_batch": nearest_multiples(responses, of_groups)}
    because = counted(processes, "process")
    size = _share("responses_per_eval_batch", responses, processes, because, fixes)
    _set(args, "per_device_eval_batch_size", size, "responses_per_eval_batch", given and given * processes, because)


def _share(name: str, total: int, of: int, divisor: str, fixes: dict[str, list[int]]) -> int:
    if total % of:
        raise ValueError(f"{name} {total:,} is not divisible by {divisor}. {_nearest(fixes)}")
    return total // of


def _set(args: Any, name: str, value: int, source: str, fitting: int | None, because: str):
    """Set an option to the value that follows from the option `source`, unless it was given another one.

    `fitting` is the value of `source` that the given one implies, if there is one.
    """
    given = getattr(args, name)
    if given not in (None, value):
        remedy = "remove one of them"
        if name in OF_COPY and all(getattr(args, each) for each in OF_COPY):
            remedy += f", or set {' and '.join(OF_COPY)} to None if they come from a copied or saved config"
        raise ValueError(
            f"{name} {given:,} contradicts {source} {getattr(args, source):,}, which with {because} makes it "
            f"{value:,}: {remedy}. " + _nearest({name: [value], source: [fitting] if fitting else []})
        )
    setattr(args, name, value)


def check_batches(args: Any, processes: int) -> RolloutSchedule:
    """Check that the batch sizes of a `TICGRPOConfig`, or of its fields, divide evenly; return their schedule."""
    per_step, whole = args.per_device_train_batch_size * processes, args.generation_batch_size
    if args.steps_per_generation is None and whole is not None and whole % per_step:
        raise ValueError(
            f"generation_batch_size {whole} is not divisible by per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x {counted(processes, 'process')} = {per_step}. "
            + _nearest({"generation_batch_size": nearest_multiples(whole, per_step)})
        )
    batches = RolloutSchedule.of(args, processes)
    size, steps, group = batches.per_device_train_batch_size, batches.steps_per_generation, batches.num_generations
    if group < 2:
        raise ValueError(f"num_generations {group}: a group needs two responses or more. Nearest: num_generations 2.")
    if batches.responses % group:
        raise ValueError(
            f"per_device_train_batch_size {size} x steps_per_generation {steps} x "
            f"{counted(processes, 'process')} = {batches.responses} responses per rollout, which is not divisible by "
            f"num_generations {group}. "
            + _nearest(_fixes(args, batches) | {"num_generations": nearest_divisors(group, batches.responses)})
        )
    eval_size, eval_group = args.per_device_eval_batch_size, args.num_generations_eval or group
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no" and eval_size * processes % eval_group:
        fixes = {"per_device_eval_batch_size": nearest_multiples(eval_size, _least_factor(processes, of=eval_group))}
        if (batch := args.responses_per_eval_batch) is not None:
            fixes = {"responses_per_eval_batch": nearest_multiples(batch, math.lcm(processes, eval_group))}
        raise ValueError(
            f"per_device_eval_batch_size {eval_size} x {counted(processes, 'process')} = {eval_size * processes} "
            f"responses, which is not divisible by num_generations_eval {eval_group}. "
            + _nearest(fixes | {"num_generations_eval": nearest_divisors(eval_group, eval_size * processes, least=1)})
        )
    shards = args.vllm_tensor_parallel_size
    if args.use_vllm and args.vllm_mode == "colocate" and processes % shards:
        raise ValueError(
            f"{counted(processes, 'process')} cannot be divided by vllm_tensor_parallel_size {shards}. "
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
        f"A rollout takes {counted(batches.prompts, 'prompt')}, but the data has only {num_prompts:,}, so no update "
        f"would be made. Nearest: {nearest}."
    )

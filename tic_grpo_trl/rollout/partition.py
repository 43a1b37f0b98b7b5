"""Puts responses in an order in which mini-batches consist of complete groups.

This is the uniform partition by prompt of v5 §2.2: no prompt is in two mini-batches, so that a mini-batch is
independent of the weights that the earlier ones led to (Lemma A.1). TRL shuffles responses, which splits groups.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from ..forward.responses import PADDED_SIDE, is_per_response, response_count, select_responses


def responses_to_prompts(prompts: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Return the indices of the responses, (P·G,), to prompts with the indices `prompts`, (P,)."""
    return (prompts.unsqueeze(1) * num_generations + torch.arange(num_generations, device=prompts.device)).flatten()


def responses_of_process(order: torch.Tensor, process_responses: int, process: int, processes: int) -> torch.Tensor:
    """Return the share of one process, (n / processes,), in an order of the responses of all processes, (n,).

    Each mini-batch takes `process_responses · processes` responses in this order, and a process takes a consecutive
    part of each.
    """
    return order.view(-1, processes, process_responses)[:, process].flatten()


def shuffle_prompts(rollout: dict[str, Any], num_generations: int) -> dict[str, Any]:
    """Put the prompts of a rollout in uniformly random order, each with its group, by torch's global generator.

    The responses to a prompt must follow one another.
    """
    order = responses_to_prompts(torch.randperm(response_count(rollout) // num_generations), num_generations)  # (n,)
    return {name: select_responses(value, order) for name, value in rollout.items()}


def value_kinds(rollout: dict[str, Any]) -> dict[str, str]:
    """Describe the type of every value of a rollout, in words that processes can compare.

    The description is empty where responses can't be moved to another process one by one.
    """
    size = response_count(rollout)

    def kind(name: str, value: Any) -> str:
        if not is_per_response(value):
            return str(getattr(value, "dtype", type(value).__name__))
        if len(value) != size:
            return ""
        if isinstance(value, torch.Tensor):
            known = value.dim() == 1 or (value.dim() == 2 and name in PADDED_SIDE)
            return f"{value.dtype} {value.dim()}" if known else ""
        return "" if any(isinstance(item, torch.Tensor) for item in value) else "list"

    return {name: kind(name, value) for name, value in rollout.items()}


def immovable_keys(kinds: list[dict[str, str]]) -> list[str]:
    """Return the keys whose responses have to stay on their process, from the [`value_kinds`] of every process."""
    names = set().union(*kinds)
    return sorted(name for name in names if len(of_all := {kind.get(name, "") for kind in kinds}) > 1 or "" in of_all)


def exchange_prompts(
    rollout: dict[str, Any], num_generations: int, process_responses: int, pad_token_id: int, accelerator: Accelerator
) -> dict[str, Any]:
    """Shuffle prompts over all processes, where only their mini-batches together consist of complete groups.

    Every process gathers one key after the other, keeps its share and drops the rest. Responses are padded to the
    longest prompt and completion of all processes; scalars must be equal on all of them.
    """
    prompts = torch.randperm(response_count(rollout) * accelerator.num_processes // num_generations)
    order = responses_to_prompts(broadcast(prompts.to(accelerator.device)), num_generations)  # the main process's
    own = responses_of_process(order, process_responses, accelerator.process_index, accelerator.num_processes)

    def exchange(name: str, value: Any) -> Any:
        if isinstance(value, list):
            value = gather_object(value)
        elif is_per_response(value):
            pad = pad_token_id if name.endswith("_ids") else 0
            left = PADDED_SIDE.get(name) == "left"
            value = accelerator.gather(accelerator.pad_across_processes(value, dim=1, pad_index=pad, pad_first=left))
        return select_responses(value, own)

    exchanged = {name: exchange(name, rollout[name]) for name in sorted(rollout)}  # in one order on every process
    return {name: exchanged[name] for name in rollout}

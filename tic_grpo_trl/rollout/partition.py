"""Mini-batches of complete groups: no prompt in two of them."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from ..forward.responses import PADDED_SIDE, is_per_response, response_count, select_responses


def responses_to_prompts(prompts: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Rows of whole groups.

    Args:
        prompts: indices of prompts, (P,).
        num_generations: responses per prompt, G, which follow one another.

    Returns:
        (P·G,) indices of rows, in the order of `prompts`.
    """
    return (prompts.unsqueeze(1) * num_generations + torch.arange(num_generations, device=prompts.device)).flatten()


def responses_of_process(order: torch.Tensor, update_rows: int, process: int, processes: int) -> torch.Tensor:
    """The share of one process in an order of the rows of all processes.

    Mini-batch k is made of the rows k·W … (k+1)·W of the order, W = `update_rows · processes`; process r takes the r-th
    `update_rows` rows of each.

    Args:
        order: indices of the rows of all processes, (n,), n a multiple of W.
        update_rows: rows that one process contributes to an optimizer step.
        process: its index.
        processes: their number.

    Returns:
        (n / processes,) indices of rows, mini-batch after mini-batch.
    """
    return order.view(-1, processes, update_rows)[:, process].flatten()


def shuffle_prompts(rollout: dict[str, Any], num_generations: int) -> dict[str, Any]:
    """Put the prompts of a rollout in uniformly random order, each with its whole group of responses.

    Cut into consecutive mini-batches of whole groups, this is the uniform partition by prompt of v5 §2.2: no prompt is
    in two mini-batches, so that a mini-batch is independent of the weights that the earlier ones led to (Lemma A.1).
    Shuffling responses, as TRL does, splits the groups.

    Args:
        rollout: tensors and lists of n rows in which the responses to a prompt follow one another, scalar tensors and
            `None`; n is a multiple of `num_generations`.
        num_generations: responses per prompt, G.

    Returns:
        The same keys with rows reordered in unison, by torch's global generator.
    """
    order = responses_to_prompts(torch.randperm(response_count(rollout) // num_generations), num_generations)  # (n,)
    return {name: select_responses(value, order) for name, value in rollout.items()}


def value_kinds(rollout: dict[str, Any]) -> dict[str, str]:
    """What stands under every key of a rollout, in words that processes can compare.

    Args:
        rollout: as in [`shuffle_prompts`].

    Returns:
        Type and number of axes by key; the empty string where rows cannot be moved to another process one by one.
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
    """Keys whose rows have to stay with their process.

    Args:
        kinds: output of [`value_kinds`] on every process.

    Returns:
        Names, sorted: those that cannot be moved row by row, and those that the processes do not have in common.
    """
    names = set().union(*kinds)
    return sorted(name for name in names if len(of_all := {kind.get(name, "") for kind in kinds}) > 1 or "" in of_all)


def exchange_prompts(
    rollout: dict[str, Any], num_generations: int, update_rows: int, pad_token_id: int, accelerator: Accelerator
) -> dict[str, Any]:
    """[`shuffle_prompts`] over the processes, where only all of them together hold the whole groups of a mini-batch.

    Every process gathers one key after the other, keeps its share and drops the rest. Rows are padded to the longest
    prompt and completion of all processes.

    Args:
        rollout: of this process, without [`immovable_keys`]; over the processes in their order, the responses to a
            prompt follow one another (which TRL's advantages rely on, too).
        num_generations: responses per prompt, G.
        update_rows: rows that one process contributes to an optimizer step; a multiple of G over all processes.
        pad_token_id: what pads token ids; everything else is padded with 0.
        accelerator: for the communication.

    Returns:
        The same keys with as many rows: the process's share of every mini-batch, one after the other. Scalars are kept,
        they have to be equal on all processes.
    """
    prompts = torch.randperm(response_count(rollout) * accelerator.num_processes // num_generations)
    order = responses_to_prompts(broadcast(prompts.to(accelerator.device)), num_generations)  # the main process's
    rows = responses_of_process(order, update_rows, accelerator.process_index, accelerator.num_processes)

    def exchange(name: str, value: Any) -> Any:
        if isinstance(value, list):
            value = gather_object(value)
        elif is_per_response(value):
            pad = pad_token_id if name.endswith("_ids") else 0
            left = PADDED_SIDE.get(name) == "left"
            value = accelerator.gather(accelerator.pad_across_processes(value, dim=1, pad_index=pad, pad_first=left))
        return select_responses(value, rows)

    exchanged = {name: exchange(name, rollout[name]) for name in sorted(rollout)}  # in one order on every process
    return {name: exchanged[name] for name in rollout}

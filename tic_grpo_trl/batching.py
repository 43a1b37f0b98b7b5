"""How a rollout is cut into mini-batches of prompts, and these into forward passes."""

from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from .packing import first_fit, longest_first, used_columns


# The tensors of TRL's rollout that have a token axis, and the side on which it pads them. Other tensors with more than
# one axis (pixels, token types over prompt and completion) do not hold one row per response that can be padded alone.
PADDED_SIDE = {
    "prompt_ids": "left",
    "prompt_mask": "left",
    "completion_ids": "right",
    "completion_mask": "right",
    "tool_mask": "right",
    "advantages": "right",
    "old_per_token_logps": "right",
    "ref_per_token_logps": "right",
    "sampling_per_token_logps": "right",
    "importance_sampling_ratio": "right",
}


def has_rows(value: Any) -> bool:
    """Whether a value of a rollout holds one item per response (a list, or a tensor that is not a scalar)."""
    return isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def row_count(rollout: dict[str, Any]) -> int:
    """Number of responses of a rollout."""
    return next(len(value) for value in rollout.values() if has_rows(value))


def loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """(n, T) 1 on the tokens that the policy chose: `completion_mask` without what tools wrote."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def lacks_sampler_logps(inputs: dict[str, Any]) -> torch.Tensor:
    """(n,) bool: the responses of which the sampler left a token's log-probability out."""
    return (inputs["sampling_per_token_logps"].isnan() & loss_mask(inputs).bool()).any(dim=1)


def rows_of_prompts(prompts: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Rows of whole groups.

    Args:
        prompts: indices of prompts, (P,).
        num_generations: responses per prompt, G, which follow one another.

    Returns:
        (P·G,) indices of rows, in the order of `prompts`.
    """
    return (prompts.unsqueeze(1) * num_generations + torch.arange(num_generations, device=prompts.device)).flatten()


def rows_of_process(order: torch.Tensor, update_rows: int, process: int, processes: int) -> torch.Tensor:
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


def select_rows(value: Any, rows: torch.Tensor) -> Any:
    """The given rows of a value of a rollout; what has no rows (scalar tensors, `None`) is returned as it is."""
    if not has_rows(value):
        return value
    return value[rows.to(value.device)] if isinstance(value, torch.Tensor) else [value[i] for i in rows.tolist()]


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
    order = rows_of_prompts(torch.randperm(row_count(rollout) // num_generations), num_generations)  # (n,)
    return {name: select_rows(value, order) for name, value in rollout.items()}


def row_kinds(rollout: dict[str, Any]) -> dict[str, str]:
    """What stands under every key of a rollout, in words that processes can compare.

    Args:
        rollout: as in [`shuffle_prompts`].

    Returns:
        Type and number of axes by key; the empty string where rows cannot be moved to another process one by one.
    """
    size = row_count(rollout)

    def kind(name: str, value: Any) -> str:
        if not has_rows(value):
            return str(getattr(value, "dtype", type(value).__name__))
        if len(value) != size:
            return ""
        if isinstance(value, torch.Tensor):
            known = value.dim() == 1 or (value.dim() == 2 and name in PADDED_SIDE)
            return f"{value.dtype} {value.dim()}" if known else ""
        return "" if any(isinstance(item, torch.Tensor) for item in value) else "list"

    return {name: kind(name, value) for name, value in rollout.items()}


def fixed_keys(kinds: list[dict[str, str]]) -> list[str]:
    """Keys whose rows have to stay with their process.

    Args:
        kinds: output of [`row_kinds`] on every process.

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
        rollout: of this process, without [`fixed_keys`]; over the processes in their order, the responses to a prompt
            follow one another (which TRL's advantages rely on, too).
        num_generations: responses per prompt, G.
        update_rows: rows that one process contributes to an optimizer step; a multiple of G over all processes.
        pad_token_id: what pads token ids; everything else is padded with 0.
        accelerator: for the communication.

    Returns:
        The same keys with as many rows: the process's share of every mini-batch, one after the other. Scalars are kept,
        they have to be equal on all processes.
    """
    prompts = torch.randperm(row_count(rollout) * accelerator.num_processes // num_generations)
    order = rows_of_prompts(broadcast(prompts.to(accelerator.device)), num_generations)  # the main process's
    rows = rows_of_process(order, update_rows, accelerator.process_index, accelerator.num_processes)

    def exchange(name: str, value: Any) -> Any:
        if isinstance(value, list):
            value = gather_object(value)
        elif has_rows(value):
            pad = pad_token_id if name.endswith("_ids") else 0
            left = PADDED_SIDE.get(name) == "left"
            value = accelerator.gather(accelerator.pad_across_processes(value, dim=1, pad_index=pad, pad_first=left))
        return select_rows(value, rows)

    exchanged = {name: exchange(name, rollout[name]) for name in sorted(rollout)}  # in one order on every process
    return {name: exchanged[name] for name in rollout}


def moving_rows(rollout: dict[str, Any], only_advantages: bool) -> torch.Tensor:
    """Rows of a rollout that can move the weights.

    Args:
        rollout: with `completion_mask` (n, T), maybe `tool_mask`, and `advantages`, (n,) or (n, T).
        only_advantages: whether every term of the loss is multiplied by the advantage, so that a row whose advantage is
            exactly 0 contributes exactly nothing (no KL, entropy or router term).

    Returns:
        (n,) bool: False for rows without any token that counts and, with `only_advantages`, without any advantage.
    """
    mask = loss_mask(rollout).bool()
    if only_advantages:
        advantages = rollout["advantages"]
        mask = mask & (advantages if advantages.dim() == 2 else advantages.unsqueeze(1)).ne(0)
    return mask.any(dim=1)


def plan_forwards(lengths: list[int], rows_per_forward: int, packs: bool) -> list[list[int]]:
    """Share sequences out over the fewest forward passes that are no larger than TRL's.

    A forward pass takes `rows_per_forward` rows of the longest sequence's length. With `packs` several sequences share
    a row; without, sequences of like length come together. Rows are spread evenly over the passes.

    Args:
        lengths: of the sequences (prompt and completion), in tokens.
        rows_per_forward: TRL's micro-batch, `per_device_train_batch_size`.
        packs: whether the model keeps sequences of one row apart.

    Returns:
        Indices of the sequences by pass, at most ⌈n / rows_per_forward⌉ passes.
    """
    if not lengths:
        return []
    rows = first_fit(lengths, max(lengths)) if packs else [[i] for i in longest_first(lengths)]
    passes = -(-len(rows) // rows_per_forward)
    cuts = [len(rows) * i // passes for i in range(passes + 1)]
    return [[i for row in rows[start:end] for i in row] for start, end in pairwise(cuts)]


def take_rows(rollout: dict[str, Any], rows: list[int], blanks: int, trim: bool) -> dict[str, Any]:
    """A micro-batch of the given rows of a rollout.

    Args:
        rollout: tensors and lists of n rows, scalar tensors and `None`.
        rows: indices of its rows.
        blanks: number of blank rows that follow: the last token of a prompt and nothing that counts. They make
            micro-batches of all processes equally high, which TRL's metrics rely on.
        trim: drop the columns that none of the rows uses, on both sides.

    Returns:
        The same keys with `len(rows) + blanks` rows.
    """
    index = torch.tensor(rows + [0] * blanks)
    taken = {name: select_rows(value, index) for name, value in rollout.items()}
    if blanks:
        taken["prompt_mask"][len(rows) :, :-1] = 0
        for name, value in taken.items():
            if name in ("completion_mask", "tool_mask") or (torch.is_tensor(value) and value.is_floating_point()):
                value[len(rows) :] = 0
    if not trim:
        return taken
    widths = [taken[name].size(1) for name in ("prompt_mask", "completion_mask")]
    prompt, completion = used_columns(taken["prompt_mask"], taken["completion_mask"])
    for name, side in PADDED_SIDE.items():
        value = taken.get(name)
        # one value per response, such as a sequence-level ratio, has no columns to drop
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.size(1) == widths[side == "right"]:
            taken[name] = value[:, -prompt:] if side == "left" else value[:, :completion]
    return taken

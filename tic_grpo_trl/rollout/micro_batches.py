"""How a rollout is cut into mini-batches of prompts, and these into forward passes."""

from itertools import pairwise
from typing import Any

import torch

from ..forward.packing import first_fit, longest_first, used_columns
from .responses import PADDED_SIDE, loss_mask, select_responses


def active_responses(rollout: dict[str, Any], only_advantages: bool) -> torch.Tensor:
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


def plan_passes(lengths: list[int], rows_per_forward: int, packs: bool) -> list[list[int]]:
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


def take_responses(rollout: dict[str, Any], rows: list[int], blanks: int, trim: bool) -> dict[str, Any]:
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
    taken = {name: select_responses(value, index) for name, value in rollout.items()}
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

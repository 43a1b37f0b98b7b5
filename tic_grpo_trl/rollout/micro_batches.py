"""Which responses each forward pass of an update holds."""

from typing import Any

import torch
from accelerate import Accelerator

from ..forward.packing import used_columns
from ..forward.responses import PADDED_SIDE, loss_mask, select_responses


# Losses that are a mean over the responses of a micro-batch, so that its size has to be corrected
MEAN_OVER_RESPONSES = ("grpo", "dr_grpo", "sapo", "luspo")


def active_responses(rollout: dict[str, Any], only_advantages: bool) -> torch.Tensor:
    """Find the responses that can move the weights; (n,) bool.

    They have a token that counts and, with `only_advantages`, a non-zero advantage there. `only_advantages` says that
    every term of the loss is multiplied by the advantage (no KL, entropy or router term), so that a response with
    advantage 0 contributes exactly nothing. Where groups are marked, all responses that have a group are active.
    """
    mask = loss_mask(rollout).bool()
    if only_advantages and "group" in rollout:
        mask = mask & rollout["group"].ge(0).unsqueeze(1)
    elif only_advantages:
        advantages = rollout["advantages"]
        mask = mask & (advantages if advantages.dim() == 2 else advantages.unsqueeze(1)).ne(0)
    return mask.any(dim=1)


def mark_groups(
    rollout: dict[str, Any], num_generations: int, accelerator: Accelerator, has_reward: torch.Tensor | None
):
    """Add `group`, (n,), to a rollout that TRL has just made: the number of each response's group over all processes.

    It is -1 for responses that must not move the weights: those of groups in which every advantage is 0, and those
    without a reward. `has_reward` is (n,) bool; with `None`, all have one.
    """
    active = accelerator.gather(rollout["advantages"]).view(-1, num_generations).ne(0).any(dim=1)  # (groups,)
    numbers = torch.arange(len(active), device=active.device).where(active, -1).repeat_interleave(num_generations)
    own = numbers.view(accelerator.num_processes, -1)[accelerator.process_index].clone()
    rollout["group"] = own if has_reward is None else own.where(has_reward, -1)


def take_responses(rollout: dict[str, Any], indices: list[int], blanks: int, trim: bool) -> dict[str, Any]:
    """Build a micro-batch from some of a rollout's responses.

    Args:
        blanks: number of blank responses to append: the last token of a prompt and nothing that counts. They give the
            micro-batches of all processes the same number of responses, on which TRL's metrics rely.
        trim: drop the columns that none of the responses uses, on both sides.
    """
    size = len(indices)
    index = torch.tensor(indices + [0] * blanks)
    taken = {name: select_responses(value, index) for name, value in rollout.items()}
    if blanks:
        taken["prompt_mask"][size:, :-1] = 0
        for name, value in taken.items():
            if name in ("completion_mask", "tool_mask", "token_age") or (
                torch.is_tensor(value) and value.is_floating_point()
            ):
                value[size:] = 0
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


def size_correction(micro_batch: dict[str, Any], loss_type: str | None, trl_size: int) -> float:
    """Return the factor that makes the loss of a regrouped micro-batch add up to the mini-batch's.

    TRL takes the mean over the responses of each micro-batch, which assumes that all have `trl_size` of them.
    """
    regrouped = "left_out" in micro_batch and loss_type in MEAN_OVER_RESPONSES
    return micro_batch["completion_ids"].size(0) / trl_size if regrouped else 1.0

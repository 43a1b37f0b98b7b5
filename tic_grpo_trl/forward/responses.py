"""The tensors of responses, as TRL's rollouts hold them."""

from typing import Any

import torch


# The tensors of TRL's rollouts that have a token axis, and the side on which TRL pads them. Other tensors of several
# axes (pixels, token types) can't be padded response by response.
PADDED_SIDE = {
    "prompt_ids": "left",
    "prompt_mask": "left",
    "completion_ids": "right",
    "completion_mask": "right",
    "tool_mask": "right",
    "token_age": "right",
    "advantages": "right",
    "old_per_token_logps": "right",
    "ref_per_token_logps": "right",
    "sampling_per_token_logps": "right",
    "importance_sampling_ratio": "right",
}


def is_per_response(value: Any) -> bool:
    """Check whether a value of a rollout has one item per response: a list, or a tensor that is not a scalar."""
    return isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def response_count(rollout: dict[str, Any]) -> int:
    """Return the number of responses of a rollout."""
    return next(len(value) for value in rollout.values() if is_per_response(value))


def loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """Return (n, T): 1 on the tokens that the policy chose, 0 on padding and on tokens that a tool wrote."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def sequences(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask of prompts and completions, (n, P + T) each."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    return ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)


def lacks_sampler_logps(inputs: dict[str, Any]) -> torch.Tensor:
    """Find the responses for which the sampler left out some token's log-probability; (n,) bool."""
    return (inputs["sampling_per_token_logps"].isnan() & loss_mask(inputs).bool()).any(dim=1)


def select_responses(value: Any, indices: torch.Tensor) -> Any:
    """Select responses from one value of a rollout; values without an item per response are returned as they are."""
    if not is_per_response(value):
        return value
    return value[indices.to(value.device)] if isinstance(value, torch.Tensor) else [value[i] for i in indices.tolist()]

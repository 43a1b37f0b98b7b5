"""What a rollout holds of each response."""

from typing import Any

import torch


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


def is_per_response(value: Any) -> bool:
    """Whether a value of a rollout holds one item per response (a list, or a tensor that is not a scalar)."""
    return isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def response_count(rollout: dict[str, Any]) -> int:
    """Number of responses of a rollout."""
    return next(len(value) for value in rollout.values() if is_per_response(value))


def loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """(n, T) 1 on the tokens that the policy chose: `completion_mask` without what tools wrote."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def lacks_sampler_logps(inputs: dict[str, Any]) -> torch.Tensor:
    """(n,) bool: the responses of which the sampler left a token's log-probability out."""
    return (inputs["sampling_per_token_logps"].isnan() & loss_mask(inputs).bool()).any(dim=1)


def select_responses(value: Any, rows: torch.Tensor) -> Any:
    """The given rows of a value of a rollout; what has no rows (scalar tensors, `None`) is returned as it is."""
    if not is_per_response(value):
        return value
    return value[rows.to(value.device)] if isinstance(value, torch.Tensor) else [value[i] for i in rows.tolist()]

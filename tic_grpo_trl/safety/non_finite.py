"""NaN and infinite numbers: find them, blank the responses that have them, and describe them.

Multiplying a bad number by 0 does not remove it: 0 · NaN is NaN, in the forward and in the backward pass. So a response
that has one is *blanked*: it becomes like the responses that fill up a micro-batch
([`~tic_grpo_trl.rollout.micro_batches.take_responses`]), one harmless token of which nothing counts. It then
contributes exactly zero, and no normaliser changes.
"""

import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version

from ..forward.responses import PADDED_SIDE, loss_mask, response_count
from ..rewards.failures import shorten


FIRST_DEEPSPEED = "0.19.8"  # that discards non-finite gradients of any precision
LOG_LARGEST = math.log(torch.finfo(torch.float32).max)  # exp of more is infinite in float32
MAX_DESCRIBED = 3  # responses in one report
ROLLOUT_NUMBERS = {
    "advantages": "advantage",
    "old_per_token_logps": "old log-probability",
    "ref_per_token_logps": "log-probability of the reference policy",
    "importance_sampling_ratio": "importance sampling ratio",
}


class NonFiniteError(RuntimeError):
    """Too many updates in a row had NaN or infinite numbers; the message says where. Raised on every process."""


@dataclass(frozen=True)
class CheckedNumbers:
    """Hold one kind of number of every response."""

    name: str  # in reports
    values: torch.Tensor  # (n, T) per token or (n, 1) per response
    bad: torch.Tensor  # bool, of the same shape: must not reach the weights


def _checked(name: str, values: torch.Tensor, bad: torch.Tensor | None = None) -> CheckedNumbers:
    values = values.detach()
    values = values.unsqueeze(1) if values.dim() == 1 else values
    return CheckedNumbers(name, values, ~values.isfinite() if bad is None else bad)


def numbers_of_rollout(inputs: dict[str, Any]) -> list[CheckedNumbers]:
    """Check the numbers of a rollout or micro-batch that are known before it is trained on.

    A sampler's log-probability may be NaN, which means that the sampler did not return it.
    """
    numbers = [_checked(name, inputs[key]) for key, name in ROLLOUT_NUMBERS.items() if inputs.get(key) is not None]
    if (logps := inputs.get("sampling_per_token_logps")) is not None:
        bad = logps.isinf() & loss_mask(inputs).bool()
        numbers.append(_checked("log-probability of the sampler", logps, bad))
    return numbers


def numbers_of_forward(
    per_token_logps: torch.Tensor,  # (B, T)
    inputs: dict[str, Any],
    level: str | None,  # at which the loss takes exp of an unbounded log-ratio: "token", "sequence" or none
    beta: float,  # coefficient of the KL term, which takes exp(ref − logp)
    entropies: torch.Tensor | None = None,  # (B, T), if the loss depends on them
) -> list[CheckedNumbers]:
    """Check the results of a training forward pass, also on masked positions, which TRL's loss multiplies by 0."""
    logps, old = per_token_logps.detach(), inputs.get("old_per_token_logps")
    numbers = [_checked("log-probability of the policy", logps)]
    if entropies is not None:
        numbers.append(_checked("entropy of the policy", entropies))
    if level is not None and old is not None:
        log_ratio = logps - old
        if level == "sequence":
            mask = loss_mask(inputs)
            log_ratio = (log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        numbers.append(_checked("log-ratio to the old policy", log_ratio, log_ratio > LOG_LARGEST))
    if beta != 0.0:
        log_ratio = inputs["ref_per_token_logps"] - logps
        numbers.append(_checked("log-ratio of the reference policy", log_ratio, log_ratio > LOG_LARGEST))
    return numbers


def bad_responses(numbers: list[CheckedNumbers]) -> torch.Tensor:
    """Find the responses that have any bad number; (n,) bool."""
    return torch.stack([kind.bad.any(dim=1) for kind in numbers]).any(dim=0)


def blank_responses(inputs: dict[str, Any], bad: torch.Tensor, pad_token_id: int) -> dict[str, Any]:
    """Blank the responses `bad`, (n,) bool, of a rollout or micro-batch without changing its shape.

    The prompt of a blanked response is one token, its masks and floats are 0. Its token ids are taken from a response
    that stays, so they are harmless, or are `pad_token_id` if none stays. Prompts with images keep their tokens, which
    tell the images of a batch apart.
    """
    has_images = "num_images" in inputs
    last = inputs["prompt_ids"][:, -1]
    good = (~bad).nonzero().flatten()
    token = last[good[0]] if len(good) else torch.full_like(last[0], pad_token_id)
    blanked = dict(inputs)
    for name in PADDED_SIDE:
        if inputs.get(name) is None or (has_images and name.startswith("prompt")):
            continue
        blanked[name] = inputs[name].clone()
        blanked[name][bad] = token if name.endswith("_ids") else 0
    if not has_images:
        blanked["prompt_mask"][bad, -1] = 1
    return blanked


def groups_without_rewards(
    rewards: torch.Tensor,  # (n, F) of all processes, group after group; NaN for a function's `None`
    weights: torch.Tensor,  # (F,)
    models: list[int],  # the columns of reward models, which have no `None`
    num_generations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the responses of groups with a bad reward, and those that have the bad reward themselves; (n,) bool each.

    A reward is bad if a reward model returned NaN or infinity, or if its square (weighted, or about the group's mean)
    overflows float32. It makes the mean of its group unknown, and with `scale_rewards="batch"` the deviation of all
    groups. An infinite reward of a function is not meant here: it ends the run.
    """
    total = (rewards * weights.to(rewards)).nansum(dim=1, keepdim=True)  # (n, 1)
    squares = torch.cat([rewards, total], dim=1).nan_to_num(nan=0.0).square()  # (n, F + 1)
    own = ~rewards[:, models].isfinite().all(dim=1) | squares.isinf().any(dim=1)
    sums = squares.view(-1, num_generations, squares.size(1)).sum(dim=1)  # (groups, F + 1)
    groups = own.view(-1, num_generations).any(dim=1) | sums.isinf().any(dim=1)
    return groups.repeat_interleave(num_generations), own


def describe_responses(inputs: dict[str, Any], numbers: list[CheckedNumbers], tokenizer: Any) -> list[str]:
    """Describe the first responses with bad numbers, each with its first number of every kind, and count the others."""
    bad = bad_responses(numbers).nonzero().flatten().tolist()
    texts = []
    for response in bad[:MAX_DESCRIBED]:
        found = []
        for kind in numbers:
            if kind.bad[response].any():
                column = int(kind.bad[response].nonzero()[0])
                found.append(f"{kind.name} {float(kind.values[response, column]):g}")
                if kind.bad.size(1) > 1:
                    token = tokenizer.decode(inputs["completion_ids"][response, column].view(1))
                    found[-1] += f" at token {column} ({token!r})"
        texts.append(f"{', '.join(found)}\n{response_text(inputs, response, tokenizer)}")
    if len(bad) > MAX_DESCRIBED:
        texts.append(f"and {len(bad) - MAX_DESCRIBED} more of {response_count(inputs)} responses")
    return texts


def response_text(inputs: dict[str, Any], response: int, tokenizer: Any) -> str:
    """Return the prompt and the completion of a response, shortened, for a report."""
    lines = []
    for name in ("prompt", "completion"):
        ids = inputs[f"{name}_ids"][response][inputs[f"{name}_mask"][response].bool()]
        lines.append(f"  {name}: {shorten(tokenizer.decode(ids))}")
    return "\n".join(lines)


def check_deepspeed(zero_stage: int):
    """Raise a ValueError if DeepSpeed, in this version or without ZeRO, would step with NaN gradients."""
    installed = version("deepspeed")
    if Version(installed) < Version(FIRST_DEEPSPEED):
        raise ValueError(
            f"DeepSpeed {installed} lets NaN gradients into the weights: pip install 'deepspeed>={FIRST_DEEPSPEED}'."
        )
    if zero_stage == 0:
        raise ValueError("DeepSpeed without ZeRO lets NaN gradients into the weights: set zero_stage to 1, 2 or 3.")

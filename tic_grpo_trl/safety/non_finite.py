"""NaN and infinities: where they stand, how a response is left out because of them, and how they are told.

Pure functions on the tensors of a rollout or a micro-batch; [`~tic_grpo_trl.safety.update_guard`] calls them. A bad
number may
not even be multiplied by 0: 0 · NaN is NaN, forwards and backwards. A response that has one is therefore *blanked*, put
in the state of those that fill up a micro-batch ([`~tic_grpo_trl.rollout.micro_batches.take_responses`]): one harmless
token and nothing that counts. It then contributes exactly zero, and no normaliser changes.
"""

import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version

from ..forward.responses import PADDED_SIDE, loss_mask, response_count
from ..rewards.failures import _shown


FIRST_DEEPSPEED = "0.19.8"  # that discards non-finite gradients of any precision
# exp of more is infinite in float32
LOG_LARGEST = math.log(torch.finfo(torch.float32).max)
REPORTED_ROWS = 3  # of a micro-batch or rollout, in one report


class NonFiniteError(RuntimeError):
    """Too many updates in a row had NaN or infinite numbers; the message says where. Raised on every process."""


@dataclass(frozen=True)
class CheckedNumbers:
    """One kind of number of every response.

    Attributes:
        name: what it is called in a report.
        values: (n, T) per token or (n, 1) per response.
        bad: which of them must not reach the weights; the same shape, bool.
    """

    name: str
    values: torch.Tensor
    bad: torch.Tensor


def _checked(name: str, values: torch.Tensor, bad: torch.Tensor | None = None) -> CheckedNumbers:
    values = values.detach()
    values = values.unsqueeze(1) if values.dim() == 1 else values
    return CheckedNumbers(name, values, ~values.isfinite() if bad is None else bad)


def numbers_of_rollout(inputs: dict[str, Any]) -> list[CheckedNumbers]:
    """What is known before the responses are trained on.

    Args:
        inputs: rollout or micro-batch of n responses. A sampler's log-probability may be NaN, which stands for one that
            it did not give.

    Returns:
        Advantages, old, reference and sampler log-probabilities, and importance sampling ratios, those there are.
    """
    places = [_checked("advantage", inputs["advantages"])]
    names = {
        "old_per_token_logps": "old log-probability",
        "ref_per_token_logps": "log-probability of the reference policy",
        "importance_sampling_ratio": "importance sampling ratio",
    }
    places += [_checked(text, inputs[name]) for name, text in names.items() if inputs.get(name) is not None]
    if (sampled := inputs.get("sampling_per_token_logps")) is not None:
        bad = sampled.isinf() & loss_mask(inputs).bool()
        places.append(_checked("log-probability of the sampler", sampled, bad))
    return places


def numbers_of_forward(
    per_token_logps: torch.Tensor,  # (B, T)
    inputs: dict[str, Any],
    level: str | None,
    beta: float,
    entropies: torch.Tensor | None = None,  # (B, T)
) -> list[CheckedNumbers]:
    """What a training forward pass brings to light.

    Masked positions are looked at too, since TRL's loss multiplies them by 0.

    Args:
        per_token_logps: log-probabilities of the policy.
        inputs: the micro-batch.
        level: `"token"` or `"sequence"` where the loss takes exp of a log-ratio that nothing bounds, else `None`.
        beta: coefficient of the KL term, which takes exp(ref − logp).
        entropies: those that the loss contains, if it does.

    Returns:
        Log-probabilities, and log-ratios whose exponential is not finite in float32.
    """
    logps = per_token_logps.detach()
    places = [_checked("log-probability of the policy", logps)]
    if entropies is not None:
        places.append(_checked("entropy of the policy", entropies))
    old = inputs.get("old_per_token_logps")
    if level is not None and old is not None:
        log_ratio = logps - old
        if level == "sequence":
            mask = loss_mask(inputs)
            log_ratio = (log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        places.append(_checked("log-ratio to the old policy", log_ratio, log_ratio > LOG_LARGEST))
    if beta != 0.0:
        log_ratio = inputs["ref_per_token_logps"] - logps
        places.append(_checked("log-ratio of the reference policy", log_ratio, log_ratio > LOG_LARGEST))
    return places


def bad_responses(places: list[CheckedNumbers]) -> torch.Tensor:
    """(n,) bool: the responses that have a bad number anywhere."""
    return torch.stack([place.bad.any(dim=1) for place in places]).any(dim=0)


def blank_responses(inputs: dict[str, Any], rows: torch.Tensor, pad_token_id: int) -> dict[str, Any]:
    """Leave responses out of a rollout or micro-batch without changing its shape.

    Args:
        inputs: of n responses.
        rows: (n,) bool, which ones.
        pad_token_id: a token for them if no response is left; otherwise they get one that another response has, which
            is known to be harmless.

    Returns:
        The same keys. In these rows the prompt is one token and nothing is attended to or counts; tensors of floats are
        0. Where the prompts have images, which are told apart by their tokens, only the completion is left out.
    """
    blanked = dict(inputs)
    prompts = () if "num_images" in inputs else ("prompt_ids", "prompt_mask")
    last = inputs["prompt_ids"][:, -1]
    left = (~rows).nonzero().flatten()
    token = last[left[0]] if len(left) else torch.full_like(last[0], pad_token_id)
    for name in PADDED_SIDE:
        value = inputs.get(name)
        if value is None or (name.startswith("prompt") and name not in prompts):
            continue
        value = value.clone()
        value[rows] = token if name.endswith("_ids") else 0
        if name == "prompt_mask":
            value[rows, -1] = 1
        blanked[name] = value
    return blanked


def groups_without_rewards(
    rewards: torch.Tensor,  # (n, F)
    weights: torch.Tensor,  # (F,)
    models: list[int],
    num_generations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups whose advantages are unknown because a reward is not a number.

    One bad reward makes the mean of its group unknown, and with `scale_rewards="batch"` the deviation of all.

    Args:
        rewards: of all processes; the responses to a prompt follow one another. NaN in the column of a function stands
            for its `None`.
        weights: of the functions and models.
        models: the columns of reward models, which have no `None`.
        num_generations: responses per prompt, G.

    Returns:
        (n,) bool, the responses of such groups, and (n,) bool, the responses that have the bad reward itself: NaN or
        infinite from a model, or so large that its square (with its weight, or about the group's mean) overflows
        float32. An infinite reward of a function is not meant: it ends the run.
    """
    total = (rewards * weights.to(rewards)).nansum(dim=1, keepdim=True)  # (n, 1)
    own = ~rewards[:, models].isfinite().all(dim=1)
    squares = torch.cat([rewards, total], dim=1).nan_to_num(nan=0.0).square()  # (n, F + 1)
    own = own | squares.isinf().any(dim=1)
    sums = squares.view(-1, num_generations, squares.size(1)).sum(dim=1)  # (groups, F + 1)
    groups = own.view(-1, num_generations).any(dim=1) | sums.isinf().any(dim=1)
    return groups.repeat_interleave(num_generations), own


def describe_responses(inputs: dict[str, Any], places: list[CheckedNumbers], tokenizer: Any) -> list[str]:
    """Say which responses have which bad numbers.

    Args:
        inputs: rollout or micro-batch.
        places: where they stand.
        tokenizer: to show prompts and completions.

    Returns:
        One text per response for the first few, and how many more there are; the first bad number of each place.
    """
    rows = bad_responses(places).nonzero().flatten().tolist()
    texts = []
    for row in rows[:REPORTED_ROWS]:
        numbers = []
        for place in places:
            if (bad := place.bad[row]).any():
                column = int(bad.nonzero()[0])
                text = f"{place.name} {float(place.values[row, column]):g}"
                if bad.numel() > 1:
                    token = tokenizer.decode(inputs["completion_ids"][row, column].view(1))
                    text += f" at token {column} ({token!r})"
                numbers.append(text)
        texts.append(f"{', '.join(numbers)}\n{response_text(inputs, row, tokenizer)}")
    if len(rows) > REPORTED_ROWS:
        texts.append(f"and {len(rows) - REPORTED_ROWS} more of {response_count(inputs)} responses")
    return texts


def response_text(inputs: dict[str, Any], row: int, tokenizer: Any) -> str:
    """Prompt and completion of a response, shortened."""
    lines = []
    for name in ("prompt", "completion"):
        ids = inputs[f"{name}_ids"][row][inputs[f"{name}_mask"][row].bool()]
        lines.append(f"  {name}: {_shown(tokenizer.decode(ids))}")
    return "\n".join(lines)


def check_deepspeed(zero_stage: int):
    """Refuse what lets NaN gradients into the weights: DeepSpeed did, unless they were float16; without ZeRO it does.

    Args:
        zero_stage: 0 to 3.

    Raises:
        ValueError: for such a version or stage.
    """
    installed = version("deepspeed")
    if Version(installed) < Version(FIRST_DEEPSPEED):
        raise ValueError(
            f"DeepSpeed {installed} lets NaN gradients into the weights: pip install 'deepspeed>={FIRST_DEEPSPEED}'."
        )
    if zero_stage == 0:
        raise ValueError("DeepSpeed without ZeRO lets NaN gradients into the weights: set zero_stage to 1, 2 or 3.")

"""Computes the metrics of the ratios, in pure functions.

They describe the trajectory ratio w' = exp(R) of the *policy* before any cap, whatever weight the algorithm uses, so
that algorithms can be compared. The loss path only builds a small tensor per micro-batch; numbers are read at log time.
"""

import math
from collections.abc import Iterable

import torch

from ..objective import ClippedWeight


QUANTILES = {"log_q05": 0.05, "log_q50": 0.5, "log_q95": 0.95}
LOW_RATIO = 0.1
# Logged by default, over all updates
DEFAULT = ("ess", "log_std", *QUANTILES, "clip_high_pos", "clip_high_neg", "clip_low_neg")
BY_AGE = ("ess", "log_std", "clip_high_pos", "clip_high_neg")  # logged for the responses of each age


def ratio_statistics(
    log_ratio: torch.Tensor,  # (B, T) in nats, 0 at masked positions
    clipped: ClippedWeight,
    advantages: torch.Tensor,  # (B,) or (B, T)
    mask: torch.Tensor,  # (B, T)
    sampler_log_ratio: torch.Tensor | None = None,  # (B, T) log P_old − log P_sampler, NaN where unknown
    token_age: torch.Tensor | None = None,  # (B, T) rollouts since the token was sampled; `None`: 0 everywhere
) -> torch.Tensor:
    """Compute the ratio statistics of each response, cheap to gather.

    Returns:
        (B, 10) float32: has tokens (0 or 1); R_i in nats; share of its tokens with A > 0; with A < 0; with A > 0 above
        the upper bound; with A < 0 above it; with A < 0 below the lower bound; sum of `sampler_log_ratio` and number of
        the tokens that have one; age of its oldest token. Shares are 0 or 1 where weight and A are per response.
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)  # (B, 1)
    length = mask.sum(dim=-1)  # (B,)

    def share(flag: torch.Tensor) -> torch.Tensor:  # (B, 1) or (B, T) -> (B,)
        return flag.squeeze(1).float() if flag.size(1) == 1 else (flag * mask).sum(dim=-1) / length.clamp(min=1)

    gains, losses = advantages > 0, advantages < 0
    if sampler_log_ratio is None:
        total = known = torch.zeros_like(length)
    else:
        is_known = mask.bool() & ~sampler_log_ratio.isnan()
        total, known = sampler_log_ratio.where(is_known, 0.0).sum(dim=-1), is_known.sum(dim=-1)
    columns = [
        length.gt(0).float(),
        log_ratio.sum(dim=-1),
        share(gains),
        share(losses),
        share(gains & clipped.above),
        share(losses & clipped.above),
        share(losses & clipped.below),
        total,
        known,
        torch.zeros_like(length) if token_age is None else (token_age * mask).amax(dim=-1),
    ]
    return torch.stack([column.float() for column in columns], dim=1)


def effective_sample_size(log_weights: torch.Tensor) -> torch.Tensor:
    """Compute (Σw)²/(n·Σw²) of the weights w = exp(`log_weights`), in log space.

    The weights are (n,), n ≥ 1, and may be as far apart as e^±1e4. The result lies between 1/n (one weight dominates)
    and 1 (all are equal).
    """
    n = log_weights.numel()
    log_weights = log_weights - log_weights.max()  # a common factor cancels
    return torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0) - math.log(n))


def ratio_metrics(rows: torch.Tensor) -> dict[str, float]:
    """Compute the metrics of one mini-batch.

    Args:
        rows: (n, 10), from [`ratio_statistics`], of every process.

    Returns:
        Floats by name: `ess` (share of n), `log_mean`, `log_std` (of R, nats, population), `log_min`, `log_max`,
        `log_q05`, `log_q50`, `log_q95`, `share_below_0.1` (of responses with w' < 0.1), and the shares
        `clip_high_pos` (of A > 0 above the bound), `clip_high_neg` and `clip_low_neg` (of A < 0 above and below). If
        some response is older than this rollout, those of [`BY_AGE`] also for each age a, as `age_<a>/…`. A share of
        nothing is left out; without any response that has tokens the result is empty.
    """
    rows = rows[rows[:, 0] > 0].double()
    if rows.size(0) == 0:
        return {}
    metrics = _metrics_of_some(rows)
    ages = rows[:, 9]
    for age in ages.unique().tolist() if ages.any() else []:
        of_age = _metrics_of_some(rows[ages == age])
        metrics |= {f"age_{age:.0f}/{name}": of_age[name] for name in BY_AGE if name in of_age}
    return metrics


def _metrics_of_some(rows: torch.Tensor) -> dict[str, float]:
    """Compute the metrics of responses, (n, 10), n ≥ 1, whatever their age."""
    log_ratio = rows[:, 1]
    metrics = {
        "ess": effective_sample_size(log_ratio).item(),
        "log_mean": log_ratio.mean().item(),
        "log_std": log_ratio.std(correction=0).item(),
        "log_min": log_ratio.min().item(),
        "log_max": log_ratio.max().item(),
        f"share_below_{LOW_RATIO}": (log_ratio < math.log(LOW_RATIO)).double().mean().item(),
    }
    levels = torch.tensor(list(QUANTILES.values()), dtype=rows.dtype, device=rows.device)
    metrics |= dict(zip(QUANTILES, torch.quantile(log_ratio, levels).tolist(), strict=True))
    gains, losses, high_pos, high_neg, low_neg = rows[:, 2:7].sum(dim=0).tolist()
    if gains > 0:
        metrics["clip_high_pos"] = high_pos / gains
    if losses > 0:
        metrics["clip_high_neg"] = high_neg / losses
        metrics["clip_low_neg"] = low_neg / losses
    return metrics


def default_metrics(names: Iterable[str], last_inner_step: int) -> list[str]:
    """Return those of the `names` that are logged by default.

    Per inner step they are those that show noise at the first and drift at the last. Noise alone is in responses of the
    current weights, which have age 0.
    """
    names, last = list(names), f"inner_{last_inner_step}/"
    wanted = (*DEFAULT, "inner_1/log_std", "inner_1/age_0/log_std", f"{last}ess", f"{last}log_std")
    return [name for name in wanted if name in names] + [name for name in names if name.startswith("age_")]


def mean_sampler_ratio(steps: list[tuple[int | None, torch.Tensor]]) -> float | None:
    """Compute the geometric mean over tokens of P_old/P_sampler: exp(−KL(sampler‖old)) per token, as sampled.

    An engine with the policy's weights gives 1 up to its numerics, one with other weights less. The arithmetic mean
    would not tell: its expectation is 1 for any sampler. The mean is limited to e^±700; it is `None` if no token has a
    ratio.
    """
    total, tokens = torch.stack([rows[:, 7:9].double().sum(dim=0) for _, rows in steps]).sum(dim=0).tolist()
    return math.exp(max(-700.0, min(700.0, total / tokens))) if tokens else None


def merge_steps(steps: list[tuple[int | None, torch.Tensor]]) -> dict[str, float]:
    """Compute the metrics of all mini-batches since the last log: overall, and under `inner_<k>/` per inner step.

    `steps` has (k, statistics) for each optimizer step: the inner step k = 1 … K, or `None` without an inner loop, and
    its (n, 10) statistics. Metrics are means over steps, `log_min` the smallest and `log_max` the largest.
    """
    per_step = [(k, ratio_metrics(rows.cpu())) for k, rows in steps]

    def merged(metrics: list[dict[str, float]]) -> dict[str, float]:
        by_name: dict[str, list[float]] = {}
        for step in metrics:
            for name, value in step.items():
                by_name.setdefault(name, []).append(value)
        how = {"log_min": min, "log_max": max}
        return {
            name: how[name](values) if name in how else sum(values) / len(values) for name, values in by_name.items()
        }

    result = merged([metrics for _, metrics in per_step])
    for inner_step in sorted({k for k, _ in per_step if k is not None}):
        inner = merged([metrics for k, metrics in per_step if k == inner_step])
        result |= {f"inner_{inner_step}/{name}": value for name, value in inner.items()}
    return result

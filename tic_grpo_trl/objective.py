"""The objective of every algorithm, as pure tensor functions.

One family with three axes (importance ratio, clip, length normalisation). This module holds the first two; the third is
TRL's `loss_type`. Nothing here imports TRL, so each function can be read beside its equation and tested alone.

Shapes: B responses, T completion positions. `mask` is 1 on the tokens that the policy chose (completion mask times tool
mask). Everything is computed in log space: a ratio is bounded *before* it is exponentiated, because clamping `exp(R)`
afterwards gives NaN gradients (0 times inf) from R = 89 on in float32.
"""

import math
from dataclasses import dataclass

import torch


LEVELS = ("token", "sequence", "prefix", "trajectory", "none")
PRODUCT_LEVELS = ("prefix", "trajectory")  # the weight is a product of token ratios
CLIP_MODES = ("up_only", "capped", "two_sided", "dual_clip", "truncated", "masked", "adaptive", "none")
CORRECTION_MODES = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")

# Where a rule has no upper bound (PPO's clip at A < 0), the weight is held at e^20 so that no loss or gradient is inf.
LOG_WEIGHT_BOUND = 20.0
# A weight of 0. It is finite because TRL's sequence level multiplies it by the mask, and -inf times 0 is NaN.
LOG_ZERO = -200.0


@dataclass(frozen=True)
class Clip:
    """The clip rule of an algorithm.

    Args:
        mode: one of `CLIP_MODES`, see [`clip_log_weight`].
        epsilon_low: lower bound of the weight is `1 - epsilon_low` (modes with a lower bound), unless
            `length_scale_low` is set.
        epsilon_high: upper bound of the weight is `1 + epsilon_high`, unless `length_scale` is set.
        delta: upper bound of the weight for A < 0 where it differs (TRL's `delta`, the released code's dual clip).
        length_scale: σ of the length-scaled cap: the upper bound in log space is σ·√|o_i| (the authors' released code).
        length_scale_low: σ of the length-scaled floor: the lower bound in log space is −σ·√|o_i| (CTPO).
    """

    mode: str
    epsilon_low: float = 1.0
    epsilon_high: float = math.inf
    delta: float | None = None
    length_scale: float = 0.0
    length_scale_low: float = 0.0


def token_log_ratio(
    per_token_logps: torch.Tensor,  # (B, T)
    old_per_token_logps: torch.Tensor | None,  # (B, T)
    mask: torch.Tensor,  # (B, T)
) -> torch.Tensor:
    """Compute the log-ratio of every token, r_{i,t} = (log π_θ − log π_old)·m, without gradient, in float32 or better.

    Args:
        per_token_logps: log-probabilities of the current policy, in nats.
        old_per_token_logps: those of the behaviour policy; `None` means that the rollout is on-policy, which makes
            every log-ratio exactly 0.
        mask: 1 on the tokens that count, 0 elsewhere; values at masked positions (NaN too) are ignored.

    Returns:
        (B, T) log-ratios, exactly 0 at masked positions.
    """
    logps = per_token_logps.detach()
    dtype = torch.promote_types(logps.dtype, torch.float32)
    if old_per_token_logps is None:
        return torch.zeros_like(logps, dtype=dtype)
    return torch.where(mask.bool(), logps.to(dtype) - old_per_token_logps.to(dtype), 0.0)


def log_importance_weight(
    log_ratio: torch.Tensor,  # (B, T)
    mask: torch.Tensor,  # (B, T)
    level: str,
) -> torch.Tensor:
    """Compute the log of the importance weight at a level: the first axis of the family.

    - `"token"`: r_{i,t}, one weight per token (GRPO, v2 Eq. 5), (B, T)
    - `"sequence"`: the mean of r over the response (GSPO), (B, 1)
    - `"prefix"`: R_{i,t} = Σ_{s≤t} r_{i,s}, the log of P_θ(s_t|s_0)/P_old(s_t|s_0) (CTPO, arXiv 2605.07331), (B, T)
    - `"trajectory"`: R_i = Σ_t r_{i,t}, the log of P_θ(s_T|s_0)/P_old(s_T|s_0); summed, never averaged (v2 §4), (B, 1)
    - `"none"`: 0, a weight of 1 (the ablation of v2 Fig. 1 and v5 Fig. 1), (B, 1)

    Args:
        log_ratio: output of [`token_log_ratio`], 0 at masked positions.
        mask: 1 on the tokens that count.
        level: one of the five above.

    Returns:
        (B, T) for `"token"` and `"prefix"`, else (B, 1), in nats.

    Raises:
        ValueError: for an unknown level.
    """
    if level == "token":
        return log_ratio
    if level == "prefix":
        return log_ratio.cumsum(dim=-1)
    total = log_ratio.sum(dim=-1, keepdim=True)  # (B, 1)
    if level == "trajectory":
        return total
    if level == "sequence":
        return total / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    if level == "none":
        return torch.zeros_like(total)
    raise ValueError(f"Unknown importance_sampling_level {level!r}: choose one of {', '.join(LEVELS)}.")


@dataclass(frozen=True)
class ClippedWeight:
    """What [`clip_log_weight`] returns; every tensor is (B, 1), or (B, T) where the weight or A is per token.

    Attributes:
        log_weight: the log-weight after the rule, always ≤ `LOG_WEIGHT_BOUND`.
        keeps_gradient: bool, False where the rule makes the gradient exactly 0.
        above: bool, True where the weight lay above its upper bound.
        below: bool, True where the weight lay below its lower bound.
    """

    log_weight: torch.Tensor
    keeps_gradient: torch.Tensor
    above: torch.Tensor
    below: torch.Tensor


def clip_log_weight(
    log_weight: torch.Tensor,  # (B, 1) or (B, T)
    advantages: torch.Tensor,  # (B,) or (B, T)
    mask: torch.Tensor,  # (B, T)
    clip: Clip,
    log_cap: torch.Tensor | None = None,  # 0-dimensional
) -> ClippedWeight:
    """Apply a clip rule in log space: the second axis of the family.

    | mode | A ≥ 0, above 1+ε_high | A < 0, above 1+ε_high | A < 0, below 1−ε_low |
    |---|---|---|---|
    | `up_only` (v2 §4, v5 §3) | held at 1+ε_high, gradient 0 | the same, or at `delta` | – |
    | `capped` (ours, seq_tis) | held at 1+ε_high, gradient kept | the same, or at `delta` | – |
    | `two_sided` (PPO, v2 Eq. 5) | held at 1+ε_high, gradient 0 | –, or at `delta` | at 1−ε_low, gradient 0 |
    | `dual_clip` (CTPO) | held at 1+ε_high, gradient 0 | the same | at 1−ε_low, gradient 0 |
    | `truncated` (ours) | held at 1+ε_high, gradient 0 | held at 1+ε_high, gradient kept | at 1−ε_low, gradient 0 |
    | `masked` (seq_mis) | 0 | 0 | 0, also for A ≥ 0 |
    | `adaptive` (ours) | held at the cap, gradient kept | the same | – |
    | `none` | – | – | – |

    With `clip.length_scale` = σ the bound 1+ε_high becomes exp(σ·√|o_i|), and with `clip.length_scale_low` = σ the
    bound 1−ε_low becomes exp(−σ·√|o_i|), |o_i| = Σ_t m_{i,t} tokens. With one weight per token, |o_i| is the number of
    tokens so far, t.

    Args:
        log_weight: output of [`log_importance_weight`], in nats.
        advantages: A_i, (B,) or per token (B, T); only the sign matters.
        mask: 1 on the tokens that count.
        clip: the rule.
        log_cap: log of the cap of `adaptive`, in nats; `None` for no cap.

    Returns:
        The bounded log-weight and where it keeps its gradient.

    Raises:
        ValueError: for an unknown mode.
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)  # (B, 1)
    gains = advantages >= 0
    if clip.mode == "none":
        bounded, gains = torch.broadcast_tensors(log_weight.clamp(max=LOG_WEIGHT_BOUND), gains)
        no = torch.zeros_like(gains)
        return ClippedWeight(bounded, ~no, above=no, below=no)

    # Bounds, (B, 1) unless the weight or the advantages are per token
    tokens = mask.sum(dim=-1, keepdim=True) if log_weight.size(1) == 1 else mask.cumsum(dim=-1)
    tokens, gains = torch.broadcast_tensors(tokens.to(log_weight.dtype), gains)
    unbounded = torch.full_like(tokens, math.inf)
    log_high = torch.full_like(tokens, math.log1p(clip.epsilon_high))
    if clip.mode == "adaptive":
        log_high = unbounded if log_cap is None else log_cap.to(tokens.dtype).expand_as(tokens)
    if clip.length_scale:
        log_high = clip.length_scale * tokens.sqrt()
    log_low = torch.full_like(tokens, math.log1p(-clip.epsilon_low) if clip.epsilon_low < 1 else -math.inf)
    if clip.length_scale_low:
        log_low = -clip.length_scale_low * tokens.sqrt()
    log_delta = unbounded if clip.delta is None else torch.full_like(tokens, math.log(clip.delta))

    if clip.mode in ("up_only", "capped", "adaptive"):
        high = log_high if clip.delta is None else torch.where(gains, log_high, log_delta)
        low = -unbounded
    elif clip.mode in ("two_sided", "dual_clip", "truncated"):
        high = torch.where(gains, log_high, log_delta) if clip.mode == "two_sided" else log_high
        low = torch.where(gains, -unbounded, log_low)
    elif clip.mode == "masked":
        high, low = log_high, log_low
    else:
        raise ValueError(f"Unknown clip_mode {clip.mode!r}: choose one of {', '.join(CLIP_MODES)}.")

    above, below = log_weight > high, log_weight < low  # (B, 1) or (B, T)
    # which of the weights above their bound lose their gradient, by the sign of A
    stops_above = gains if clip.mode == "truncated" else torch.full_like(gains, clip.mode not in ("capped", "adaptive"))
    bounded = log_weight.clamp(min=low, max=high.clamp(max=LOG_WEIGHT_BOUND))
    if clip.mode == "masked":
        bounded = bounded.masked_fill(above | below, LOG_ZERO)
    return ClippedWeight(bounded, ~(below | (above & stops_above)), above=above, below=below)


def anchored_old_logps(
    per_token_logps: torch.Tensor,  # (B, T), differentiable
    clipped: ClippedWeight,
) -> torch.Tensor:
    """Compute old log-probabilities that make token-level code compute the wanted weight on every token.

    Token-level code takes exp(log π_θ − old). With old = stop_grad(log π_θ) − log w the ratio of *every* token has the
    value w and the gradient w·∇log π_θ(o_{i,t}), which is v2 Eq. 11, line (*), for every length normaliser. Where the
    rule stops the gradient, `old` keeps its own gradient, so that the two cancel exactly.

    Args:
        per_token_logps: log-probabilities of the current policy, with gradient.
        clipped: output of [`clip_log_weight`].

    Returns:
        (B, T) anchored log-probabilities, float32 or better.
    """
    anchor = torch.where(clipped.keeps_gradient, per_token_logps.detach(), per_token_logps)
    return anchor - clipped.log_weight


def sampler_correction(
    old_per_token_logps: torch.Tensor,  # (B, T)
    sampling_per_token_logps: torch.Tensor,  # (B, T)
    mask: torch.Tensor,  # (B, T)
    mode: str,
    low: float | None,
    high: float | None,
) -> torch.Tensor:
    """Compute TRL's correction of the mismatch between sampler and trainer: a bounded P_old/P_sampler.

    Args:
        old_per_token_logps: log-probabilities under the trainer's weights, in nats.
        sampling_per_token_logps: those under which the tokens were drawn; a NaN leaves its token uncorrected.
        mask: 1 on the tokens that count.
        mode: `"token_…"` for a ratio of each token, `"sequence_…"` for that of the response; `"…_truncate"` holds it
            between the bounds, `"…_mask"` makes it 0 beyond them.
        low, high: the bounds, `None` for none.

    Returns:
        (B, T) for the token modes, else (B, 1).

    Raises:
        ValueError: for an unknown mode.
    """
    if mode not in CORRECTION_MODES:
        raise ValueError(f"Unknown correction mode {mode!r}: choose one of {', '.join(CORRECTION_MODES)}.")
    level, _, rule = mode.partition("_")
    log_ratio = ((old_per_token_logps - sampling_per_token_logps) * mask).nan_to_num(nan=0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=-1, keepdim=True)  # (B, 1)
    ratio = log_ratio.exp()
    if rule == "truncate":
        return ratio.clamp(min=low, max=high) if (low, high) != (None, None) else ratio
    beyond = (ratio < (-math.inf if low is None else low)) | (ratio > (math.inf if high is None else high))
    return ratio.masked_fill(beyond, 0.0)

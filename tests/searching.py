"""What the tests that search with hypothesis share: the inputs, the bounds of the rules, TRL's ratio.

The same inputs are tried in every run. `INVARIANT_EXAMPLES=20000` tries that many per test instead, at random.
"""

import math
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from research.theory.estimators import package_algorithm
from tic_grpo_trl.algorithms import FAMILY
from tic_grpo_trl.metrics.ratios import ratio_metrics, ratio_statistics
from tic_grpo_trl.objective import (
    CLIP_MODES,
    LEVELS,
    Clip,
    anchored_old_logps,
    clip_log_weight,
    log_importance_weight,
    token_log_ratio,
)


EXAMPLES = int(os.environ.get("INVARIANT_EXAMPLES", "0"))
# The smallest input that fails is for people; mutmut, which sets this, wants to know only whether one does.
PHASES = [Phase.generate] if "MUTANT_UNDER_TEST" in os.environ else list(Phase)


def searched(examples: int) -> settings:
    """So many inputs, the same ones in every run; with `INVARIANT_EXAMPLES` so many others, at random."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        phases=PHASES,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def tensors(shape: tuple[int, ...], elements: st.SearchStrategy, kind: type = float) -> st.SearchStrategy[torch.Tensor]:
    """Tensors of the given elements: float64, int64 or bool."""
    return arrays(kind, shape, elements=elements).map(torch.from_numpy)


# Micro-batches and rules


@dataclass
class Batch:
    """Inputs of a loss: log-probabilities, those of π_old and a mask, (B, T); advantages, (B,) or (B, T)."""

    logps: torch.Tensor
    old: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor

    def map(self, function) -> "Batch":
        return Batch(*(function(value) for value in vars(self).values()))

    @property
    def log_ratios(self) -> list[dict[int, float]]:
        """r_{i,t} of the tokens that count by position, a dictionary per response."""
        pairs = zip(self.logps.tolist(), self.old.tolist(), self.mask.tolist(), strict=True)
        return [{t: new[t] - old[t] for t, counts in enumerate(mask) if counts} for new, old, mask in pairs]


@st.composite
def batches(draw, per_token: bool | None = None, width: int = 64) -> Batch:
    """At most four responses of at most five tokens; any of these may not count; any response may be far away."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    mask = draw(tensors(shape, st.booleans(), bool)).double()
    drift = draw(tensors(shape, st.floats(-2, 2, width=width)))
    far = draw(tensors(shape[:1], st.sampled_from([0.0, 0.0, 0.0, 1.0, 1e2, 1e4, -1e2, -1e4])))
    drift[:, draw(st.integers(0, shape[1] - 1))] += far
    logps = draw(tensors(shape, st.floats(-20, 0, width=width)))
    per_token = draw(st.booleans()) if per_token is None else per_token
    advantages = draw(tensors(shape if per_token else shape[:1], st.floats(-3, 3, width=width)))
    return Batch(logps, logps - drift, advantages, mask)


ALGORITHM_RULES = {name: package_algorithm(name) for name in FAMILY}
CLIPS = st.builds(
    Clip,
    st.sampled_from(CLIP_MODES),
    epsilon_low=st.just(1.0) | st.floats(0.01, 1),
    epsilon_high=st.floats(0.01, 10),
    delta=st.none() | st.floats(11.5, 1e12),  # above 1 + epsilon_high, also beyond what a weight is held at
    length_scale=st.just(0.0) | st.floats(1e-3, 2),
    length_scale_low=st.just(0.0) | st.floats(1e-3, 2),
)
RULES = st.sampled_from([(algorithm.level, algorithm.clip) for algorithm in ALGORITHM_RULES.values()]) | st.tuples(
    st.sampled_from(LEVELS), CLIPS
)


# The bounds of a rule, in Python's float64


def bounds(clip: Clip, gains: bool, length: int, number=float) -> tuple[float, float]:
    """Lower and upper bound of a log-weight: the table of `clip_log_weight`. `number` rounds as the tensors do."""
    cap = number(math.log1p(clip.epsilon_high))
    if clip.length_scale:
        cap = number(number(clip.length_scale) * number(math.sqrt(length)))
    dual = math.inf if clip.delta is None else number(math.log(clip.delta))
    low = number(math.log1p(-clip.epsilon_low)) if clip.epsilon_low < 1 else -math.inf
    if clip.length_scale_low:
        low = -number(number(clip.length_scale_low) * number(math.sqrt(length)))
    if clip.mode in ("none", "adaptive"):  # which has no cap unless it is given one
        return -math.inf, math.inf
    if clip.mode in ("up_only", "capped"):
        return -math.inf, cap if gains or clip.delta is None else dual
    if clip.mode == "masked":
        return low, cap
    return -math.inf if gains else low, dual if clip.mode == "two_sided" and not gains else cap


def log_weights(ratios: dict[int, float], level: str) -> dict[int, float]:
    """The log-weight of every token of a response."""
    if level == "prefix":
        return {t: math.fsum(r for s, r in ratios.items() if s <= t) for t in ratios}
    total = math.fsum(ratios.values())
    of_response = {"trajectory": total, "sequence": total / max(len(ratios), 1), "none": 0.0}
    return ratios if level == "token" else dict.fromkeys(ratios, of_response[level])


def lengths_at(ratios: dict[int, float], level: str) -> dict[int, int]:
    """The tokens that the bounds of every token count: those so far, or all of the response."""
    per_token = level in ("token", "prefix")
    return {t: place if per_token else len(ratios) for place, t in enumerate(sorted(ratios), start=1)}


def lies_on_a_bound(batch: Batch, level: str, clip: Clip, within: float) -> bool:
    """Whether rounding may decide on which side of a bound a weight lies."""
    return any(
        abs(x - bound) <= within * (1 + abs(x))
        for ratios in batch.log_ratios
        for t, x in log_weights(ratios, level).items()
        for gains in (True, False)
        for bound in bounds(clip, gains, lengths_at(ratios, level)[t])
    )


def by_the_table(x: float, gains: bool, clip: Clip, length: int, number=float) -> tuple[float, bool]:
    """The bounded log-weight, never above 20, and whether it keeps its gradient."""
    low, high = bounds(clip, gains, length, number)
    if clip.mode == "masked" and not low <= x <= high:
        return -200.0, False
    above_stops = {"truncated": gains, "capped": False, "none": False}.get(clip.mode, True)
    return min(max(x, low), high, 20.0), not (x < low or (x > high and above_stops))


def written_out(batch: Batch, level: str, clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) objective of every token and coefficient of its ∇log π_θ: v2 Eq. 11, line (*), before the normaliser."""
    value, gradient = torch.zeros(batch.mask.shape).double(), torch.zeros(batch.mask.shape).double()
    for i, ratios in enumerate(batch.log_ratios):
        for t, x in log_weights(ratios, level).items():
            a = float(batch.advantages[i, t] if batch.advantages.dim() == 2 else batch.advantages[i])
            bounded, keeps = by_the_table(x, a >= 0, clip, lengths_at(ratios, level)[t])
            value[i, t] = math.exp(bounded) * a
            gradient[i, t] = math.exp(bounded) * a * keeps
    return value, gradient


T = 7  # the constant of `dr_grpo`, `max_completion_length`
NORMALISERS = {  # of the tokens of a response; `rows` and `tokens` are those of the whole mini-batch
    "grpo": lambda lengths, rows, tokens: rows * lengths.clamp(min=1),
    "dr_grpo": lambda lengths, rows, tokens: torch.full_like(lengths, rows * T),
    "dapo": lambda lengths, rows, tokens: torch.full_like(lengths, max(tokens, 1)),
    "bnpo": lambda lengths, rows, tokens: torch.full_like(lengths, max(tokens, 1)),
}


# The package's functions, and what TRL's loss makes of their result


def ratios_of(logps, clipped, mask, parent_level="token"):
    """exp of what TRL's loss makes of the anchored log-probabilities: (B, T), at its sequence level (B, 1)."""
    log_ratio = logps - anchored_old_logps(logps, clipped)
    if parent_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    return log_ratio.exp()


def log_ratio_of(batch: Batch) -> torch.Tensor:
    return token_log_ratio(batch.logps, batch.old, batch.mask)


def clipped_weight(batch: Batch, level: str, clip: Clip):
    log_weight = log_importance_weight(log_ratio_of(batch), batch.mask, level)
    return clip_log_weight(log_weight, batch.advantages, batch.mask, clip)


def rows_of(batch: Batch, level: str, clip: Clip) -> torch.Tensor:
    return ratio_statistics(log_ratio_of(batch), clipped_weight(batch, level, clip), batch.advantages, batch.mask)


def close_metrics(actual: torch.Tensor, expected: torch.Tensor):
    """Of mini-batches whose responses have the same ratios, of which rows keep float32."""
    expected_metrics = {name: pytest.approx(x, rel=1e-5, abs=1e-9) for name, x in ratio_metrics(expected).items()}
    assert ratio_metrics(actual) == expected_metrics


def close(actual, expected, tolerance=1e-12, scale=1.0):
    """Equal but for rounding: absolutely in units of `scale`, and relative to the value (a weight may be e^20)."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)

"""objective.py against hand-computed values and a direct float64 transcription of the papers' formulas."""

import math

import pytest
import torch

from tic_grpo_trl.objective import (
    LOG_WEIGHT_BOUND,
    Clip,
    anchored_old_logps,
    clip_log_weight,
    log_importance_weight,
    sampler_correction,
    token_log_ratio,
)


UP_ONLY = Clip("up_only", epsilon_high=0.28)
TWO_SIDED = Clip("two_sided", epsilon_low=0.2, epsilon_high=0.28)
CAPPED = Clip("capped", epsilon_high=0.28)
TRUNCATED = Clip("truncated", epsilon_low=0.2, epsilon_high=0.28)
RELEASED = Clip("up_only", delta=3.0, length_scale=0.01)
MASKED = Clip("masked", epsilon_low=0.5, epsilon_high=2.0)
DUAL = Clip("dual_clip", length_scale=0.05, length_scale_low=0.025)  # CTPO's, of four tokens: e^0.1 and e^-0.05


def parent_ratio(logps, old):
    """What token-level code does with the log-probabilities it is given."""
    return torch.exp(logps - old)


def weight_and_gradient(log_weight, advantage, clip, length=4):
    """Value of every token's ratio and its gradient (which is the ratio itself where the rule keeps it, else 0)."""
    logps = torch.linspace(-3.0, -0.5, length).reshape(1, length).requires_grad_()
    mask = torch.ones(1, length)
    clipped = clip_log_weight(torch.tensor([[float(log_weight)]]), torch.tensor([float(advantage)]), mask, clip)
    ratio = parent_ratio(logps, anchored_old_logps(logps, clipped))
    (gradient,) = torch.autograd.grad(ratio.sum(), logps)
    return ratio.detach(), gradient


# w = 1.5 lies above 1.28 and below 3, 4 above both, 1.1 inside, 0.5 below 0.8. Each row: rule, w, A, value, gradient.
HAND_COMPUTED = [
    (UP_ONLY, 1.5, 1.0, 1.28, 0.0),
    (UP_ONLY, 1.5, -1.0, 1.28, 0.0),
    (UP_ONLY, 1.1, 1.0, 1.1, 1.1),
    (UP_ONLY, 1.1, -1.0, 1.1, 1.1),
    (UP_ONLY, 0.5, 1.0, 0.5, 0.5),
    (UP_ONLY, 0.5, -1.0, 0.5, 0.5),
    (CAPPED, 1.5, 1.0, 1.28, 1.28),
    (CAPPED, 1.5, -1.0, 1.28, 1.28),
    (CAPPED, 1.1, -1.0, 1.1, 1.1),
    (CAPPED, 0.5, -1.0, 0.5, 0.5),
    (Clip("capped", epsilon_high=0.28, delta=3.0), 4.0, -1.0, 3.0, 3.0),
    (TWO_SIDED, 1.5, 1.0, 1.28, 0.0),
    (TWO_SIDED, 1.5, -1.0, 1.5, 1.5),
    (TWO_SIDED, 0.5, 1.0, 0.5, 0.5),
    (TWO_SIDED, 0.5, -1.0, 0.8, 0.0),
    (TWO_SIDED, 1.1, -1.0, 1.1, 1.1),
    (Clip("two_sided", 0.2, 0.28, delta=3.0), 4.0, -1.0, 3.0, 0.0),
    (Clip("two_sided", 0.2, 0.28, delta=3.0), 1.5, -1.0, 1.5, 1.5),
    (TRUNCATED, 1.5, 1.0, 1.28, 0.0),
    (TRUNCATED, 1.5, -1.0, 1.28, 1.28),
    (TRUNCATED, 0.5, -1.0, 0.8, 0.0),
    (TRUNCATED, 0.5, 1.0, 0.5, 0.5),
    (Clip("up_only", epsilon_high=0.28, delta=3.0), 1.5, -1.0, 1.5, 1.5),
    (Clip("up_only", epsilon_high=0.28, delta=3.0), 4.0, -1.0, 3.0, 0.0),
    (Clip("up_only", epsilon_high=0.28, delta=3.0), 1.5, 1.0, 1.28, 0.0),
    # 0.01·√4 = 0.02: the cap of a response of four tokens is e^0.02 = 1.0202
    (RELEASED, 1.03, 1.0, math.exp(0.02), 0.0),
    (RELEASED, 1.01, 1.0, 1.01, 1.01),
    (RELEASED, 1.03, -1.0, 1.03, 1.03),
    (RELEASED, 4.0, -1.0, 3.0, 0.0),
    (Clip("none"), 1.0, -1.0, 1.0, 1.0),
    (MASKED, 2.9, 1.0, 2.9, 2.9),
    (MASKED, 2.9, -1.0, 2.9, 2.9),
    (MASKED, 3.1, 1.0, 0.0, 0.0),
    (MASKED, 3.1, -1.0, 0.0, 0.0),
    (MASKED, 0.6, 1.0, 0.6, 0.6),
    (MASKED, 0.4, 1.0, 0.0, 0.0),
    (MASKED, 0.4, -1.0, 0.0, 0.0),
    (Clip("masked", epsilon_high=2.0), 1e-6, -1.0, 1e-6, 1e-6),
    (DUAL, 1.1, 1.0, 1.1, 1.1),
    (DUAL, 1.1, -1.0, 1.1, 1.1),
    (DUAL, 1.2, 1.0, math.exp(0.1), 0.0),
    (DUAL, 1.2, -1.0, math.exp(0.1), 0.0),
    (DUAL, 0.96, -1.0, 0.96, 0.96),
    (DUAL, 0.9, -1.0, math.exp(-0.05), 0.0),
    (DUAL, 0.9, 1.0, 0.9, 0.9),
]


@pytest.mark.parametrize(("clip", "weight", "advantage", "value", "gradient"), HAND_COMPUTED)
def test_hand_computed_weights(clip, weight, advantage, value, gradient):
    ratio, grad = weight_and_gradient(math.log(weight), advantage, clip)
    torch.testing.assert_close(ratio, torch.full((1, 4), value), rtol=1e-6, atol=0)
    if gradient == 0.0:
        assert torch.equal(grad, torch.zeros(1, 4))  # exactly
    else:
        torch.testing.assert_close(grad, torch.full((1, 4), gradient), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bound", [math.log1p(0.28), math.log1p(-0.2)])
def test_a_weight_exactly_at_a_bound_keeps_its_gradient(bound):
    """The papers' events are w ≤ 1+ε_high and w ≥ 1−ε_low."""
    clipped = clip_log_weight(torch.tensor([[bound]]), torch.tensor([-1.0]), torch.ones(1, 4), TRUNCATED)
    assert not clipped.above
    assert not clipped.below
    assert clipped.keeps_gradient
    assert clip_log_weight(torch.tensor([[bound]]), torch.tensor([1.0]), torch.ones(1, 4), UP_ONLY).keeps_gradient


def test_the_length_scaled_cap_counts_only_the_tokens_that_the_policy_chose():
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 0, 0, 0, 1]])  # 4 tokens
    clipped = clip_log_weight(torch.tensor([[5.0]]), torch.tensor([1.0]), mask, Clip("up_only", length_scale=0.01))
    torch.testing.assert_close(clipped.log_weight, torch.tensor([[0.02]]))


@pytest.mark.parametrize("clip", [UP_ONLY, TWO_SIDED, TRUNCATED, RELEASED, MASKED, DUAL, Clip("none")])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("log_weight", [-1e4, -89.0, -1.0, 0.0, 0.2, 1.0, 89.0, 1e4])
def test_loss_and_gradient_stay_finite(clip, advantage, log_weight):
    ratio, gradient = weight_and_gradient(log_weight, advantage, clip)
    assert (ratio * advantage).isfinite().all()
    assert (gradient * advantage).isfinite().all()
    high = {-2.0: clip.delta}.get(advantage) or 1.28 if clip is not RELEASED else (3.0 if advantage < 0 else 1.0203)
    if clip.mode == "up_only" and log_weight > math.log(high):
        assert torch.equal(gradient, torch.zeros(1, 4))
        torch.testing.assert_close(ratio, torch.full((1, 4), float(high)), rtol=1e-4, atol=0)
    if clip is UP_ONLY and log_weight <= math.log(1.28):
        torch.testing.assert_close(ratio, torch.full((1, 4), math.exp(log_weight)), rtol=2e-6, atol=1e-12)
        torch.testing.assert_close(gradient, ratio, rtol=1e-6, atol=0)


def test_a_rule_without_upper_bound_is_held_at_a_finite_weight():
    ratio, _ = weight_and_gradient(1e4, -1.0, TWO_SIDED)
    torch.testing.assert_close(ratio, torch.full((1, 4), math.exp(LOG_WEIGHT_BOUND)), rtol=1e-5, atol=0)


def test_log_ratio_is_exactly_zero_for_identical_policies_and_without_old():
    logps = torch.randn(3, 50) - 4
    mask = torch.ones(3, 50)
    for old in (logps.clone(), None):
        log_ratio = token_log_ratio(logps, old, mask)
        assert torch.equal(log_ratio, torch.zeros(3, 50))
        clipped = clip_log_weight(log_importance_weight(log_ratio, mask, "trajectory"), torch.ones(3), mask, UP_ONLY)
        assert torch.equal(parent_ratio(logps, anchored_old_logps(logps, clipped)), torch.ones(3, 50))


def test_masked_positions_do_not_count_whatever_stands_there():
    logps = torch.tensor([[0.5, math.nan, 0.25, math.inf]])
    old = torch.tensor([[0.1, 2.0, math.nan, -math.inf]])
    log_ratio = token_log_ratio(logps, old, torch.tensor([[1, 0, 0, 0]]))
    torch.testing.assert_close(log_ratio, torch.tensor([[0.4, 0.0, 0.0, 0.0]]))


def test_bfloat16_log_probabilities_are_summed_in_float32():
    logps = torch.full((1, 4096), -1.0, dtype=torch.bfloat16)
    old = torch.full((1, 4096), -1.0078125, dtype=torch.bfloat16)  # one bfloat16 step below -1
    weight = log_importance_weight(token_log_ratio(logps, old, torch.ones(1, 4096)), torch.ones(1, 4096), "trajectory")
    assert weight.dtype == torch.float32
    assert weight.item() == 32.0  # 4096 · 0.0078125; summed in bfloat16 it would stick at a power of two


def test_float64_stays_float64():
    one = torch.zeros(1, 2, dtype=torch.float64)
    assert token_log_ratio(one, one, torch.ones(1, 2)).dtype == torch.float64
    assert token_log_ratio(one.float(), one, torch.ones(1, 2)).dtype == torch.float32  # the policy's decides
    assert token_log_ratio(one, one.float(), torch.ones(1, 2)).dtype == torch.float64


def test_levels_by_hand():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    log_ratio = torch.tensor([[0.3, -0.1, 0.0], [0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])
    assert torch.equal(log_importance_weight(log_ratio, mask, "token"), log_ratio)
    torch.testing.assert_close(
        log_importance_weight(log_ratio, mask, "trajectory"), torch.tensor([[0.2], [0.6], [0.0]])
    )
    torch.testing.assert_close(log_importance_weight(log_ratio, mask, "sequence"), torch.tensor([[0.1], [0.2], [0.0]]))
    assert torch.equal(log_importance_weight(log_ratio, mask, "none"), torch.zeros(3, 1))
    torch.testing.assert_close(
        log_importance_weight(log_ratio, mask, "prefix"),
        torch.tensor([[0.3, 0.2, 0.2], [0.1, 0.3, 0.6], [0.0, 0.0, 0.0]]),
    )


def test_the_bounds_of_a_prefix_count_the_tokens_so_far():
    mask = torch.tensor([[1, 0, 1, 1]])
    above = clip_log_weight(torch.full((1, 4), 5.0), torch.tensor([1.0]), mask, DUAL)
    below = clip_log_weight(torch.full((1, 4), -5.0), torch.tensor([-1.0]), mask, DUAL)
    root = torch.tensor([[1, 1, 2, 3]]).sqrt()
    torch.testing.assert_close(above.log_weight, 0.05 * root)
    torch.testing.assert_close(below.log_weight, -0.025 * root)


def test_a_masked_weight_stays_finite_where_trl_multiplies_it_by_the_mask():
    """The mean over a response, as TRL's sequence level takes it, of old log-probabilities that make the weight 0."""
    logps = torch.tensor([[-0.3, -1.7, -2.9, -0.01]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    clipped = clip_log_weight(torch.tensor([[9.0]]), torch.tensor([1.0]), mask, MASKED)
    ratio = (((logps - anchored_old_logps(logps, clipped)) * mask).sum(1) / mask.sum(1)).exp()
    (gradient,) = torch.autograd.grad(ratio.sum(), logps)
    assert not ratio.any()
    assert torch.equal(gradient, torch.zeros_like(logps))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_adaptive_weight_is_held_at_the_cap_that_it_is_given(advantage):
    log_weight = torch.tensor([[-5.0], [0.5], [1.5]])
    advantages, mask, clip = torch.full((3,), advantage), torch.ones(3, 2), Clip("adaptive")
    clipped = clip_log_weight(log_weight, advantages, mask, clip, torch.tensor(1.0))
    assert clipped.log_weight.flatten().tolist() == [-5.0, 0.5, 1.0]
    assert clipped.keeps_gradient.all()
    assert clipped.above.flatten().tolist() == [False, False, True]
    assert torch.equal(clip_log_weight(log_weight, advantages, mask, clip).log_weight, log_weight)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Unknown importance_sampling_level 'trajektory': choose one of token"):
        log_importance_weight(torch.zeros(1, 1), torch.ones(1, 1), "trajektory")
    with pytest.raises(ValueError, match="Unknown clip_mode 'upper': choose one of up_only"):
        clip_log_weight(torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), Clip("upper", 0.2, 0.2))


def papers_surrogate(logps, old, advantages, mask, level, clip):
    """Direct transcription, one response and one token at a time, in float64: the sum over tokens of the per-token
    objective whose *value gradient* is w·A·∇log π_θ where the rule keeps it."""
    rows = []
    for i in range(len(logps)):
        chosen = [t for t in range(logps.size(1)) if mask[i, t]]
        ratios = {t: math.exp(logps[i, t] - old[i, t]) for t in chosen}
        length = max(len(chosen), 1)
        row = []
        for t in chosen:
            a = advantages[i, t].item() if advantages.dim() == 2 else advantages[i].item()
            w = {
                "token": ratios[t],
                "sequence": math.prod(ratios.values()) ** (1 / length),
                "trajectory": math.prod(ratios.values()),
                "prefix": math.prod(ratios[s] for s in chosen if s <= t),
                "none": 1.0,
            }[level]
            tokens = chosen.index(t) + 1 if level in ("token", "prefix") else length
            high = 1 + (clip.epsilon_high or 0)
            if clip.length_scale:
                high = math.exp(clip.length_scale * math.sqrt(tokens))
            low = 1 - clip.epsilon_low
            if clip.length_scale_low:
                low = math.exp(-clip.length_scale_low * math.sqrt(tokens))
            if clip.mode == "capped":  # min(w, cap)·A·∇log π
                row.append((min(w, high) * a, min(w, high) * a))
            elif clip.mode == "up_only":
                limit = clip.delta if clip.delta and a < 0 else high
                row.append((min(w, limit) * a, w * a if w <= limit else 0.0))
            elif clip.mode == "masked":
                row.append((w * a, w * a) if low <= w <= high else (0.0, 0.0))
            elif clip.mode == "dual_clip" and a < 0 and w > high:
                row.append((high * a, 0.0))
            elif clip.mode in ("two_sided", "dual_clip"):  # min(wA, clip(w)A)
                bounded = min(max(w, low), high)
                row.append((min(w * a, bounded * a), w * a if w * a <= bounded * a else 0.0))
            elif clip.mode == "truncated":
                if a >= 0:
                    row.append((min(w, high) * a, w * a if w <= high else 0.0))
                else:
                    row.append((min(max(w, 1 - clip.epsilon_low), high) * a, min(w, high) * a if w >= 0.8 else 0.0))
            else:
                row.append((w * a, w * a))
        rows.append((chosen, row))
    value, gradient = torch.zeros_like(logps), torch.zeros_like(logps)
    for i, (chosen, row) in enumerate(rows):
        for t, (v, g) in zip(chosen, row, strict=True):
            value[i, t], gradient[i, t] = v, g
    return value, gradient


@pytest.mark.parametrize("per_token_advantages", [False, True])
@pytest.mark.parametrize("drift", [0.0, 0.01, 0.05, 0.3, 2.0])
@pytest.mark.parametrize(
    ("level", "clip"),
    [
        ("trajectory", UP_ONLY),
        ("trajectory", TWO_SIDED),
        ("trajectory", CAPPED),
        ("trajectory", TRUNCATED),
        ("trajectory", RELEASED),
        ("trajectory", Clip("two_sided", epsilon_low=0.2, length_scale=0.05)),
        ("trajectory", Clip("truncated", epsilon_low=0.2, length_scale=0.05)),
        ("trajectory", Clip("capped", length_scale=0.05)),
        ("trajectory", MASKED),
        ("trajectory", DUAL),
        ("trajectory", Clip("masked", length_scale=0.05, length_scale_low=0.1)),
        ("prefix", DUAL),
        ("prefix", CAPPED),
        ("prefix", MASKED),
        ("prefix", UP_ONLY),
        ("token", UP_ONLY),
        ("token", TRUNCATED),
        ("sequence", UP_ONLY),
        ("none", Clip("none")),
    ],
)
def test_against_a_transcription_of_the_formulas(level, clip, drift, per_token_advantages):
    generator = torch.Generator().manual_seed(0)
    size, width = 12, 12
    logps = -3 * torch.rand(size, width, generator=generator, dtype=torch.float64)
    old = logps - drift * torch.randn(size, width, generator=generator, dtype=torch.float64)
    mask = (torch.arange(width) < torch.arange(1, size + 1).unsqueeze(1)).double()  # lengths 1 … T
    mask[5, 2] = 0  # a tool token
    shape = (size, width) if per_token_advantages else (size,)
    advantages = torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages[3] = 0.0

    leaf = logps.clone().requires_grad_()
    log_ratio = token_log_ratio(leaf, old, mask)
    clipped = clip_log_weight(log_importance_weight(log_ratio, mask, level), advantages, mask, clip)
    broadcast = advantages if per_token_advantages else advantages.unsqueeze(1)
    objective = parent_ratio(leaf, anchored_old_logps(leaf, clipped)) * broadcast * mask
    (gradient,) = torch.autograd.grad(objective.sum(), leaf)

    expected_value, expected_gradient = papers_surrogate(logps, old, advantages, mask, level, clip)
    torch.testing.assert_close(objective.detach(), expected_value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


# The correction for the sampler


RATIOS = torch.tensor([[0.5, 2.0, 1.25], [1.0, 4.0, 1.0]])  # P_old/P_sampler of each token


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", None, None, [[0.5, 2.0, 1.25], [1.0, 4.0, 1.0]]),
        ("token_truncate", 0.75, 3.0, [[0.75, 2.0, 1.25], [1.0, 3.0, 1.0]]),
        ("token_mask", 0.75, 3.0, [[0.0, 2.0, 1.25], [1.0, 0.0, 1.0]]),
        ("sequence_truncate", None, 3.0, [[1.25], [3.0]]),
        ("sequence_mask", None, 3.0, [[1.25], [0.0]]),
        ("sequence_mask", 1.5, None, [[0.0], [4.0]]),
    ],
)
def test_sampler_correction_by_hand(mode, low, high, expected):
    old = torch.full((2, 3), -1.0)
    ratio = sampler_correction(old, old - RATIOS.log(), torch.ones(2, 3), mode, low, high)
    torch.testing.assert_close(ratio, torch.tensor(expected))


def test_tokens_that_the_sampler_did_not_score_or_choose_are_not_corrected():
    old = torch.full((2, 3), -1.0)
    sampler, mask = old - RATIOS.log(), torch.ones(2, 3)
    sampler[0, 0], mask[1, 1] = math.nan, 0
    by_token = sampler_correction(old, sampler, mask, "token_truncate", None, 3.0)
    torch.testing.assert_close(by_token, torch.tensor([[1.0, 2.0, 1.25], [1.0, 1.0, 1.0]]))
    by_response = sampler_correction(old, sampler, mask, "sequence_mask", None, 3.0)
    torch.testing.assert_close(by_response, torch.tensor([[2.5], [1.0]]))


def test_an_unknown_correction_is_refused():
    with pytest.raises(ValueError, match="Unknown correction mode 'sequence': choose one of sequence_mask"):
        sampler_correction(RATIOS, RATIOS, RATIOS, "sequence", None, None)

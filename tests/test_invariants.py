"""Invariants of objective.py, searched by hypothesis, and the formulas that the loss has to be."""

import math
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from searching import (
    ALGORITHM_RULES,
    CLIPS,
    NORMALISERS,
    RULES,
    Batch,
    T,
    batches,
    bounds,
    by_the_table,
    clipped_weight,
    close,
    close_metrics,
    lies_on_a_bound,
    log_ratio_of,
    ratios_of,
    rows_of,
    searched,
    written_out,
)

from tic_grpo_trl.metrics.ratios import ratio_metrics, ratio_statistics
from tic_grpo_trl.objective import LOG_WEIGHT_BOUND, Clip, clip_log_weight, log_importance_weight, token_log_ratio


def loss_of(batch: Batch, level: str, clip: Clip, loss_type="dr_grpo", of_all=None, parent_level="token"):
    """Loss and gradient with respect to the log-probabilities, as `GRPOTrainer._compute_loss` writes them.

    `of_all`: rows and tokens of the mini-batch that this is a part of.
    """
    logps = batch.logps.clone().requires_grad_()
    clipped = clipped_weight(replace(batch, logps=logps), level, clip)
    advantages = batch.advantages.unsqueeze(1) if batch.advantages.dim() == 1 else batch.advantages
    ratio = ratios_of(logps, clipped, batch.mask, parent_level)
    per_token_loss = -torch.min(ratio * advantages, ratio.clamp(0.0, math.inf) * advantages)  # bounds out of reach
    lengths = batch.mask.sum(-1)
    rows, tokens = of_all or (len(lengths), int(lengths.sum()))
    loss = ((per_token_loss * batch.mask).sum(-1) / NORMALISERS[loss_type](lengths, rows, tokens)).sum()
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient


# Bounds, one weight at a time


@searched(250)
@given(
    clip=CLIPS | st.sampled_from([algorithm.clip for algorithm in ALGORITHM_RULES.values()]),
    advantage=st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324]) | st.floats(-3, 3),
    length=st.integers(1, 6),
    logp=st.floats(-50, 0, width=32),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    parent_level=st.sampled_from(["token", "sequence"]),
    data=st.data(),
)
def test_value_and_gradient_of_a_weight_are_those_of_the_table(
    clip, advantage, length, logp, dtype, parent_level, data
):
    def number(x: float) -> float:
        return torch.tensor(x, dtype=dtype).item()

    gains = advantage >= 0
    ends = torch.tensor([b for b in bounds(clip, gains, length, number) if math.isfinite(b)] + [0.0], dtype=dtype)
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    special = [*ends, *ends.nextafter(ends + 1), *ends.nextafter(ends - 1), smallest / 2, -smallest / 2, 1e4, -1e4]
    special += [89.0, -104.0, 20.0, largest, -largest]
    if parent_level == "token":  # the mean of TRL's sequence level is none of infinite numbers
        special += [math.inf, -math.inf]
    x = number(float(data.draw(st.sampled_from(special) | st.floats(-1e4, 1e4) | st.floats(-3, 3))))

    logps = torch.full((1, 8), logp, dtype=dtype).requires_grad_()
    mask = (torch.arange(8) < length).to(dtype).unsqueeze(0)
    # as such, not rounded: the sign of the smallest numbers counts
    advantages = torch.tensor([advantage], dtype=torch.float64)
    clipped = clip_log_weight(torch.tensor([[x]], dtype=dtype), advantages, mask.long(), clip)  # as rollouts have it
    low, high = bounds(clip, gains, length, number)
    assert (clipped.above.item(), clipped.below.item()) == (x > high, x < low)

    ratio = ratios_of(logps, clipped, mask, parent_level).expand(1, 8)
    (gradient,) = torch.autograd.grad((ratio * mask).sum(), logps)
    assert ratio.isfinite().all()
    bounded, keeps = by_the_table(x, gains, clip, length, number)
    if not keeps:
        assert not gradient.any()  # exactly 0
    elif parent_level == "token":
        assert torch.equal(gradient, ratio.detach() * mask)  # never less than the weight
    # log w passes through log π − (log π − log w), and a mean over tokens: half an ulp of each number on the way
    size = abs(logp) + min(abs(bounded), 1e3) + 4
    close(ratio.detach(), torch.full_like(ratio, math.exp(bounded)), 10 * torch.finfo(dtype).eps * size, smallest)
    if keeps:
        close(gradient, ratio.detach() * mask, 10 * torch.finfo(dtype).eps, smallest)
    assert clipped.log_weight.item() <= LOG_WEIGHT_BOUND


# Loss and gradient of a micro-batch


@searched(120)
@given(batches(), RULES, st.sampled_from(list(NORMALISERS)), st.sampled_from(["token", "sequence"]))
def test_loss_and_gradient_are_the_formulas(batch, rule, loss_type, parent_level):
    level, clip = rule
    assume(not lies_on_a_bound(batch, level, clip, 1e-13))
    if level in ("token", "prefix") or batch.advantages.dim() == 2:
        parent_level = "token"
    loss, gradient = loss_of(batch, level, clip, loss_type, parent_level=parent_level)
    value, coefficient = written_out(batch, level, clip)
    lengths = batch.mask.sum(-1)
    by = NORMALISERS[loss_type](lengths, len(lengths), int(lengths.sum())).unsqueeze(1)
    assert loss.isfinite()
    # r = log π − old carries half an ulp of 1e4, relative to the weight
    close(loss, -(value / by).sum(), 1e-11, scale=float((value / by).abs().sum()))
    close(gradient, -coefficient / by, 1e-11)
    assert not gradient[coefficient == 0].any()  # exactly 0 where the rule says so
    assert gradient[(coefficient / by).abs() > 1e-290].all()  # and nowhere else


@searched(60)
@given(batches(width=32), RULES)
def test_float32_gives_what_float64_gives(batch, rule):
    level, clip = rule
    batch = batch.map(lambda value: value.float())  # both start from the same numbers
    exact = batch.map(lambda value: value.double())
    # Half an ulp per subtraction and addition of r, and one of log π and log w in anchoring, relative to the weight
    size = 8 * log_ratio_of(exact).abs().sum(-1, keepdim=True) + batch.logps.abs().max() + LOG_WEIGHT_BOUND
    tolerance = torch.finfo(torch.float32).eps * size  # (B, 1)
    assume(not lies_on_a_bound(exact, level, clip, float(tolerance.max())))
    loss, gradient = loss_of(batch, level, clip)
    exact_loss, exact_gradient = loss_of(exact, level, clip)
    assert loss.dtype == gradient.dtype == torch.float32
    tiny = torch.finfo(torch.float32).smallest_normal
    assert ((gradient - exact_gradient).abs() <= 2 * tolerance * exact_gradient.abs() + tiny).all()
    parts = written_out(exact, level, clip)[0].abs() / (len(size) * T)
    assert abs(loss - exact_loss) <= (2 * tolerance * parts).sum() + tiny


@searched(40)
@given(batches(), RULES, st.randoms(use_true_random=False))
def test_the_order_of_responses_does_not_matter(batch, rule, random):
    order = random.sample(range(len(batch.mask)), len(batch.mask))
    loss, gradient = loss_of(batch, *rule)
    moved = batch.map(lambda value: value[order])
    moved_loss, moved_gradient = loss_of(moved, *rule)
    close(moved_loss, loss, scale=float(gradient.abs().sum()) + float(loss.abs()))
    close(moved_gradient, gradient[order])
    assert torch.equal(rows_of(moved, *rule), rows_of(batch, *rule)[order])
    close_metrics(rows_of(moved, *rule), rows_of(batch, *rule))


@searched(40)
@given(batches(), RULES, st.integers(1, 3), st.sampled_from([math.nan, math.inf, -math.inf, 1e4, 0.0]), st.data())
def test_columns_of_padding_change_nothing_whatever_stands_there(batch, rule, columns, garbage, data):
    assume(not lies_on_a_bound(batch, *rule, 1e-13))
    width = batch.mask.size(1)
    columns = data.draw(st.permutations(range(width + columns)))[:columns]
    real = [column for column in range(width + len(columns)) if column not in columns]

    def padded(value, filling):
        if value.dim() == 1:
            return value
        wide = torch.full((len(value), width + len(columns)), filling, dtype=value.dtype)
        wide[:, real] = value
        return wide

    # a model scores padding, too, and finitely; what is behind it in the rollout may be anything
    wide = Batch(
        padded(batch.logps, -5.0), padded(batch.old, garbage), padded(batch.advantages, 9.0), padded(batch.mask, 0.0)
    )
    loss, gradient = loss_of(batch, *rule)
    wide_loss, wide_gradient = loss_of(wide, *rule)
    close(wide_loss, loss, scale=float(gradient.abs().sum()) + float(loss.abs()))
    close(wide_gradient[:, real], gradient)
    assert not wide_gradient[:, columns].any()
    log_ratio = log_ratio_of(replace(wide, logps=padded(batch.logps, garbage)))
    assert torch.equal(log_ratio, padded(log_ratio_of(batch), 0.0))
    close_metrics(rows_of(wide, *rule), rows_of(batch, *rule))


@searched(40)
@given(batches(), RULES, st.floats(1e-3, 1e3))
def test_a_positive_factor_of_the_advantages_scales_the_gradient_alone(batch, rule, factor):
    scaled = replace(batch, advantages=batch.advantages * factor)
    assume(torch.equal(scaled.advantages.sign(), batch.advantages.sign()))  # no underflow
    before, after = clipped_weight(batch, *rule), clipped_weight(scaled, *rule)
    assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in vars(before))
    (loss, gradient), (scaled_loss, scaled_gradient) = loss_of(batch, *rule), loss_of(scaled, *rule)
    close(scaled_gradient, factor * gradient, 1e-14, scale=1e-300)
    size = float(gradient.abs().sum()) + float(loss.abs())
    close(scaled_loss, factor * loss, scale=factor * size)
    assert torch.equal(rows_of(scaled, *rule), rows_of(batch, *rule))


@searched(40)
@given(batches(), RULES, st.sampled_from(list(NORMALISERS)), st.data())
def test_micro_batches_add_up_to_the_mini_batch(batch, rule, loss_type, data):
    rows = len(batch.mask)
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1))) if rows > 1 else [])
    parts = [batch.map(itemgetter(slice(*ends))) for ends in pairwise([0, *cuts, rows])]
    loss, gradient = loss_of(batch, *rule, loss_type)
    of_all = rows, int(batch.mask.sum())
    losses, gradients = zip(*(loss_of(part, *rule, loss_type, of_all) for part in parts), strict=True)
    close(sum(losses), loss, scale=float(gradient.abs().sum()) + float(loss.abs()))
    close(torch.cat(gradients), gradient)
    assert torch.equal(torch.cat([rows_of(part, *rule) for part in parts]), rows_of(batch, *rule))


@searched(40)
@given(batches(per_token=False), RULES)
def test_one_advantage_per_response_is_the_same_as_one_per_token(batch, rule):
    per_token = replace(batch, advantages=batch.advantages.unsqueeze(1).expand_as(batch.mask).contiguous())
    for one, other in zip(loss_of(batch, *rule), loss_of(per_token, *rule), strict=True):
        assert torch.equal(one, other)
    close_metrics(rows_of(per_token, *rule), rows_of(batch, *rule))
    narrow, wide = clipped_weight(batch, *rule), clipped_weight(per_token, *rule)
    for name, value in vars(wide).items():
        assert torch.equal(getattr(narrow, name).expand_as(value), value), name


@searched(40)
@given(batches(), RULES, st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_identical_policies_have_the_weight_1_exactly(batch, rule, on_policy, dtype):
    logps = batch.logps.to(dtype)
    old = None if on_policy else logps.clone()
    log_ratio = token_log_ratio(logps, old, batch.mask)
    assert log_ratio.dtype == torch.promote_types(dtype, torch.float32)
    assert not log_ratio.any()
    log_weight = log_importance_weight(log_ratio, batch.mask, rule[0])
    clipped = clip_log_weight(log_weight, batch.advantages, batch.mask, rule[1])
    assert not clipped.log_weight.any()
    assert clipped.keeps_gradient.all()
    assert not (clipped.above | clipped.below).any()
    leaf = logps.float().requires_grad_()
    for parent_level in ("token", "sequence"):
        ratio = ratios_of(leaf, clipped, batch.mask, parent_level)
        assert torch.equal(ratio, torch.ones_like(ratio))
    (gradient,) = torch.autograd.grad(ratios_of(leaf, clipped, batch.mask).sum(), leaf)
    assert torch.equal(gradient, torch.ones_like(gradient))
    metrics = ratio_metrics(ratio_statistics(log_ratio, clipped, batch.advantages, batch.mask))
    assert all(metrics[name] == 0 for name in metrics if name != "ess")
    assert not metrics or metrics["ess"] == pytest.approx(1, abs=1e-14)

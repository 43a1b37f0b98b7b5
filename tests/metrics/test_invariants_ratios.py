"""Invariants of the ratio metrics, searched by hypothesis."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from searching import (
    RULES,
    batches,
    bounds,
    lengths_at,
    lies_on_a_bound,
    log_weights,
    rows_of,
    searched,
    tensors,
)

from tic_grpo_trl.metrics.ratios import effective_sample_size, merge_steps, ratio_metrics


LOG_WEIGHTS = st.integers(1, 8).flatmap(
    lambda n: tensors((n,), st.floats(-3, 3) | st.floats(-1e4, 1e4) | st.sampled_from([0.0, 1e4, -1e4]))
)


@searched(60)
@given(LOG_WEIGHTS, st.floats(-1e4, 1e4), st.integers(2, 4), st.randoms(use_true_random=False))
def test_effective_sample_size(log_weights, shift, copies, random):
    """Between 1/n and 1; unchanged by a common factor of the weights, by their order, by copies of all of them."""
    ess, n = effective_sample_size(log_weights).item(), len(log_weights)
    rounding = 1e-14
    assert (1 - rounding) / n <= ess <= 1 + rounding
    x = [value - max(log_weights.tolist()) for value in log_weights.tolist()]
    by_definition = math.fsum(map(math.exp, x)) ** 2 / n / math.fsum(math.exp(2 * value) for value in x)
    assert ess == pytest.approx(by_definition, rel=1e-13)
    moved = log_weights + shift  # rounds to half an ulp of 2e4, which is 4e-12 of a weight
    assert effective_sample_size(moved).item() == pytest.approx(ess, rel=2e-11)
    order = random.sample(range(n), n)
    assert effective_sample_size(log_weights[order]).item() == pytest.approx(ess, rel=1e-13)
    assert effective_sample_size(log_weights.repeat(copies)).item() == pytest.approx(ess, rel=1e-13)
    assert effective_sample_size(log_weights[:1]).item() == pytest.approx(1, rel=1e-14)
    single = effective_sample_size(log_weights.float()).item()
    assert single == pytest.approx(effective_sample_size(log_weights.float().double()).item(), rel=1e-5)


@searched(60)
@given(batches(), RULES)
def test_metrics_are_finite_ordered_and_shares(batch, rule):
    rows = rows_of(batch, *rule)
    metrics = ratio_metrics(rows)
    assert all(math.isfinite(value) for value in metrics.values())
    counts = batch.mask.any(dim=1)
    assert bool(metrics) == bool(counts.any())
    if not metrics:
        return
    names = ("log_min", "log_q05", "log_q50", "log_q95", "log_max")
    assert all(metrics[a] <= metrics[b] for a, b in itertools.pairwise(names))
    assert metrics["log_min"] - 1e-9 <= metrics["log_mean"] <= metrics["log_max"] + 1e-9
    assert 0 <= metrics["log_std"] <= (metrics["log_max"] - metrics["log_min"]) / 2 + 1e-9
    assert (1 - 1e-14) / counts.sum() <= metrics["ess"] <= 1 + 1e-14
    shares = {name: value for name, value in metrics.items() if name.startswith(("clip", "share"))}
    assert all(0 <= value <= 1 for value in shares.values())
    # the shares of clipped weights, from the formulas
    if batch.advantages.dim() == 1 and not lies_on_a_bound(batch, *rule, 1e-6):
        level, clip = rule
        outside = {"clip_high_pos": [], "clip_high_neg": [], "clip_low_neg": []}
        for ratios, a in zip(batch.log_ratios, batch.advantages.tolist(), strict=True):
            lengths, weights = lengths_at(ratios, level), log_weights(ratios, level)
            limits = [(x, *bounds(clip, a >= 0, lengths[t])) for t, x in weights.items()]
            if a and weights:
                for name in ["clip_high_pos"] if a > 0 else ["clip_high_neg", "clip_low_neg"]:
                    found = [x < low if "low" in name else x > high for x, low, high in limits]
                    outside[name].append(sum(found) / len(found))
        by_hand = {name: sum(values) / len(values) for name, values in outside.items() if values}
        assert {name: shares[name] for name in shares if "clip" in name} == pytest.approx(by_hand, rel=1e-6)


@searched(25)
@given(st.lists(st.tuples(st.none() | st.integers(1, 3), batches()), min_size=1, max_size=4), RULES, st.randoms())
def test_the_metrics_of_steps_do_not_depend_on_their_order(steps, rule, random):
    of_steps = [(k, rows_of(batch, *rule)) for k, batch in steps]
    merged = merge_steps(of_steps)
    moved = merge_steps(random.sample(of_steps, len(of_steps)))
    assert moved == {name: pytest.approx(value, rel=1e-12, abs=1e-12) for name, value in merged.items()}
    for name in ("log_min", "log_max", "log_mean"):
        every = [ratio_metrics(rows)[name] for _, rows in of_steps if ratio_metrics(rows)]
        assert not every or min(every) - 1e-9 <= merged[name] <= max(every) + 1e-9
    kinds = {k for k, rows in of_steps if k and ratio_metrics(rows)}
    assert {name.split("/")[0] for name in merged if "/" in name} == {f"inner_{k}" for k in kinds}

"""The rules for whole mini-batches against values by hand and by plain loops."""

import math

import pytest
import torch

from tic_grpo_trl.loss.mini_batch_rules import adaptive_cap


def cap_of(weights, responses=None) -> float:
    """The cap of one weight per response, as a number."""
    log_weight = torch.tensor(weights, dtype=torch.float64).log().unsqueeze(1)
    return math.exp(adaptive_cap(log_weight, torch.ones(len(weights), 3)))


def error(weights, cap, responses) -> float:
    """(E[w − u]² + E[u²]/n) / E[u]² with u = min(w, c)."""
    u = [min(w, cap) for w in weights]
    mean = math.fsum(u) / len(u)
    return ((math.fsum(weights) / len(u) - mean) ** 2 + math.fsum(x * x for x in u) / len(u) / responses) / mean**2


def test_equal_weights_are_not_capped():
    assert cap_of([1.0] * 5) == 1.0


def test_a_cap_by_hand():
    # cap 1: u = 1, 1: ((5 − 1)² + 1/2)/1 = 16.5; cap 9: u = 1, 9: (0 + 41/2)/25 = 0.82
    assert cap_of([1.0, 9.0]) == pytest.approx(9)
    # of 100 responses one has weight 9: cap 1: 0.08² + 0.01 = 0.0164; cap 9: 0.018/1.08² = 0.0154
    assert cap_of([1.0] * 99 + [9.0]) == pytest.approx(9)
    # weight 50: cap 1: 0.49² + 0.01 = 0.25; cap 50: 0.2599/1.49² = 0.117; a candidate of 3 between them
    weights = [1.0] * 98 + [3.0, 50.0]
    assert cap_of(weights) == pytest.approx(min((1.0, 3.0, 50.0), key=lambda cap: error(weights, cap, 100)))


@pytest.mark.parametrize("drift", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [2, 16, 200])
def test_no_other_weight_is_a_better_cap(drift, n):
    weights = (drift * torch.randn(n, generator=torch.Generator().manual_seed(n)).double()).exp().tolist()
    best = min(error(weights, candidate, n) for candidate in weights)
    assert error(weights, cap_of(weights), n) == pytest.approx(best, rel=1e-9)


def test_weights_of_tokens_count_where_the_mask_does():
    log_weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    mask = (torch.arange(4) < torch.tensor([[1], [2], [3], [4], [4], [2]])).long()
    weights = log_weight.exp()[mask.bool()].tolist()
    cap = math.exp(adaptive_cap(log_weight.masked_fill(mask == 0, 1e4), mask))
    assert error(weights, cap, 6) == pytest.approx(min(error(weights, candidate, 6) for candidate in weights))


def test_weights_far_apart_have_a_finite_cap():
    cap = adaptive_cap(torch.tensor([[1e4], [0.0], [-1e4]]), torch.ones(3, 2))
    assert cap.isfinite()
    assert cap.dtype == torch.float32
    assert cap.dim() == 0

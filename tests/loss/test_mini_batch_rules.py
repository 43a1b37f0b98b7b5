"""The rules for whole mini-batches against values by hand and by plain loops."""

import math

import pytest
import torch

from tic_grpo_trl.loss.mini_batch_rules import adaptive_cap, minimum_variance_advantages


KAPPA = 20.0


def estimated_error(weights, advantages, lengths, cap, kappa=KAPPA) -> float:
    """e(c) = ((1 − S)² + κ/B·N)/S², S = Σ A²·u/Σ A²·w, N = Σ A²·L·u²/Σ A²·L·w, with u = min(w, c)."""
    items = list(zip(weights, advantages, lengths, strict=True))
    share = math.fsum(a**2 * min(w, cap) for w, a, _ in items) / math.fsum(a**2 * w for w, a, _ in items)
    noise = math.fsum(a**2 * n * min(w, cap) ** 2 for w, a, n in items) / math.fsum(a**2 * n * w for w, a, n in items)
    return ((1 - share) ** 2 + kappa / len(items) * noise) / share**2


def cap_of(weights, advantages, lengths, kappa=KAPPA) -> float:
    log_weight = torch.tensor(weights, dtype=torch.float64).log().unsqueeze(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return math.exp(adaptive_cap(log_weight, torch.tensor(advantages), mask, kappa))


def test_equal_weights_are_not_capped():
    assert cap_of([1.0] * 5, [1.0, -1.0, 0.5, -0.5, 1.0], [3, 1, 2, 3, 3]) == 1.0


def test_a_cap_by_hand():
    # w = 1, 1, 3 with A² = 1 and L = 1. Cap 1: S = 3/5, N = 3/5. Cap 3: S = 1, N = 11/5.
    # κ = 3: ((2/5)² + 3/5)/(3/5)² = 2.11 against 11/5 = 2.2. κ = 2: (0.16 + 0.4)/0.36 = 1.56 against 1.47.
    assert cap_of([1.0, 1.0, 3.0], [1.0, -1.0, 1.0], [1, 1, 1], kappa=3.0) == 1.0
    assert cap_of([1.0, 1.0, 3.0], [1.0, -1.0, 1.0], [1, 1, 1], kappa=2.0) == pytest.approx(3.0)


@pytest.mark.parametrize("drift", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [2, 16, 200])
def test_no_other_weight_is_a_better_cap(drift, n):
    generator = torch.Generator().manual_seed(n)
    weights = (drift * torch.randn(n, generator=generator).double()).exp().tolist()
    advantages = torch.randn(n, generator=generator).tolist()
    lengths = torch.randint(1, 9, (n,), generator=generator).tolist()
    items = weights, advantages, lengths
    best = min(estimated_error(*items, candidate) for candidate in weights)
    assert estimated_error(*items, cap_of(*items)) == pytest.approx(best, rel=1e-9)


def test_the_larger_the_mini_batch_the_higher_the_cap():
    weights = (torch.randn(64, generator=torch.Generator().manual_seed(0)).double()).exp().tolist()
    caps = [cap_of(weights * copies, [1.0] * 64 * copies, [4] * 64 * copies) for copies in (1, 8, 64)]
    assert caps[0] < caps[1] < caps[2]


def test_weights_of_tokens_count_where_the_mask_does():
    """S takes the mean of u over a response, N the sum of u²."""
    generator = torch.Generator().manual_seed(0)
    log_weight, advantages = torch.randn(6, 4, generator=generator).double(), torch.randn(6, generator=generator)
    lengths = torch.tensor([1, 2, 3, 4, 4, 2])
    mask = (torch.arange(4) < lengths.unsqueeze(1)).long()
    found = math.exp(adaptive_cap(log_weight.masked_fill(mask == 0, 1e4), advantages, mask, KAPPA))
    tokens = [
        (log_weight[i, t].exp().item(), advantages[i].item() ** 2, int(lengths[i]))
        for i in range(6)
        for t in range(int(lengths[i]))
    ]

    def error(cap):
        share = math.fsum(a / n * min(w, cap) for w, a, n in tokens) / math.fsum(a / n * w for w, a, n in tokens)
        noise = math.fsum(a * min(w, cap) ** 2 for w, a, _ in tokens) / math.fsum(a * w for w, a, _ in tokens)
        return ((1 - share) ** 2 + KAPPA / 6 * noise) / share**2

    assert found == pytest.approx(min((w for w, *_ in tokens), key=error))


@pytest.mark.parametrize("log_weights", [[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4], [89.0, 89.0, 1.0]])
def test_weights_far_apart_have_a_finite_cap(log_weights):
    cap = adaptive_cap(torch.tensor(log_weights).unsqueeze(1), torch.ones(3), torch.ones(3, 2), KAPPA)
    assert cap.isfinite()
    assert cap.dtype == torch.float32
    assert cap.dim() == 0


# The baseline of minimum variance


def test_a_baseline_by_hand():
    # k = w²·‖g‖² = 1, 4·2, 1·3 with rewards 1, 0, 2: b_1 = (0·8 + 2·3)/11, b_2 = (1·1 + 2·3)/4, b_3 = (1·1 + 0)/9
    values = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 1.0]).log(), torch.tensor([1.0, 2.0, 3.0])
    found = minimum_variance_advantages(*values, torch.tensor([7, 7, 7]))
    torch.testing.assert_close(found, torch.tensor([1 - 6 / 11, -7 / 4, 2 - 1 / 9]))


def test_groups_do_not_mix_and_a_shift_of_their_rewards_cancels():
    generator = torch.Generator().manual_seed(0)
    rewards, log_weights, norms = (torch.randn(12, generator=generator) for _ in range(3))
    groups = torch.tensor([3, 0, 1, 3, 0, 1, 3, 0, 1, 3, 0, 1])
    found = minimum_variance_advantages(rewards, log_weights, norms.exp(), groups)
    for i in range(12):
        others = [j for j in range(12) if j != i and groups[j] == groups[i]]
        k = [math.exp(2 * log_weights[j] + norms[j]) for j in others]
        baseline = sum(k_j * float(rewards[j]) for k_j, j in zip(k, others, strict=True)) / sum(k)
        assert float(found[i]) == pytest.approx(float(rewards[i]) - baseline, rel=1e-5, abs=1e-6)
    shifted = minimum_variance_advantages(rewards - 2.0 * groups, log_weights, norms.exp(), groups)
    torch.testing.assert_close(shifted, found, rtol=1e-5, atol=1e-5)


def test_a_response_without_others_keeps_its_advantage_and_far_weights_stay_finite():
    rewards, log_weights = torch.tensor([0.5, 1.0, -1.0, 2.0]), torch.tensor([0.0, 1e4, -1e4, 3.0])
    found = minimum_variance_advantages(rewards, log_weights, torch.ones(4), torch.tensor([0, 1, 1, 1]))
    assert found[0] == 0.5
    # the others of the first have e^3 and e^-1e4, of the second and the third e^1e4 alone
    torch.testing.assert_close(found[1:], torch.tensor([1.0 - 2.0, -1.0 - 1.0, 2.0 - 1.0]))

"""The rules for whole mini-batches against values by hand and by plain loops."""

import math

import pytest
import torch

from tic_grpo_trl.loss.mini_batch_rules import adaptive_cap, minimum_variance_advantages


KAPPA = 20.0


def estimated_error(weights, advantages, lengths, cap, kappa=KAPPA) -> float:
    """e(c) = ((1 − S)² + κ/n·N)/S², S = Σ A²·u/Σ A²·w, N = Σ A²·L·u²/Σ A²·L·w, with u = min(w, c) and E[w] = 1."""
    signal = [(w, a**2) for w, a in zip(weights, advantages, strict=True)]
    noise = [(w, a**2 * n) for w, a, n in zip(weights, advantages, lengths, strict=True)]
    return error_of(signal, noise, cap, kappa / sum(a != 0 for a in advantages))


def error_of(signal, noise, cap, kappa_by_n) -> float:
    """The same of pairs of a weight and its factor."""
    of_signal, of_noise = (
        min(math.fsum(x * w for w, x in pairs), math.fsum(x for _, x in pairs)) for pairs in (signal, noise)
    )
    share = min(1.0, math.fsum(x * min(w, cap) for w, x in signal) / of_signal)
    return ((1 - share) ** 2 + kappa_by_n * math.fsum(x * min(w, cap) ** 2 for w, x in noise) / of_noise) / share**2


def cap_of(weights, advantages, lengths, kappa=KAPPA) -> float:
    log_weight = torch.tensor(weights, dtype=torch.float64).log().unsqueeze(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return math.exp(adaptive_cap(log_weight, torch.tensor(advantages), mask, kappa))


def test_equal_weights_are_not_capped():
    assert cap_of([1.0] * 5, [1.0, -1.0, 0.5, -0.5, 1.0], [3, 1, 2, 3, 3]) == 1.0


def test_a_cap_by_hand():
    # w = .25, .25, 1.75 with A² = 1 and L = 1, so Σ w = 2.25. Cap .25: S = 1/3, N = .1875/2.25 = 1/12.
    # Cap 1: S = 2/3, N = 1.125/2.25 = 1/2. Cap 1.75: S = 1, N = 3.1875/2.25 = 1.417.
    # κ/n = 1/3: 4.25, 0.625, 0.472. κ/n = 2: 5.5, 2.5, 2.83. κ/n = 20: 19, 22.75, 28.3.
    for kappa, best in ((1.0, 1.75), (6.0, 1.0), (60.0, 0.25)):
        assert cap_of([0.25, 0.25, 1.75], [1.0, -1.0, 1.0], [1, 1, 1], kappa) == pytest.approx(best)
        # the same with a fourth response, whose A is 0
        assert cap_of([0.25, 0.25, 1.75, 9.0], [1.0, -1.0, 1.0, 0.0], [1] * 4, kappa) == pytest.approx(best)


def test_a_single_large_weight_is_capped():
    """Σ w would be 1,099, of which every cap but the largest keeps little; but E[w] is 1."""
    assert cap_of([1.0] * 99 + [1000.0], [1.0] * 100, [1] * 100) == 1.0


@pytest.mark.parametrize("drift", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [2, 16, 200])
def test_no_other_weight_is_a_better_cap(drift, n):
    generator = torch.Generator().manual_seed(n)
    weights = (drift * torch.randn(n, generator=generator).double()).exp().tolist()
    advantages = torch.randn(n, generator=generator).tolist()
    lengths = torch.randint(1, 9, (n,), generator=generator).tolist()
    items = weights, advantages, lengths
    best = min(estimated_error(*items, candidate) for candidate in [*weights, 1.0])
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

    signal, noise = [(w, a / n) for w, a, n in tokens], [(w, a) for w, a, _ in tokens]
    best = min([1.0, *(w for w, *_ in tokens)], key=lambda cap: error_of(signal, noise, cap, KAPPA / 6))
    assert found == pytest.approx(best)


@pytest.mark.parametrize("far", [30.0, 597.0, 700.0, 1e4])
def test_a_weight_far_above_all_others_is_capped(far):
    log_weight = torch.tensor([*[0.0] * 63, far]).unsqueeze(1)
    cap = adaptive_cap(log_weight, torch.ones(64), torch.ones(64, 2), KAPPA)
    assert cap == 0
    assert cap.dtype == torch.float32
    assert cap.dim() == 0


@pytest.mark.parametrize("log_weights", [[3.0], [3.5, 4.0], [6.0 + 0.1 * i for i in range(8)]])
def test_weights_that_are_all_large_are_capped_at_one(log_weights):
    n = len(log_weights)
    assert adaptive_cap(torch.tensor(log_weights).unsqueeze(1), torch.ones(n), torch.ones(n, 2), KAPPA) == 0


def test_weights_that_vanish_are_left_as_they_are():
    cap = adaptive_cap(torch.full((3, 1), -1e4), torch.ones(3), torch.ones(3, 2), KAPPA)
    assert cap >= -1e4
    assert cap.isfinite()


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

"""Efficiencies against every mini-batch listed, autograd, brute force and TRL's own weight."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from trl import GRPOTrainer

from research.theory.ascent import starting_point
from research.theory.efficiency import (
    CISPO,
    NOISE_SCALE,
    RULES,
    Case,
    cap_of_the_first_form,
    cap_of_the_rule,
    chain_case,
    coefficients,
    held,
    held_trajectories,
    moments,
    rule_on_own_sample,
    squared_norms,
    tree_case,
)
from research.theory.efficiency_grid import QUICK_SIZE, measure_efficiencies
from research.theory.efficiency_report import compared, domains, nearness, rows_of_nearness
from research.theory.estimators import package_algorithm
from research.theory.policy import Responses, enumerate_responses, probabilities, score_sum, token_logps
from tic_grpo_trl.config import TICGRPOConfig
from tic_grpo_trl.loss.mini_batch_rules import adaptive_cap


EXACT = 1e-12
TIES = ("last_token", "prefix")


@pytest.fixture(scope="module", params=TIES)
def small(request) -> Case:
    """7 trajectories of at most two tokens, so that every mini-batch of two responses can be listed."""
    return tree_case(3, 2, request.param, arbitrary=False, seed=3, drift=0.6)


@pytest.fixture(scope="module", params=TIES)
def medium(request) -> Case:
    return tree_case(3, 5, request.param, arbitrary=True, seed=1, drift=0.6)


def gradients_of(case: Case, weights: torch.Tensor) -> torch.Tensor:
    """(N, R·V) ∇ Σ_t w_t·A·log π_θ(o_t) of each response, by autograd, w constant."""
    theta = case.theta.clone().requires_grad_()
    losses = (weights * case.advantages.unsqueeze(-1) * token_logps(theta, case.responses)).sum(-1)
    return torch.stack([torch.autograd.grad(loss, theta, retain_graph=True)[0].flatten() for loss in losses])


def listed_efficiency(case: Case, update, n: int) -> float:
    """η over every ordered mini-batch of n responses; `update` gives (R·V,) of their indices."""
    first, second = 0.0, 0.0
    for index in itertools.product(range(len(case.probability)), repeat=n):
        chosen = torch.tensor(index)
        p, vector = float(case.probability[chosen].prod()), update(chosen)
        first, second = first + p * vector, second + p * float(vector @ vector)
    gradient = case.gradient.flatten()
    return float((first @ gradient) ** 2 / (gradient @ gradient * second))


@pytest.mark.parametrize("rule", ["tic_grpo", "grpo", "seq_tis", "seq_mis", "cispo", "prefix held at 2", "vespo"])
def test_efficiency_is_that_of_every_mini_batch(small, rule):
    log_ratio = small.log_ratio
    total, ratio = log_ratio.sum(-1, keepdim=True).exp().expand_as(log_ratio), log_ratio.exp()
    gains = small.advantages.unsqueeze(-1) >= 0
    phi = GRPOTrainer.get_gamma_weights(small.advantages.unsqueeze(-1), log_ratio, small.responses.mask, None)
    weights = {
        "tic_grpo": total * (total <= 1.28),
        "grpo": ratio * torch.where(gains, ratio <= 1.28, ratio >= 0.8),
        "seq_tis": total.clamp(max=2),
        "seq_mis": total * (total <= 3),
        "cispo": ratio.clamp(max=5),
        "prefix held at 2": log_ratio.cumsum(-1).exp().clamp(max=2),
        "vespo": phi.expand_as(ratio),
    }[rule]
    each = gradients_of(small, weights)
    expected = listed_efficiency(small, lambda chosen: each[chosen].mean(0), 2)
    found = moments(small, RULES[rule](small))
    assert found.efficiency(2) == pytest.approx(expected, rel=1e-10)
    mean = small.probability @ each
    assert found.bias == pytest.approx(
        float((mean - small.gradient.flatten()).norm() / small.gradient.norm()), rel=1e-9
    )
    spread = small.probability @ each.square().sum(-1) - mean @ mean
    assert found.variance == pytest.approx(float(spread / small.gradient.square().sum()), rel=1e-9)


def test_the_uncapped_trajectory_weight_is_unbiased_and_no_rule_beats_the_gradient(medium):
    assert moments(medium, RULES["trajectory, no cap"](medium)).bias < EXACT
    for rule in RULES.values():
        found = moments(medium, rule(medium))
        assert 0 <= found.efficiency(64) < found.efficiency(4096) <= 1 + EXACT


def test_the_scale_of_an_update_does_not_matter(medium):
    factors = RULES["seq_tis"](medium)
    one, other = moments(medium, factors), moments(medium, 1e-3 * factors)
    assert other.efficiency(64) == pytest.approx(one.efficiency(64), rel=EXACT)
    assert other.bias != pytest.approx(one.bias)


def test_gspo_weighs_a_response_by_its_inverse_length():
    case = tree_case(3, 4, "last_token", arbitrary=True, seed=1, drift=0.0)
    case = replace(case, theta=case.theta_old)
    lengths = case.responses.lengths
    inverse = 1 / lengths / (case.probability @ (1 / lengths))
    expected = (inverse * case.advantages).unsqueeze(-1) * case.responses.mask
    torch.testing.assert_close(RULES["gspo"](case), expected)


def test_many_caps_at_once_are_the_package_s_clip(medium):
    caps = (0.5, 1.28, 3.0, 1e8)
    for cap, found in zip(caps, held_trajectories(medium, caps), strict=True):
        other = moments(medium, coefficients(medium, held("trajectory", cap)))
        for one, two in zip(found.totals(), other.totals(), strict=True):
            assert one == pytest.approx(two, rel=1e-10)


def test_squared_norms_by_autograd(small):
    factors = torch.rand(small.responses.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = factors * small.responses.mask
    constant = replace(small, advantages=torch.ones_like(small.advantages))
    expected = gradients_of(constant, factors).square().sum(-1)
    torch.testing.assert_close(squared_norms(small.theta, small.responses, factors), expected)


@pytest.mark.parametrize("level", ["trajectory", "prefix"])
@pytest.mark.parametrize("n", [64, 4096])
def test_the_rule_s_cap_by_brute_force(medium, level, n):
    """The criterion, with expectations under the behaviour policy, at every weight as a cap."""
    weights = medium.log_weight(level).exp().expand_as(medium.responses.mask)
    mask, lengths = medium.responses.mask, medium.responses.lengths
    squares = medium.probability * medium.advantages.square()

    def kept(u):
        return float(squares @ ((u * mask).sum(-1) / lengths))

    def noise(u):
        return float(squares @ (u * mask).sum(-1))

    one = torch.ones_like(weights)
    of_signal, of_noise = min(kept(weights), kept(one)), min(noise(weights), noise(one))

    def criterion(cap):
        share = min(1.0, kept(weights.clamp(max=cap)) / of_signal)
        return ((1 - share) ** 2 + NOISE_SCALE / n * noise(weights.clamp(max=cap) ** 2) / of_noise) / share**2

    best = min([1.0, *weights[mask.bool()].unique().tolist()], key=criterion)
    assert float(cap_of_the_rule(medium, n, level).exp()) == pytest.approx(best, rel=1e-9)


def test_the_first_form_by_brute_force(medium):
    weights, p, n = medium.log_weight("trajectory").exp().squeeze(-1), medium.probability, 64

    def criterion(cap):
        u = weights.clamp(max=cap)
        return float(((p @ (weights - u)) ** 2 + p @ u.square() / n) / (p @ u) ** 2)

    best = min([1.0, *weights.tolist()], key=criterion)
    assert float(cap_of_the_first_form(medium, n).exp()) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("level", ["trajectory", "prefix"])
def test_zero_advantage_responses_do_not_count(medium, level):
    twice = Responses(*(torch.cat([getattr(medium.responses, f)] * 2) for f in Responses.__dataclass_fields__))
    padded = replace(
        medium,
        responses=twice,
        probability=torch.cat([medium.probability] * 2),
        advantages=torch.cat([medium.advantages, torch.zeros_like(medium.advantages)]),
    )
    assert cap_of_the_rule(padded, 64, level) == cap_of_the_rule(medium, 64, level)


def test_a_mini_batch_with_zero_advantage_responses_has_the_efficiency_of_the_others(small):
    """They only scale the update, so that they say nothing about the best cap."""
    each = gradients_of(small, small.log_weight("trajectory").exp().clamp(max=2).expand_as(small.log_ratio))
    alone = listed_efficiency(small, lambda chosen: each[chosen].sum(0) / 2, 2)
    with_others = listed_efficiency(small, lambda chosen: each[chosen].sum(0) / 5, 2)
    assert with_others == pytest.approx(alone, rel=EXACT)


def test_the_baseline_of_vcpo_has_the_least_second_moment(medium):
    uncapped = replace(medium, advantages=medium.advantages)
    weight = medium.log_weight("trajectory").exp()
    best = RULES["vcpo"](medium)
    shift = (best / (weight.clamp(max=8) * medium.responses.mask)).nan_to_num()[:, 0] - medium.advantages
    torch.testing.assert_close(shift, shift[0].expand_as(shift))  # one baseline

    def noise(baseline):
        advantages = uncapped.advantages + baseline
        factors = weight * advantages.unsqueeze(-1) * medium.responses.mask
        return moments(medium, factors).totals()[2]

    assert noise(float(shift[0])) < min(noise(float(shift[0]) + step) for step in (-0.01, 0.01, -float(shift[0])))


def test_a_sample_estimates_the_complete_list():
    task, theta_old = starting_point(4, 0)
    task = replace(task, start=task.start[:1])
    sample = chain_case(4, 0, 0.3, 20000)
    responses = enumerate_responses(task)
    exact = replace(
        sample,
        responses=responses,
        probability=probabilities(theta_old, responses, 1),
        advantages=responses.rewards - probabilities(theta_old, responses, 1) @ responses.rewards,
        sampled=False,
    )
    for rule in ("seq_tis", "cispo", "prefix, no cap", "grpo_no_is"):
        estimate, true = moments(sample, RULES[rule](sample)), moments(exact, RULES[rule](exact))
        for n in (64, 512):
            error = estimate.standard_error(n)
            assert 0 < error < 0.1
            assert abs(estimate.efficiency(n) - true.efficiency(n)) < 4 * error
        assert true.standard_error(64) == 0


def test_squares_of_sampled_means_are_unbiased():
    exact = tree_case(3, 2, "last_token", arbitrary=False, seed=3, drift=0.6)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        index = torch.multinomial(exact.probability, 40, replacement=True, generator=generator)
        uniform, advantages = torch.full((40,), 1 / 40, dtype=torch.float64), exact.advantages[index]
        responses = exact.responses[index]
        sample = replace(exact, responses=responses, probability=uniform, advantages=advantages, sampled=True)
        found.append(moments(sample, RULES["seq_tis"](sample)).totals())
    found, expected = torch.tensor(found, dtype=torch.float64), moments(exact, RULES["seq_tis"](exact)).totals()
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - torch.tensor(expected, dtype=torch.float64)).abs() < 4 * error).all()


@pytest.mark.parametrize("level", ["trajectory", "prefix"])
def test_the_rule_on_its_own_sample_against_every_mini_batch(small, level):
    log_weight, mask = small.log_weight(level), small.responses.mask
    cap_1 = NOISE_SCALE

    def update(chosen):
        cap = adaptive_cap(log_weight[chosen], small.advantages[chosen], mask[chosen], cap_1)
        factors = torch.minimum(log_weight[chosen], cap).exp() * small.advantages[chosen].unsqueeze(-1) * mask[chosen]
        return score_sum(small.theta, small.responses[chosen], factors).flatten() / len(chosen)

    expected = listed_efficiency(small, update, 3)
    found, error = rule_on_own_sample(small, 3, level, batches=800, seed=0)
    assert 0 < error < 0.1 * expected
    assert abs(found - expected) < 4 * error


def test_what_the_rules_do_without_drift():
    """All weights are 1, so that rules which differ by their weight alone agree, and any cap below 1 only scales."""
    case = tree_case(3, 4, "last_token", arbitrary=False, seed=0, drift=0.0)
    names = ("tic_grpo", "seq_tis", "seq_mis", "ctpo", "cispo", "vespo", "grpo", "prefix held at 2", "grpo_no_is")
    values = [moments(case, RULES[name](case)).efficiency(64) for name in names]
    assert values == pytest.approx([values[0]] * len(names), rel=1e-9)
    half = moments(case, coefficients(case, held("trajectory", 0.5))).efficiency(64)
    assert half == pytest.approx(values[0], rel=1e-9)
    assert float(cap_of_the_rule(case, 64, "trajectory")) == pytest.approx(0, abs=1e-9)


def test_the_package_s_adaptive_mode_reads_the_cap(medium):
    log_cap = torch.tensor(math.log(1.5), dtype=torch.float64)
    found = coefficients(medium, package_algorithm("tic_grpo_adaptive"), log_cap)
    torch.testing.assert_close(found, coefficients(medium, held("trajectory", 1.5)))


def test_the_noise_scale_is_the_package_s_default():
    assert TICGRPOConfig.gradient_noise_scale == NOISE_SCALE


def test_cispo_is_the_token_weight_held_at_its_cap(medium):
    expected = medium.log_ratio.exp().clamp(max=5) * medium.advantages.unsqueeze(-1) * medium.responses.mask
    torch.testing.assert_close(coefficients(medium, CISPO), expected)


@pytest.fixture(scope="module")
def found():
    return measure_efficiencies(replace(QUICK_SIZE, policies=1, drifts=(0.3, 1.0)))


def test_exact_claims_of_the_grid(found):
    assert len(found.checks) == 4
    assert all(check.holds for check in found.checks)


def test_cells_of_the_grid(found):
    kinds = {cell.kind for cell in found.cells}
    assert len(kinds) == 5  # parameters shared or not, rewards of pairs or arbitrary, and the sampled chain
    assert len(found.cells) == 10
    for cell in found.cells:
        cap, best = cell.best(64)
        assert cell.held["trajectory"][cap][64] == [best]
        assert cell.efficiency("seq_tis", 64) == pytest.approx(cell.held["trajectory"][2.0][64][0], rel=1e-9)
        assert cell.efficiency("prefix held at 2", 512) == pytest.approx(cell.held["prefix"][2.0][512][0], rel=1e-9)
        assert all(value > 0.8 * best for value in cell.adaptive["trajectory"][64])
        assert cell.caps["trajectory"][64] <= cell.caps["trajectory"][512]


def test_percentages_of_the_report(found):
    """A constant cap is measured against the best one, which itself has 100 % in every cell."""
    best = {id(cell): cell.best(64)[1] for cell in found.cells}
    listed = [cell for cell in found.cells if not cell.sampled and cell.drift == 1.0]
    expected = sum(cell.efficiency("cispo", 64) / best[id(cell)] for cell in listed) / len(listed)
    assert compared(found, "cispo", 1.0, 64) == pytest.approx(expected)
    for name, where in domains(found).items():
        cells = [cell for cell in found.cells if where(cell)]
        near = nearness(found, "trajectory", (64,), lambda cell, n: [best[id(cell)]], where)
        assert near == (pytest.approx((1, 1, 1, 1)) if cells else None), name
    ns, value = rows_of_nearness(found, "trajectory")["constant 5"]
    assert ns == found.size.ns
    assert value(found.cells[0], 512) == found.cells[0].held["trajectory"][5.0][512]

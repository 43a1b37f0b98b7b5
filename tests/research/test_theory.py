"""The theory's exact values against hand computation, finite differences and plain loops."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from research.compared import COMPARED
from research.theory import estimators
from research.theory.__main__ import main
from research.theory.ascent import Setting, ascend, initial_step_ratio, slope, starting_point, theorem_algorithms
from research.theory.decomposition import (
    IDENTITIES,
    advantages_of,
    decompose,
    expected_group_std,
    printed_residual,
    relative_residual,
    true_moments,
    update_by_autograd,
)
from research.theory.estimators import (
    bias_of_algorithm,
    expected_group_update,
    expected_update,
    group_advantages,
    listed,
    multisets,
    package_algorithm,
)
from research.theory.experiments import QUICK, Check, measure, sampled_groups, small_list
from research.theory.figures import FIGURES
from research.theory.martingale import property_4_1_cases, second_moments
from research.theory.minibatch import second_step_bias
from research.theory.policy import (
    STOP,
    Task,
    chain_task,
    drifted_policy,
    enumerate_responses,
    expected_reward,
    policy_gradient,
    probabilities,
    random_policy,
    sample_responses,
    score_sum,
    token_logps,
    tree_task,
)
from tic_grpo_trl.algorithms import FAMILY
from tic_grpo_trl.objective import anchored_old_logps, clip_log_weight, log_importance_weight, token_log_ratio


EXACT = 1e-12
DRIFTS = (0.0, 0.05, 0.3, 1.0, 2.0)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def large():
    """19,682 trajectories over two prompts, rows tied over positions."""
    task = tree_task(4, 8, 2)
    return listed(task, enumerate_responses(task), random_policy(task, 1))


@pytest.fixture(scope="module")
def small():
    """31 trajectories of one prompt, so that every group can be listed."""
    return small_list()


def hand_task() -> Task:
    """Stop or `a`, at most two tokens. [stop] is worth 1, [a, stop] 0 and [a, a] ½."""
    next_state = torch.tensor([[2, 1], [3, 4], [2, 2], [3, 3], [4, 4]])
    reward = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    return Task(next_state, torch.tensor([0, 1, 0, 0, 0]), torch.tensor([0]), reward, horizon=2)


def test_hand_computed_value_and_gradient():
    task = hand_task()
    theta = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64)  # stop with ¼, then with ½
    responses = enumerate_responses(task)
    assert responses.tokens.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert responses.lengths.tolist() == [1, 2, 2]
    torch.testing.assert_close(probabilities(theta, responses, 1), torch.tensor([0.25, 0.375, 0.375]).double())
    assert float(expected_reward(task, theta)) == pytest.approx(0.25 * 1 + 0.375 * 0.5, abs=1e-15)
    # π(stop)·π(a)·(difference of the values): ¼·¾·(1 − ¼), and ¾·½·½·(0 − ½)
    by_hand = torch.tensor([[9 / 64, -9 / 64], [-3 / 32, 3 / 32]], dtype=torch.float64)
    torch.testing.assert_close(policy_gradient(task, theta), by_hand, rtol=0, atol=1e-15)


def test_hand_computed_expected_update_of_token_weights():
    """π_old uniform, so P_old = ½, ¼, ¼ and μ = ⅝; w(stop) = ½, w(a) = 3/2 in the first row, 1 in the second."""
    task = hand_task()
    theta = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64)
    behaviour = listed(task, enumerate_responses(task), torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(behaviour.mean, torch.full((3,), 0.625, dtype=torch.float64))
    # row 0: score of stop is (¾, −¾), of a (−¼, ¼); row 1: (½, −½) and (−½, ½)
    first = 0.5 * 0.5 * 0.75 * 0.375 + 0.25 * 1.5 * -0.25 * (-0.625 - 0.125)
    second = 0.25 * 0.5 * -0.625 - 0.25 * 0.5 * -0.125
    by_hand = torch.tensor([[first, -first], [second, -second]], dtype=torch.float64) / 2  # T = 2
    algorithm = package_algorithm("grpo2").unclipped()
    torch.testing.assert_close(expected_update(behaviour, theta, algorithm), by_hand, rtol=0, atol=1e-15)
    # the cap 1.28 removes the first token wherever it is `a` (weight 3/2)
    first = 0.5 * 0.5 * 0.75 * 0.375
    by_hand[0] = torch.tensor([first, -first]) / 2
    torch.testing.assert_close(
        expected_update(behaviour, theta, package_algorithm("grpo2")), by_hand, rtol=0, atol=1e-15
    )


def test_every_trajectory_once(large):
    responses = large.responses
    assert len(responses.rewards) == 2 * ((3**8 - 1) // 2 + 3**8) >= 10**4
    rows = torch.cat([responses.prompts[:, None], torch.where(responses.mask.bool(), responses.tokens, -1)], 1)
    assert len(rows.unique(dim=0)) == len(rows)
    ends_with_stop = responses.tokens.gather(1, responses.lengths.long()[:, None] - 1).squeeze(1) == STOP
    assert bool((ends_with_stop | (responses.lengths == 8)).all())
    assert int(((responses.tokens == STOP) & responses.mask.bool()).sum(1).max()) == 1
    for drift in DRIFTS:
        p = probabilities(drifted_policy(large.theta_old, drift, 2), responses, 2)
        assert abs(float(p.sum()) - 1) <= EXACT


@pytest.mark.parametrize("task", [tree_task(4, 5, 2), tree_task(3, 4, 1, tie="prefix"), chain_task(6)])
def test_dynamic_programming_is_enumeration(task):
    responses = enumerate_responses(task)
    theta = torch.stack([random_policy(task, seed) for seed in (1, 2)])
    p = probabilities(theta, responses, len(task.start))
    assert torch.allclose(expected_reward(task, theta), p @ responses.rewards, rtol=0, atol=1e-14)
    by_scores = score_sum(theta, responses, (p * responses.rewards).unsqueeze(-1) * responses.mask)
    assert relative(policy_gradient(task, theta), by_scores) <= EXACT


def test_gradient_by_finite_differences():
    task = chain_task(16)
    theta, step = random_policy(task, 3), 1e-5
    gradient = policy_gradient(task, theta)
    for row, token in itertools.product(range(theta.shape[0]), range(theta.shape[1])):
        nudge = torch.zeros_like(theta)
        nudge[row, token] = step
        slope_ = (expected_reward(task, theta + nudge) - expected_reward(task, theta - nudge)) / (2 * step)
        assert float(gradient[row, token]) == pytest.approx(float(slope_), abs=1e-10)


def test_sampler_draws_from_the_policy(small):
    count = 40_000
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(count, small.task.horizon, generator=generator, dtype=torch.float64)
    theta = drifted_policy(small.theta_old, 1.0, 2)
    sample = sample_responses(small.task, theta, torch.zeros(count, dtype=torch.long), uniforms)
    same = (sample.tokens[:, None] == small.responses.tokens) & (sample.mask[:, None] == small.responses.mask)
    which = same.all(-1).double()
    assert bool((which.sum(1) == 1).all())
    p = probabilities(theta, small.responses, 1)
    assert float(((which.mean(0) - p).abs() / (p * (1 - p) / count).sqrt()).max()) < 4.5
    torch.testing.assert_close(sample.rewards, small.responses.rewards[which.argmax(1)])


def test_unclipped_tic_is_the_policy_gradient_at_the_current_policy(large):
    for drift in DRIFTS:
        theta = drifted_policy(large.theta_old, drift, 2)
        for name in ("tic_grpo", "grpo_traj_is"):
            assert bias_of_algorithm(large, theta, package_algorithm(name).unclipped()).relative_error <= EXACT, (
                name,
                drift,
            )


@pytest.mark.parametrize("name", ["grpo", "grpo2", "gspo", "grpo_no_is", "tic_grpo_v2"])
def test_the_other_arms_are_not(large, name):
    found = bias_of_algorithm(large, drifted_policy(large.theta_old, 0.3, 2), package_algorithm(name).unclipped())
    assert found.relative_error > 0.05
    assert found.direction_error > 0.05
    assert found.direction_error <= found.relative_error + EXACT


def test_without_drift_only_the_normaliser_and_the_scale_bias(large):
    for name in ("grpo", "grpo2", "grpo_no_is", "tic_grpo"):
        assert bias_of_algorithm(large, large.theta_old, package_algorithm(name)).relative_error <= EXACT, name
    for name in ("gspo", "tic_grpo_v2", "tic_grpo_released"):
        assert bias_of_algorithm(large, large.theta_old, package_algorithm(name)).relative_error > 0.01, name


def test_the_clip_biases_tic(large):
    """Far enough out, 1 + ε_high is reached, and what it removes is missing."""
    theta = drifted_policy(large.theta_old, 0.3, 2)
    assert bias_of_algorithm(large, theta, package_algorithm("tic_grpo")).direction_error > 0.1


@pytest.mark.parametrize("name", FAMILY)
def test_coefficients_are_the_gradient_of_the_anchored_loss(small, name):
    """The same update through `anchored_old_logps` and autograd, as the trainer's loss computes it."""
    algorithm, responses = package_algorithm(name), small.responses
    theta = drifted_policy(small.theta_old, 0.3, 2).requires_grad_()
    advantages = responses.rewards - small.mean
    logps, old = token_logps(theta, responses), token_logps(small.theta_old, responses)
    log_weight = log_importance_weight(token_log_ratio(logps, old, responses.mask), responses.mask, algorithm.level)
    clipped = clip_log_weight(log_weight, advantages, responses.mask, algorithm.clip)
    loss = ((logps - anchored_old_logps(logps, clipped)).exp() * advantages[:, None] * responses.mask).sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    theta = theta.detach()
    coefficients = estimators.token_coefficients(theta, small.theta_old, responses, advantages, algorithm)
    assert float((score_sum(theta, responses, coefficients) - gradient).norm()) <= EXACT


def test_multisets_weigh_like_ordered_groups(small):
    index, weight = multisets(small, 3)
    assert float(weight.sum()) == pytest.approx(1, abs=EXACT)
    p, row = small.p_old, {tuple(group): w for group, w in zip(index.tolist(), weight.tolist(), strict=True)}
    assert row[(2, 2, 2)] == pytest.approx(float(p[2] ** 3))
    assert row[(1, 2, 2)] == pytest.approx(float(3 * p[1] * p[2] ** 2))
    assert row[(0, 1, 2)] == pytest.approx(float(6 * p[0] * p[1] * p[2]))


@pytest.mark.parametrize("name", ["tic_grpo", "grpo", "tic_grpo_v2", "tic_grpo_truncated", "tic_grpo_capped"])
def test_group_expectation_by_plain_loops(name):
    """Ordered pairs, one at a time, from per-token autograd scores: normaliser, group mean, group std, clip."""
    task = tree_task(3, 2, 1, seed=4)
    behaviour = listed(task, enumerate_responses(task), random_policy(task, 1))
    theta, algorithm = drifted_policy(behaviour.theta_old, 0.4, 2), package_algorithm(name)
    responses, n = behaviour.responses, len(behaviour.p_old)
    ratios = (token_logps(theta, responses) - token_logps(behaviour.theta_old, responses)).exp()
    leaf = theta.clone().requires_grad_()
    table = token_logps(leaf, responses)
    lengths = [int(length) for length in responses.lengths]
    scores = [
        [torch.autograd.grad(table[i, t], leaf, retain_graph=True)[0] for t in range(lengths[i])] for i in range(n)
    ]
    total = torch.zeros_like(theta)
    for pair in itertools.product(range(n), repeat=2):
        rewards = [float(responses.rewards[i]) for i in pair]
        mean = sum(rewards) / 2
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards))  # TRL's divisor G − 1 = 1
        for i, reward in zip(pair, rewards, strict=True):
            a = (reward - mean) / (std + 1e-4) if algorithm.scale_rewards == "group" else reward - mean
            if algorithm.loss_type == "dapo":
                normaliser = 1 / sum(lengths[j] for j in pair)
            else:
                normaliser = (1 / lengths[i] if algorithm.loss_type == "grpo" else 1 / task.horizon) / 2
            for t in range(lengths[i]):
                w = float(ratios[i].prod() if algorithm.level == "trajectory" else ratios[i, t])
                if algorithm.clip.mode == "capped":
                    kept, w = True, min(w, 1.28)
                elif algorithm.clip.mode == "up_only" or a >= 0:
                    kept = w <= 1.28
                else:
                    kept, w = w >= 0.8, min(w, 1.28) if algorithm.clip.mode == "truncated" else w
                probability = float(behaviour.p_old[pair[0]] * behaviour.p_old[pair[1]])
                total += probability * normaliser * kept * w * a * scores[i][t]
    assert relative(expected_group_update(behaviour, theta, algorithm, 2), total) <= EXACT


def test_keeping_the_gradient_at_the_cap_is_nearer_to_the_gradient_than_stopping_it(large):
    for drift in (0.1, 0.3, 1.0):
        theta = drifted_policy(large.theta_old, drift, 2)
        capped, stopped = (
            bias_of_algorithm(large, theta, package_algorithm(n)) for n in ("tic_grpo_capped", "tic_grpo")
        )
        assert 0 < capped.direction_error < 0.6 * stopped.direction_error


@pytest.mark.parametrize("size", [2, 3])
def test_group_mean_shrinks_the_update(small, size):
    """A sample that is in its own mean: E over groups is (G−1)/G of the i.i.d. form, clip or no clip."""
    theta = drifted_policy(small.theta_old, 0.3, 2)
    for algorithm in (
        package_algorithm("tic_grpo"),
        package_algorithm("tic_grpo").unclipped(),
        package_algorithm("grpo2"),
    ):
        expected = expected_update(small, theta, algorithm) * (size - 1) / size
        assert relative(expected_group_update(small, theta, algorithm, size), expected) <= EXACT
    unclipped = expected_group_update(small, theta, package_algorithm("tic_grpo").unclipped(), size)
    gradient = policy_gradient(small.task, theta) * (size - 1) / size / small.task.horizon
    assert relative(unclipped, gradient) <= EXACT


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.5]])
    assert group_advantages(rewards).tolist() == [[0.5, -0.5, 0.0]]
    scaled = group_advantages(rewards, "group")
    assert scaled[0, 0].item() == pytest.approx(0.5 / (0.5 + 1e-4))  # divisor G − 1: σ_G = ½
    scaled = group_advantages(rewards, "group", correction=0)
    assert scaled[0, 0].item() == pytest.approx(0.5 / (math.sqrt(1 / 6) + 1e-4))


@pytest.mark.parametrize("key", list(IDENTITIES))
def test_decomposition_is_an_identity_for_every_group(large, key):
    identity = IDENTITIES[key]
    groups, centred = sampled_groups(large, 60, 8)
    moments, advantages = true_moments(large, identity, 8), advantages_of(groups, identity)
    for drift in DRIFTS:
        theta = drifted_policy(large.theta_old, drift, 2)
        arguments = (theta, large.theta_old, groups, advantages)
        update = update_by_autograd(*arguments, identity, large.task.horizon)
        terms = decompose(*arguments, centred, identity, moments, large.task.horizon)
        assert relative_residual(update, terms) <= EXACT
        assert float(update.norm()) > 0.01
        assert ("gradient error" in terms) == (identity.level == "token")
        assert ("length error" in terms) == identity.per_response
        assert float(terms["sampling error"].norm()) > 0.01
        if drift >= 1:
            assert float(terms["clip error"].norm()) > 0.01
        if identity.scaled:
            assert printed_residual(*arguments, centred, identity, moments, large.task.horizon) > 0.1


@pytest.mark.parametrize("key", list(IDENTITIES))
def test_leading_term_is_an_unbiased_policy_gradient(small, key):
    """At θ_old for token weights, at θ for trajectory weights: v2 below Eq. 7 and Eq. 11, v5 A.1–A.3."""
    identity, size = IDENTITIES[key], 2
    theta = drifted_policy(small.theta_old, 0.7, 2)
    index, weight = multisets(small, size)
    groups = small.responses[index]
    centred = (small.responses.rewards - small.mean)[index]
    moments = true_moments(small, identity, size)
    terms = decompose(
        theta, small.theta_old, groups, advantages_of(groups, identity), centred, identity, moments, small.task.horizon
    )
    expected = torch.tensordot(weight, terms["policy gradient"], 1) * moments.std / moments.constant
    at = theta if identity.level == "trajectory" else small.theta_old
    assert relative(expected, policy_gradient(small.task, at)) <= EXACT


def test_moments_of_the_decompositions(small):
    index, weight = multisets(small, 3)
    by_groups = weight @ small.responses.rewards[index].std(-1, correction=0)
    assert expected_group_std(small, 3) == pytest.approx(float(by_groups), abs=EXACT)
    p, lengths = small.p_old, small.responses.lengths
    assert true_moments(small, IDENTITIES["v2_eq7"], 3).constant == pytest.approx(float(p @ (1 / lengths)))
    assert true_moments(small, IDENTITIES["v5_a1"], 3).constant == pytest.approx(1 / float(p @ lengths))
    assert true_moments(small, IDENTITIES["v5_a2"], 3).constant == 1 / 4


def test_property_4_1_and_where_it_stops(large):
    for drift in (0.3, 1.0):
        theta = drifted_policy(large.theta_old, drift, 2)
        log_ratio = token_logps(theta, large.responses) - token_logps(large.theta_old, large.responses)
        cases = property_4_1_cases(theta, large.responses, large.p_old, log_ratio)
        assert abs(cases["scores, own measure"].gap) <= EXACT
        assert cases["scores, own measure"].summed > 1
        assert abs(cases["token weights"].gap) <= EXACT  # Σ_a π_old·w·∇log π_θ = 0
        for broken in ("scores, old measure", "token weights, up-only", "trajectory weight"):
            assert abs(cases[broken].gap) > 1e-3, broken
        # v5 §4.4: the capped weight is bounded, so the update costs at most (1 + ε_high)·Σ E‖g_t‖²
        capped = cases["trajectory weight, up-only"].of_sum
        assert 0 < capped <= 1.28 * cases["scores, own measure"].summed


def test_second_moments_by_hand():
    """π = ½ everywhere: ‖g_t‖² = ½, and the two rows never share a coordinate."""
    task = hand_task()
    theta = torch.zeros(2, 2, dtype=torch.float64)
    responses = enumerate_responses(task)
    found = second_moments(theta, responses, probabilities(theta, responses, 1), 2 * responses.mask)
    assert found.of_sum == pytest.approx(4 * (0.5 * 0.5 + 0.5 * 1.0))
    assert found.summed == pytest.approx(4 * (0.5 * 0.5 + 0.5 * 1.0))


def test_whole_groups_keep_the_second_mini_batch_unbiased():
    task = tree_task(3, 2, 2)
    found = second_step_bias(listed(task, enumerate_responses(task), random_policy(task, 1)), learning_rate=1.0)
    assert found["by prompt"] <= EXACT
    assert found["through the groups"] > 5e-3
    assert found["reuse"] > 5e-3


def test_first_step_of_the_ascent_is_exact_and_k_1_makes_the_ratios_1():
    algorithms = theorem_algorithms()
    first = ascend(Setting(8, steps=1, inner_steps=1, seeds=2, tasks=(0,)), algorithms)
    task, start = starting_point(8)
    torch.testing.assert_close(first.gap, policy_gradient(task, start).square().sum().expand(5, 2))
    outcome = ascend(Setting(8, steps=8, inner_steps=1, seeds=2, tasks=(0, 1)), algorithms)
    names = list(algorithms)
    assert outcome.gap.shape == (5, 4)
    torch.testing.assert_close(outcome.gap[names.index("GRPO2")], outcome.gap[names.index("TIC-GRPO")])
    assert float(outcome.clipped.max()) == 0
    off_policy = ascend(Setting(8, steps=8, inner_steps=4, rate=8.0, seeds=2, tasks=(0,)), algorithms)
    assert not torch.allclose(off_policy.gap[names.index("GRPO2")], off_policy.gap[names.index("TIC-GRPO")])
    assert float(off_policy.clipped.max()) > 0


def test_ascent_climbs_and_repeats():
    setting = Setting(8, steps=24, seeds=2, tasks=(0,))
    outcome = ascend(setting, theorem_algorithms())
    assert float(outcome.gain.min()) > 0.02
    assert float((outcome.final_gap / outcome.gap).max()) < 1
    torch.testing.assert_close(ascend(setting, theorem_algorithms()).gap, outcome.gap, rtol=0, atol=0)


def test_matched_step_undoes_the_normaliser():
    algorithms = theorem_algorithms()
    task, start = starting_point(16)
    ratio = dict(zip(algorithms, initial_step_ratio(task, start, list(algorithms.values())), strict=True))
    assert ratio["GRPO2"] == ratio["TIC-GRPO"] == 1
    assert ratio["GRPO (1/|o|)"] < ratio["GRPO (DAPO)"] < 1  # E[1/|o|] > 1/E|o| > 1/T


def test_slope_of_a_power_law():
    xs = [1.0, 2.0, 4.0, 8.0]
    values = torch.tensor([[3 * x**0.5, x**-1.0] for x in xs], dtype=torch.float64).unsqueeze(-1).expand(-1, -1, 3)
    mean, spread = slope(xs, values)
    torch.testing.assert_close(mean, torch.tensor([0.5, -1.0], dtype=torch.float64))
    assert float(spread.max()) < 1e-12


@pytest.fixture(scope="module")
def quick_results():
    return measure(QUICK)


def test_command_writes_figures_and_report(tmp_path, capsys, monkeypatch, quick_results):
    sizes = []
    monkeypatch.setattr("research.theory.__main__.measure", lambda scale: sizes.append(scale) or quick_results)
    main(["--output_dir", str(tmp_path), "--quick"])
    assert sizes == [QUICK]
    assert "25 of 25 exact claims hold" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"theory.md", *FIGURES}
    report = (tmp_path / "theory.md").read_text()
    assert all(f"]({name})" in report for name in FIGURES)
    assert all(f"`{name}`" in report for name in COMPARED)
    assert "| **no** |" not in report
    assert "nan" not in report


def test_command_fails_where_a_claim_does(tmp_path, monkeypatch, quick_results):
    broken = replace(quick_results, checks=[*quick_results.checks, Check("two is one", value=1e-11)])
    monkeypatch.setattr("research.theory.__main__.measure", lambda scale: broken)
    monkeypatch.setattr("research.theory.__main__.FIGURES", {})
    with pytest.raises(SystemExit, match="two is one"):
        main(["--output_dir", str(tmp_path)])
    assert "| two is one | 1.0e-11 | 1e-12 | **no** |" in (tmp_path / "theory.md").read_text()

"""The theory of carry-over against hand computation, plain loops and every run of a small engine."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from searching import searched

from research.theory.carry_over import (
    CONSTANT,
    GROUP_MEAN,
    INTERRUPTIONS,
    group_mean,
    mixture,
    moving_run,
    probability_if_foreseen,
    release,
    versions_apart,
)
from research.theory.estimators import listed
from research.theory.experiments import small_list
from research.theory.generation_steps import most_groups, simulate
from research.theory.policy import Task, enumerate_responses, policy_gradient, random_policy, token_logps, tree_task
from research.theory.release import Engine, Written, draw_lengths, draw_tokens, every_rollout, learn
from research.theory.several_versions import after, after_ends, all_groups, group_update, recorded_logps


EXACT = 1e-12


@pytest.fixture(scope="module")
def small():
    """31 trajectories of one prompt."""
    return small_list()


@pytest.fixture(scope="module")
def tiny():
    """7 trajectories of one prompt."""
    task = tree_task(3, 2, seed=3)
    return listed(task, enumerate_responses(task), random_policy(task, 1))


def stop_or_go_on(stop: float):
    """Responses of one token with probability `stop`, else of two."""
    task = Task(
        torch.tensor([[2, 1], [3, 4], [2, 2], [3, 3], [4, 4]]),
        torch.tensor([0, 1, 0, 0, 0]),
        torch.tensor([0]),
        torch.tensor([0.0, 0.0, 1.0, 0.0, 0.5], dtype=torch.float64),
        horizon=2,
    )
    theta = torch.tensor([[0.0, math.log(1 / stop - 1)], [0.0, 0.0]], dtype=torch.float64)
    return listed(task, enumerate_responses(task), theta)


# the steps of an engine


def test_one_slot_serves_the_older_response_first():
    first, second = simulate([[5], [1]], slots=1, prompts_per_rollout=1, max_carry_over=1)
    assert (first.batches, first.groups, first.late, first.occupancy) == ([(5, 1)], [0], [0], 1.0)
    assert (second.batches, second.groups, second.lengths, second.ages) == ([(1, 1)], [1], [1], [0])


def test_two_slots_release_the_short_response_and_go_on_with_the_long_one():
    early, late = simulate([[5], [1]], slots=2, prompts_per_rollout=1, max_carry_over=1)
    assert (early.batches, early.groups, early.late, early.lengths, early.ages) == ([(1, 2)], [1], [-1], [1], [0])
    assert (early.sampled, early.occupancy, early.prefilled_again) == (2, 1.0, 0)
    assert (late.batches, late.groups, late.late, late.lengths) == ([(4, 1)], [0], [1], [5])
    assert (late.ages, late.spans, late.prefilled_again, late.occupancy) == ([1], [1], 1, 0.5)


def test_a_group_at_the_bound_is_waited_for_and_a_complete_one_costs_no_steps():
    found = simulate([[5], [1], [2], [1]], slots=2, prompts_per_rollout=1, max_carry_over=1)
    assert [each.groups for each in found] == [[1], [0], [2], [3]]
    assert found[1].batches == [(2, 2), (2, 1)]  # group 2 has ended after two steps, group 0 is due
    assert (found[2].batches, found[2].steps, found[2].occupancy) == ([], 0, 1.0)
    assert (found[2].ages, found[2].spans) == ([1], [0])
    later = simulate([[5], [1], [2], [1]], slots=2, prompts_per_rollout=1, max_carry_over=2)
    assert [each.groups for each in later] == [[1], [2], [0], [3]]
    assert [each.batches for each in later] == [[(1, 2)], [(2, 2)], [(1, 2), (1, 1)], []]
    assert [each.prefilled_again for each in later] == [0, 1, 3, 0]


def test_without_carry_over_slots_are_refilled_and_everything_is_waited_for():
    (found,) = simulate([[3, 1], [1, 1]], slots=2, prompts_per_rollout=2, max_carry_over=0, oversampling=2.0)
    assert found.batches == [(1, 2), (1, 2), (1, 2)]
    assert (found.steps, found.occupancy, found.lengths, found.ages) == (3, 1.0, [3, 1, 1, 1], [0] * 4)
    waiting = simulate([[5], [1], [2]], slots=4, prompts_per_rollout=1, max_carry_over=0, oversampling=3.0)
    assert [each.steps for each in waiting] == [5, 1, 2]


def test_a_group_of_two_is_released_as_a_whole():
    first, second = simulate([[1, 4], [2, 2]], slots=4, prompts_per_rollout=1, max_carry_over=1)
    assert (first.groups, first.batches) == ([1], [(1, 4), (1, 3)])
    assert (second.groups, second.lengths, second.ages, second.spans) == ([0], [1, 4], [1, 1], [0, 1])
    assert (second.batches, second.prefilled_again) == ([(2, 1)], 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ([], 1, 1, 1),
        ([[1], [1, 2]], 1, 1, 1),
        ([[1]] * 3, 1, 2, 1),
        ([[0]], 1, 1, 1),
        ([[1]], 0, 1, 1),
        ([[1]], 1, 1, -1),
        ([[1]], 1, 1, 1, 0.5),
    ],
)
def test_lengths_that_make_no_run_are_refused(arguments):
    with pytest.raises(ValueError, match=r"multiple of prompts_per_rollout|at least 1"):
        simulate(*arguments)


@st.composite
def runs(draw):
    prompts, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    groups = st.lists(st.integers(1, 30), min_size=size, max_size=size)
    count = prompts * draw(st.integers(1, 8))
    lengths = draw(st.lists(groups, min_size=count, max_size=count))
    bound, oversampling = draw(st.integers(0, 4)), draw(st.floats(1, 4, width=32))
    return lengths, draw(st.integers(1, 20)), prompts, bound, oversampling


@searched(300)
@given(runs())
def test_guarantees_of_the_release_rule(run):
    lengths, slots, prompts, bound, oversampling = run
    found = simulate(*run)
    size, most = len(lengths[0]), most_groups(prompts, bound, oversampling)
    assert sorted(number for each in found for number in each.groups) == list(range(len(lengths)))
    assert sum(each.sampled for each in found) == sum(map(sum, lengths))
    for call, each in enumerate(found):
        assert len(each.groups) == prompts
        assert each.lengths == [length for number in each.groups for length in lengths[number]]
        assert each.late == [call - number // prompts for number in each.groups]
        assert max(each.late) <= bound
        assert all(running <= slots for _, running in each.batches)
        ages = zip(each.spans, each.ages, strict=True)
        assert all(0 <= span <= age <= bound + math.ceil(oversampling) - 1 for span, age in ages)
        # groups are begun in order: number n in call c leaves n + 1 − c·P of them in the pool
        begun = [call - age for age in each.ages]
        assert all(each.groups[i // size] + 1 - begun[i] * prompts <= most for i in range(len(begun)))
        assert bound or each.ages == [0] * len(each.ages)


@searched(100)
@given(runs())
def test_one_rollout_in_flight_is_waiting(run):
    lengths, slots, prompts, bound, _ = run
    waiting = simulate(lengths, slots, prompts, 0)
    assert simulate(lengths, slots, prompts, bound, 1.0) == waiting
    assert [each.groups for each in waiting] == [[*range(k, k + prompts)] for k in range(0, len(lengths), prompts)]


# responses of several versions


def test_recorded_probabilities_by_hand():
    """Version 0 stops with ½ at the first token, version 1 with ¼ and with ¾ at the second."""
    behaviour = stop_or_go_on(0.5)
    second = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]], dtype=torch.float64)
    policies, responses = torch.stack([behaviour.theta_old, second]), behaviour.responses
    assert responses.tokens.tolist() == [[0, 0], [1, 0], [1, 1]]
    found = recorded_logps(policies, responses, after(1)(responses)).sum(-1).exp()
    torch.testing.assert_close(found, torch.tensor([1 / 2, 1 / 2 * 3 / 4, 1 / 2 * 1 / 4], dtype=torch.float64))


@pytest.mark.parametrize("name", INTERRUPTIONS)
@pytest.mark.parametrize("drift", [0.05, 0.3, 1.0])
def test_only_what_was_recorded_gives_the_gradient(small, name, drift):
    found = mixture(small, INTERRUPTIONS[name], drift)
    assert found.total_probability == pytest.approx(1, abs=EXACT)
    assert found.worst_expectation <= EXACT
    assert found.errors.pop("what was recorded") <= EXACT
    assert 0.1 < found.carried < 0.95
    assert len(found.errors) == 3
    assert min(found.errors.values()) > drift / 10


def test_an_interruption_that_foresees_the_length_is_no_sampling(small):
    assert abs(probability_if_foreseen(small, 0.3) - 1) > 0.01


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("drift", [0.05, 0.3, 1.0])
def test_members_that_do_not_interrupt_one_another_only_shrink_the_update(small, size, drift):
    found = group_mean(small, drift, size, None)
    assert found.total_probability == pytest.approx(1, abs=EXACT)
    assert found.added <= EXACT


@pytest.mark.parametrize(("size", "ended"), [(2, 1), (3, 1), (3, 2)])
def test_the_term_of_members_that_interrupt_one_another(small, size, ended):
    assert group_mean(small, 0.0, size, ended).added <= EXACT
    for drift in (0.05, 0.3, 1.0):
        found = group_mean(small, drift, size, ended)
        assert found.total_probability == pytest.approx(1, abs=EXACT)
        assert found.added > 1e-3
        assert found.unexplained <= EXACT


def test_group_update_against_a_plain_loop(tiny):
    """Every pair, tokens one by one: both write with version 0 until one has ended, then the other with version 1."""
    policies = versions_apart(tiny.theta_old, 0.5, 3)
    theta = policies[-1].clone().requires_grad_()
    groups = all_groups(tiny, 2)
    found, total = group_update(theta.detach(), policies[:2], groups, after_ends(groups, 1))
    rows, tokens, rewards = (getattr(tiny.responses, name).tolist() for name in ("rows", "tokens", "rewards"))
    lengths = tiny.responses.lengths.int().tolist()
    objective, probabilities = 0.0, 0.0
    for i, j in itertools.product(range(len(rewards)), repeat=2):
        logps = []
        for k in (i, j):
            version = [int(t >= min(lengths[i], lengths[j])) for t in range(lengths[k])]
            logps.append(
                sum(policies[v].log_softmax(-1)[rows[k][t], tokens[k][t]] for t, v in enumerate(version))  # recorded
            )
        both = math.exp(sum(logps))
        probabilities += both
        for k, recorded in zip((i, j), logps, strict=True):
            now = sum(theta.log_softmax(-1)[rows[k][t], tokens[k][t]] for t in range(lengths[k]))
            objective = objective + both * (now - recorded).exp() * (rewards[k] - (rewards[i] + rewards[j]) / 2) / 2
    (expected,) = torch.autograd.grad(objective, theta)
    assert probabilities == pytest.approx(1, abs=EXACT)
    assert float(total) == pytest.approx(1, abs=EXACT)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


# which groups a rollout holds


def lengths_of(found):
    """For each rollout: lengths of a group -> expected number of such groups."""
    by_length = []
    for groups in found:
        counts: dict[tuple[int, ...], float] = {}
        for responses, count in groups.items():
            key = tuple(len(each.tokens) for each in responses)
            counts[key] = counts.get(key, 0) + count
        by_length.append(counts)
    return by_length


def test_two_rollouts_by_hand():
    """The first holds a response of two tokens only if neither of two has one: (1 − p)², and the second p²."""
    behaviour = stop_or_go_on(0.3)
    found = lengths_of(every_rollout(Engine(), 2, draw_lengths(behaviour), keeps_plan=True))
    assert found[0] == pytest.approx({(1,): 1 - 0.7**2, (2,): 0.7**2}, abs=EXACT)
    assert found[1] == pytest.approx({(1,): 0.3**2, (2,): 1 - 0.3**2}, abs=EXACT)


@pytest.mark.parametrize(
    "engine",
    [
        Engine(max_carry_over=2, oversampling=3.0),
        Engine(max_carry_over=1, oversampling=3.0, slots=2),
        Engine(prompts=2, max_carry_over=1, oversampling=1.5),
        Engine(group_size=2, max_carry_over=1, slots=3),
    ],
)
def test_the_chain_against_every_run_of_the_simulator(small, engine):
    """All lengths of all responses of a run, each run simulated on its own."""
    rollouts = {1: 6, 2: 3}[engine.prompts * engine.group_size]
    p = [float(small.p_old[small.responses.lengths == n].sum()) for n in range(1, 5)]
    expected: list[dict[tuple[int, ...], float]] = [{} for _ in range(rollouts)]
    size = engine.group_size
    for lengths in itertools.product(range(1, 5), repeat=rollouts * engine.prompts * size):
        groups = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        run = simulate(groups, engine.slots, engine.prompts, engine.max_carry_over, engine.oversampling)
        probability = math.prod(p[n - 1] for n in lengths)
        for held, rollout in zip(expected, run, strict=True):
            for number in rollout.groups:
                held[groups[number]] = held.get(groups[number], 0) + probability
    found = lengths_of(every_rollout(engine, rollouts, draw_lengths(small), keeps_plan=True))
    for held, by_chain in zip(expected, found, strict=True):
        assert by_chain == pytest.approx(held, abs=EXACT)


def test_tokens_and_lengths_tell_the_same(small):
    engine = Engine(max_carry_over=2)
    by_tokens = every_rollout(engine, 4, draw_tokens(small, small.theta_old.expand(4, -1, -1)))
    by_lengths = every_rollout(engine, 4, draw_lengths(small), keeps_plan=True)
    for one, other in zip(lengths_of(by_tokens), lengths_of(by_lengths), strict=True):
        assert one == pytest.approx(other, abs=EXACT)
    ages = [{k - each.versions[0] for (each,) in groups} for k, groups in enumerate(by_tokens)]
    assert ages == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]
    assert (Written((0,), (0,), True),) in by_tokens[0]


def test_one_update_is_biased_and_a_run_is_not(small):
    waiting = release(small, Engine(max_carry_over=0, group_size=2), 4)
    assert max(max(biases) for biases in waiting.biases.values()) <= EXACT
    assert waiting.mean_lengths == pytest.approx([small.mean_length] * 4)
    for engine in (Engine(prompts=2, max_carry_over=2), Engine(group_size=2, max_carry_over=1)):
        found = release(small, engine, 10)
        assert max(found.of_the_run.values()) <= EXACT
        assert found.mean_lengths[0] < 0.85 * small.mean_length < small.mean_length < found.mean_lengths[-1]
        for biases in found.biases.values():
            assert biases[0] > 0.2
            assert biases[-1] > 0.1  # the pool is drained
            assert biases[-2] < 0.01 < biases[1]
        shares, lengths = zip(*found.by_age.values(), strict=True)
        assert sum(shares) == pytest.approx(1, abs=EXACT)
        assert list(lengths) == sorted(lengths)
        assert sum(a * b for a, b in found.by_age.values()) == pytest.approx(small.mean_length, abs=EXACT)
    assert set(found.biases) == {CONSTANT, GROUP_MEAN}


def test_a_run_of_several_versions_is_exact_together_at_one_policy(small):
    fixed, moving = (moving_run(small, Engine(), 6, drift) for drift in (0.0, 0.2))
    for run in (fixed, moving):
        assert run.worst_expectation <= EXACT
        assert run.errors["what was recorded"] <= EXACT
    assert min(moving.errors["the last version"], moving.errors["the first version"]) > 0.01
    listed_at_once = release(small, Engine(), 6)
    assert fixed.biases == pytest.approx(listed_at_once.biases[CONSTANT], abs=EXACT)
    assert moving.biases[0] == pytest.approx(fixed.biases[0], abs=EXACT)
    assert moving.biases[4] != pytest.approx(fixed.biases[4], rel=0.1)


def test_members_touch_one_another_only_through_slots(tiny):
    engine = Engine(group_size=2)
    enough, scarce = (moving_run(tiny, replace(engine, slots=s), 4, 0.3) for s in (4, 3))
    assert enough.group_mean <= EXACT
    assert 1e-6 < scarce.group_mean < 1e-2
    assert max(enough.errors["what was recorded"], scarce.errors["what was recorded"]) <= EXACT


def test_learning_from_what_was_complete_first_is_biased(tiny):
    norm = float(policy_gradient(tiny.task, tiny.theta_old).norm())

    def sum_of_biases(bound, rate):
        return float(sum(learn(tiny, Engine(max_carry_over=bound), 3, rate)).norm()) / norm

    assert max(float(each.norm()) for each in learn(tiny, Engine(max_carry_over=0), 3, 1.0)) <= EXACT
    assert sum_of_biases(1, 0.0) <= EXACT
    assert sum_of_biases(1, 1.0) > 0.01
    assert sum_of_biases(1, 0.1) == pytest.approx(sum_of_biases(1, 0.2) / 2, rel=0.05)


def test_drawn_tokens_are_a_distribution(small):
    policies = versions_apart(small.theta_old, 0.5, 2)
    draw = draw_tokens(small, policies)
    for call, so_far in itertools.product(range(2), [(), (1,), (1, 2)]):
        options = draw(call, Written(so_far, (0,) * len(so_far)))
        assert sum(p for p, _ in options) == pytest.approx(1, abs=EXACT)
        assert all(tokens[: len(so_far)] == so_far and len(tokens) > len(so_far) for _, tokens in options)
    by_policy = token_logps(policies[1], small.responses).sum(-1).exp()
    assert sorted(p for p, _ in draw(1, Written())) == pytest.approx(sorted(by_policy.tolist()), abs=EXACT)

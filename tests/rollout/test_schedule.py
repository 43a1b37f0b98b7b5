"""Which rollout, update and micro-batch each step computes, against hand-counted positions."""

import pytest

from tic_grpo_trl.rollout.schedule import Position, RolloutSchedule


def schedule(steps=4, window=2, iterations=1, size=8, group=4, processes=2) -> RolloutSchedule:
    return RolloutSchedule(processes, size, window, steps, group, iterations)


def test_positions_of_two_rollouts_by_hand():
    """Four micro-batches, two updates, the rollout twice over."""
    found = [schedule(iterations=2).at(step) for step in range(10)]
    assert found == [
        Position(rollout=0, update=0, micro_batch=0, first=True, last=False),
        Position(rollout=0, update=0, micro_batch=1, first=False, last=False),
        Position(rollout=0, update=1, micro_batch=2, first=False, last=False),
        Position(rollout=0, update=1, micro_batch=3, first=False, last=False),
        Position(rollout=0, update=2, micro_batch=0, first=False, last=False),
        Position(rollout=0, update=2, micro_batch=1, first=False, last=False),
        Position(rollout=0, update=3, micro_batch=2, first=False, last=False),
        Position(rollout=0, update=3, micro_batch=3, first=False, last=True),
        Position(rollout=1, update=0, micro_batch=0, first=True, last=False),
        Position(rollout=1, update=0, micro_batch=1, first=False, last=False),
    ]


def test_numbers_by_hand():
    counted = schedule(iterations=2)
    assert (counted.rollout_steps, counted.updates) == (8, 4.0)
    assert (counted.responses, counted.prompts) == (64, 16)
    assert (counted.process_responses, counted.update_responses) == (16, 32)
    assert counted.updates_in(num_prompts=40) == 8  # two rollouts; eight prompts are left over


@pytest.mark.parametrize(
    ("steps", "window", "iterations", "old", "on_policy", "inner", "regrouped"),
    [
        (4, 2, 1, True, True, True, 2),
        (2, 2, 1, False, True, False, 2),
        (2, 2, 3, True, True, True, 2),
        (2, 4, 1, False, False, False, 2),  # an update spans two rollouts
        (3, 2, 1, True, False, True, 1),  # some updates do, others do not
        (1, 1, 1, False, True, False, 1),
    ],
)
def test_what_follows_from_the_settings(steps, window, iterations, old, on_policy, inner, regrouped):
    counted = schedule(steps, window, iterations)
    assert counted.has_old_policy is old
    assert counted.starts_on_policy is on_policy
    assert counted.has_inner_steps is inner
    assert counted.regrouped_micro_batches == regrouped


@pytest.mark.parametrize(
    ("steps", "window", "rollout", "end"),
    [(4, 2, 0, 4), (4, 2, 1, 8), (3, 2, 0, 2), (3, 2, 1, 6)],  # an update that also uses the next rollout is made
)
def test_the_updates_that_use_a_rollout_alone_end_at(steps, window, rollout, end):
    assert schedule(steps, window).end_of_rollout(rollout) == end

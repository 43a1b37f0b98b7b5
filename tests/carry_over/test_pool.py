"""Which groups a rollout takes from the pool, by hand and by search."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from searching import searched

from tic_grpo_trl.carry_over.pool import Group, Pool, Response, choose_groups


def group(number, finished=()):
    """A group with a response for each flag, whose tokens are none."""
    return Group(number, f"place {number}", {"prompt": str(number)}, [number], [Response(finished=f) for f in finished])


@pytest.mark.parametrize(
    ("complete", "due", "expected"),
    [
        ("", 0, None),  # two groups are wanted
        ("1", 0, None),
        ("11", 0, [0, 1]),
        ("111", 0, [0, 1]),  # the oldest, not the first that were complete
        ("0101", 0, [1, 3]),  # what is unfinished may be passed over
        ("0101", 1, None),  # unless it is due
        ("1001", 1, [0, 3]),
        ("1001", 2, None),
        ("1101", 2, [0, 1]),
        ("0111", 3, None),  # more are due than a rollout holds: the oldest of them go first
        ("1100", 3, [0, 1]),
        ("1011", 4, None),
    ],
)
def test_choice_by_hand(complete, due, expected):
    assert choose_groups([flag == "1" for flag in complete], due, count=2) == expected


def test_a_group_is_complete_when_its_last_response_is():
    pool = Pool(prompts=1, max_carry_over=1)
    pool.admit(group(0, (True, False)))
    assert pool.chosen() is None
    ((_, response),) = pool.unfinished
    response.finished = True
    assert pool.chosen() == [0]
    assert pool.unfinished == []


def test_a_group_waits_as_long_as_it_may_and_no_longer():
    """One prompt per rollout, S = 2: the group of rollout 0 is passed over twice, and waited for in rollout 2."""
    pool = Pool(prompts=1, max_carry_over=2)
    pool.admit(group(0, (False,)))
    for call in (0, 1):
        pool.admit(group(call + 1, (True,)))
        assert pool.call == call
        assert [each.number for each in pool.release()] == [call + 1]
    pool.admit(group(3, (True,)))
    assert pool.call == 2
    assert pool.chosen() is None
    pool.groups[0].responses[0].finished = True
    assert [each.number for each in pool.release()] == [0]


def test_a_rollout_whose_every_group_is_at_the_bound():
    """S = 1, two prompts per rollout: both of rollout 0 were passed over, so that rollout 1 is exactly these."""
    pool = Pool(prompts=2, max_carry_over=1)
    for number in range(4):
        pool.admit(group(number, (number >= 2,)))
    assert [each.number for each in pool.release()] == [2, 3]
    for number in (4, 5):
        pool.admit(group(number, (True,)))
    for waited_for in (0, 1):
        assert pool.chosen() is None
        pool.groups[waited_for].responses[0].finished = True
    assert [each.number for each in pool.release()] == [0, 1]
    assert [each.number for each in pool.groups] == [4, 5]


def test_tokens_have_the_version_of_the_call_that_wrote_them():
    pool = Pool(prompts=1, max_carry_over=2)
    carried, quick = group(0, (False, False)), group(1, (True,))
    pool.admit(carried)
    pool.admit(quick)
    carried.responses[0].write([3, 4], [-0.5, -0.25])
    quick.responses[0].write([5], [-1.0])
    assert pool.release() == [quick]
    pool.admit(group(2, (True,)))
    assert [each.number for each in pool.release()] == [2]  # in which nothing of group 0 was written
    carried.responses[0].write([6], [-2.0])
    carried.responses[1].write([7], [-3.0])
    for each in carried.responses:
        each.finished = True
    assert pool.release() == [carried]
    assert [each.versions for each in carried.responses] == [[0, 0, 2], [2]]
    assert carried.responses[0].logps == [-0.5, -0.25, -2.0]
    assert quick.responses[0].versions == [0]


def test_state_comes_back_with_examples_that_are_read_again():
    pool = Pool(prompts=1, max_carry_over=2)
    pool.admit(group(0, (True, True)))
    pool.admit(group(1, (False, True)))
    pool.groups[1].responses[0].write([3, 4], [-0.5, -0.25])
    pool.release()
    state = pool.state_dict()
    assert "example" not in state["groups"][0]
    restored = Pool(prompts=1, max_carry_over=2)
    restored.load_state_dict(state, lambda places: [{"prompt": place.removeprefix("place ")} for place in places])
    assert restored == pool
    assert restored.call == 1


def simulate(data, prompts, rollouts, oversampling, late_by_call, responses=2):
    """Run a pool as [`CarryOver`] does, with responses that finish in any order.

    `late_by_call` is S of each call. Returns for each call the numbers of the groups that it released.
    """
    pool, released = Pool(prompts, late_by_call[0]), []
    for call in range(rollouts):
        pool.max_carry_over = late_by_call[call]
        bound = int(min(oversampling, rollouts - call) * prompts)
        while len(pool.groups) < bound:
            pool.admit(group(pool.admitted, (False,) * responses))
        assert pool.call == call
        while pool.chosen() is None:
            waiting = [response for _, response in pool.unfinished]
            assert waiting, "nothing is left to wait for, and no rollout is complete"
            data.draw(st.sampled_from(waiting), label="finishes").finished = True
        complete = [each.number for each in pool.groups if each.complete]
        taken = [each.number for each in pool.release()]
        assert taken == complete[:prompts]  # the oldest of those that are complete
        assert len(taken) == prompts
        assert [each.number for each in pool.groups] == sorted(each.number for each in pool.groups)
        released.append(taken)
    assert pool.groups == []
    assert sorted(number for taken in released for number in taken) == list(
        range(rollouts * prompts)
    )  # each prompt once, none that isn't trained on
    return released


OVERSAMPLING = st.sampled_from([1.0, 1.25, 1.5, 2.0, 3.0])


@searched(150)
@given(st.data(), st.integers(1, 3), st.integers(1, 5), OVERSAMPLING, st.integers(0, 3))
def test_no_group_is_later_than_allowed_or_earlier_than_begun(data, prompts, rollouts, oversampling, late):
    released = simulate(data, prompts, rollouts, oversampling, [late] * rollouts)
    lateness = [call - number // prompts for call, taken in enumerate(released) for number in taken]
    assert max(lateness) <= late
    assert min(lateness) >= -(math.ceil(oversampling) - 1)
    if oversampling == 1:
        assert set(lateness) == {0}


@searched(100)
@given(st.data(), st.integers(1, 3), OVERSAMPLING, st.integers(1, 3), st.integers(0, 2))
def test_a_lower_bound_takes_hold_within_the_prompts_that_were_begun(data, prompts, oversampling, late, lower):
    """S falls in the middle of a run: nothing gets later than the old bound, and soon nothing than the new one."""
    before, rollouts = 3, 9
    lower = min(lower, late)
    released = simulate(data, prompts, rollouts, oversampling, [late] * before + [lower] * (rollouts - before))
    for call, taken in enumerate(released):
        new = call >= before + late + math.ceil(oversampling)
        assert max(call - number // prompts for number in taken) <= (lower if new else late)

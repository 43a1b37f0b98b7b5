"""Test the metrics of carry-over."""

import pytest

from tic_grpo_trl.carry_over.engine import EngineUse
from tic_grpo_trl.carry_over.measures import CarryOverCounts, carry_over_metrics, count_carry_over
from tic_grpo_trl.carry_over.pool import Group, Pool, Response


def write(group, *lengths):
    """Write tokens to the responses of a group; a negative number of them ends the response."""
    for response, length in zip(group.responses, lengths, strict=True):
        response.write([1] * abs(length), [-1.0] * abs(length))
        response.finished |= length < 0


def test_the_metrics_of_a_pool_by_hand():
    """Two prompts a rollout, three in flight; the second group goes on in a second and a third call."""
    pool = Pool(prompts=2, max_carry_over=2)
    groups = [Group(number, number, {}, [1], [Response(), Response()]) for number in range(6)]

    def call(new, use):
        for group in new:
            pool.admit(group)
        version = pool.call

        def metrics():
            released = pool.release()
            return released, carry_over_metrics([count_carry_over(released, pool.groups, use, version)])

        return metrics

    release = call(groups[:3], EngineUse(steps=10, slots=4, sampled=30))
    write(groups[0], -3, -5)
    write(groups[1], 10, -4)
    write(groups[2], -6, -2)
    released, metrics = release()
    assert released == [groups[0], groups[2]]
    assert metrics == {
        "carry_over/mean_age": 0.0,
        "carry_over/max_age": 0.0,
        "carry_over/mean_span": 1.0,
        "carry_over/max_span": 1.0,
        "carry_over/share": 0.0,
        "carry_over/mean_length_age_0": 4.0,  # (3 + 5 + 6 + 2) / 4, while the longest response goes on
        "carry_over/prefilled_again_per_token": 0.0,
        "carry_over/pool_groups": 1.0,
        "carry_over/pool_unfinished": 1.0,
        "carry_over/engine_steps": 10.0,
        "carry_over/slot_occupancy": 0.75,
    }

    release = call(groups[3:5], EngineUse(steps=8, slots=4, sampled=16, prefilled_again=11))
    write(groups[1], 8, 0)
    write(groups[3], -2, -2)
    write(groups[4], -2, -2)
    assert release()[0] == groups[3:5]

    release = call(groups[5:], EngineUse(steps=5, slots=4, sampled=10, prefilled_again=19))
    write(groups[1], -2, 0)
    write(groups[5], -3, -1)
    released, metrics = release()
    assert released == [groups[1], groups[5]]
    # Group 1 was begun two calls ago, one response with tokens of three versions; 20 + 4 and 3 + 1 tokens.
    assert metrics == pytest.approx(
        {
            "carry_over/mean_age": 1.0,
            "carry_over/max_age": 2.0,
            "carry_over/mean_span": 1.5,
            "carry_over/max_span": 3.0,
            "carry_over/share": 0.5,
            "carry_over/mean_length_age_0": 2.0,
            "carry_over/mean_length_age_2": 12.0,
            "carry_over/prefilled_again_per_token": 19 / 28,
            "carry_over/pool_groups": 0.0,
            "carry_over/pool_unfinished": 0.0,
            "carry_over/engine_steps": 5.0,
            "carry_over/slot_occupancy": 0.5,
        }
    )


def test_processes_are_counted_together():
    """Two processes with engines of their own: their slots differ, and the slower one decides when updates begin."""
    first = CarryOverCounts([(0, 1, 10), (2, 2, 40)], 3, 5, EngineUse(10, 8, 60, 30))
    second = CarryOverCounts([(1, 2, 20), (0, 1, 30)], 1, 0, EngineUse(20, 4, 40, 0))
    expected = {"mean_age": 0.75, "max_age": 2, "mean_span": 1.5, "max_span": 2, "share": 0.5}
    expected |= {"mean_length_age_0": 20, "mean_length_age_1": 20, "mean_length_age_2": 40}
    expected |= {"prefilled_again_per_token": 0.3, "pool_groups": 4, "pool_unfinished": 5}
    expected |= {"engine_steps": 20, "slot_occupancy": 100 / 160}
    for counts in ([first, second], [second, first]):
        assert carry_over_metrics(counts) == pytest.approx({f"carry_over/{name}": v for name, v in expected.items()})


def test_what_a_server_does_not_say_is_left_out():
    """The pool is on the main process, and the server counts no steps; the other process has nothing to add."""
    main = CarryOverCounts([(1, 2, 10)], 2, 3, EngineUse(sampled=10, prefilled_again=5))
    other = count_carry_over([], [], EngineUse(), version=4)
    metrics = carry_over_metrics([other, main])
    assert metrics == carry_over_metrics([main])
    assert {"carry_over/engine_steps", "carry_over/slot_occupancy"}.isdisjoint(metrics)
    assert metrics["carry_over/prefilled_again_per_token"] == 0.5
    assert (metrics["carry_over/pool_groups"], metrics["carry_over/pool_unfinished"]) == (2, 3)
    steps = CarryOverCounts([], 0, 0, EngineUse(steps=7, sampled=9))  # the slots are not known
    metrics = carry_over_metrics([main, steps])
    assert metrics["carry_over/engine_steps"] == 7
    assert "carry_over/slot_occupancy" not in metrics
    assert carry_over_metrics([other]) == {"carry_over/pool_groups": 0.0, "carry_over/pool_unfinished": 0.0}
    empty = Group(0, 0, {}, [1], [Response(finished=True)])  # a response without a token has no age
    assert count_carry_over([empty], [], EngineUse(), version=4).responses == [(0, 0, 0)]

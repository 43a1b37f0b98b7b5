"""The rollout that is being trained on saves itself, and is empty before generation."""

from tic_grpo_trl.rollout.current_rollout import CurrentRollout
from tic_grpo_trl.rollout.schedule import RolloutSchedule


POSITION = RolloutSchedule(1, 4, 1, 2, 2).at(3)  # the second micro-batch of the second rollout


def test_an_empty_rollout_has_dropped_nothing():
    assert CurrentRollout().count_dropped(1) == 0


def test_a_restored_rollout_is_the_saved_one():
    rollout, restored = CurrentRollout(), CurrentRollout()
    rollout.start([{"a": 1}, None], [3, 0])
    rollout.skip_until = 7
    restored.load_state_dict(rollout.state_dict())
    assert restored == rollout
    assert restored.at(POSITION) is None
    assert [restored.count_dropped(index) for index in (0, 1)] == [3, 0]


def test_reset_forgets_the_rollout():
    rollout = CurrentRollout()
    rollout.start([{}], [1])
    rollout.skip_until = 2
    rollout.reset()
    assert rollout == CurrentRollout()

"""Stale rollouts: sampled with the weights of some rollouts ago, and recorded with their log-probabilities."""

import copy

import pytest
import torch
from conftest import logps, make_trainer, tiny_model

from research.study.lagged_engine import LaggedEngine
from tic_grpo_trl.metrics.run_summary import series


pytestmark = pytest.mark.usefixtures("cheap_garbage_collection")

SETTINGS = {"behaviour_policy": "sampler", "steps_per_generation": 2, "max_steps": 10, "eval_strategy": "steps"}


def stale_training(folder, lag):
    """Train for five rollouts of two updates: the trainer, and weights before and responses of each rollout."""
    trainer = make_trainer(folder, **SETTINGS, eval_steps=4)
    trainer.recorder = LaggedEngine(trainer, lag)
    weights, rollouts, evaluations = [], [], []
    generate = trainer._generate_and_score_completions

    def observed(inputs):
        before = copy.deepcopy(trainer.model.state_dict())
        rollout = generate(inputs)
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        if trainer.model.training:
            weights.append(before)
            rollouts.append(rollout)
        else:
            evaluations.append((before, rollout))
        return rollout

    trainer._generate_and_score_completions = observed
    trainer.train()
    assert len(rollouts) == 5
    return trainer, weights, rollouts, evaluations


def largest_error(weights, rollout):
    """Between the recorded log-probabilities and those of a forward pass with these weights."""
    model = tiny_model()
    model.load_state_dict(weights)
    with torch.no_grad():
        difference = logps(model, rollout) - rollout["sampling_per_token_logps"]
    return difference[rollout["completion_mask"].bool()].abs().max().item()


@pytest.mark.parametrize("lag", [1, 2])
def test_rollouts_are_sampled_by_the_weights_of_lag_rollouts_ago(tmp_path, lag):
    _, weights, rollouts, evaluations = stale_training(tmp_path, lag)
    for number, rollout in enumerate(rollouts):
        assert largest_error(weights[max(0, number - lag)], rollout) < 1e-5
        for other in {number, number - 1, 0} - {max(0, number - lag), -1}:
            assert largest_error(weights[other], rollout) > 0.01
    for current, evaluation in evaluations:
        assert largest_error(current, evaluation) < 1e-5


def test_the_recorded_log_probabilities_are_the_denominator(tmp_path):
    trainer, _, rollouts, _ = stale_training(tmp_path, lag=2)
    spread = series(trainer.state.log_history, "trajectory_ratio/inner_1/log_std")[1]
    assert len(spread) == len(rollouts)
    assert spread[0] < 1e-5  # the start weights' own
    assert min(spread[1:]) > 0.01  # stale before the rollout's first update
    assert all("sampling_per_token_logps" in rollout for rollout in rollouts)


def test_a_lag_of_zero_is_the_plain_trainer_bit_for_bit(tmp_path):
    lagged, *_ = stale_training(tmp_path / "lagged", lag=0)
    plain = make_trainer(tmp_path / "plain", **SETTINGS, eval_steps=4)
    plain.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, lagged.model.state_dict()[name])

"""The factor of one update's learning rate, on torch's own optimizer and scheduler."""

import pytest
import torch

from tic_grpo_trl.loss.learning_rate import LearningRateFactor


@pytest.fixture
def optimizer():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 0.5}]
    return torch.optim.SGD(groups, lr=0.1)


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_every_group_is_scaled_for_one_step(optimizer):
    factor = LearningRateFactor(lambda: optimizer)
    factor.apply(0.5)
    assert rates(optimizer) == [0.05, 0.25]
    factor.on_optimizer_step(None, None, None)
    assert rates(optimizer) == [0.1, 0.5]


def test_a_second_factor_replaces_the_first(optimizer):
    factor = LearningRateFactor(lambda: optimizer)
    factor.apply(0.5)
    factor.apply(0.8)
    assert rates(optimizer) == pytest.approx([0.08, 0.4])
    factor.on_optimizer_step(None, None, None)
    assert rates(optimizer) == [0.1, 0.5]


def test_a_scheduler_that_has_stepped_already_is_left_alone(optimizer):
    """DeepSpeed's engine steps the scheduler of its own configuration within the backward pass."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    factor = LearningRateFactor(lambda: optimizer)
    factor.apply(0.5)
    optimizer.step()
    scheduler.step()
    factor.on_optimizer_step(None, None, None)
    assert rates(optimizer) == pytest.approx([0.09, 0.45])


def test_a_loss_without_an_optimizer_has_no_rate_to_scale():
    LearningRateFactor(lambda: None).apply(0.5)

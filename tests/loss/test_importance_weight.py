"""TRL's options are changed for the time of one loss alone, and restored when it fails."""

import math

import pytest
import torch
from conftest import make_trainer

from tic_grpo_trl.loss.importance_weight import overridden


class Target:
    value = 1

    def method(self):
        return "the class's"


def test_attributes_of_object_and_class_are_restored():
    target = Target()
    target.own = 2
    with overridden(target, own=3, value=4, method=lambda: "another"):
        assert (target.own, target.value, target.method()) == (3, 4, "another")
    assert (target.own, target.value, target.method()) == (2, 1, "the class's")
    assert vars(target) == {"own": 2}


def test_attributes_are_restored_after_an_error():
    target = Target()
    with pytest.raises(ZeroDivisionError), overridden(target, value=4):
        1 / 0  # noqa: B018
    assert target.value == 1


def test_trl_sees_its_own_level_and_no_bounds_only_within_a_loss(tmp_path):
    trainer = make_trainer(tmp_path, algorithm="tic_grpo_released")
    weight = trainer.weighted_loss.weight
    before = trainer.importance_sampling_level, trainer.epsilon_high, trainer.args.delta
    loss_pass = weight.loss_pass({"advantages": torch.ones(2)}, trainer.schedule.at(0))
    loss_pass.inputs["anchored"] = True
    with weight.trl_settings(loss_pass):
        assert trainer.importance_sampling_level == "sequence"
        assert (trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta) == (1.0, math.inf, None)
    assert (trainer.importance_sampling_level, trainer.epsilon_high, trainer.args.delta) == before
    per_token = weight.loss_pass({"advantages": torch.ones(2, 3)}, trainer.schedule.at(0))
    assert per_token.level == "token"


def test_the_product_of_a_prefix_is_a_weight_of_each_token(tmp_path):
    trainer = make_trainer(tmp_path, algorithm="ctpo")
    loss_pass = trainer.weighted_loss.weight.loss_pass({"advantages": torch.ones(2)}, trainer.schedule.at(0))
    assert loss_pass.level == "token"


def test_a_loss_that_reads_no_old_log_probabilities_is_refused(tmp_path):
    """The control: TRL's loss must have made its forward pass through the trainer."""
    trainer = make_trainer(tmp_path)
    weight = trainer.weighted_loss.weight
    loss_pass = weight.loss_pass({"advantages": torch.ones(2)}, trainer.schedule.at(0))
    with pytest.raises(RuntimeError, match="computes its loss in another way"):
        with_settings(weight, loss_pass)


def with_settings(weight, loss_pass):
    with weight.trl_settings(loss_pass):
        pass

"""What a user's own subclass may do with the inputs of the loss."""

import torch
from conftest import make_trainer

from tic_grpo_trl import TICGRPOTrainer


RUN = {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2, "max_steps": 4}


class PassesACopy(TICGRPOTrainer):
    """TRL allows subclasses to change what the loss reads."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] * 1.0})


def test_a_copy_of_the_inputs_trains_as_the_inputs_themselves(tmp_path):
    """The second iteration over a rollout needs the log-probabilities of the first, whatever the loss was given."""
    trainers = [make_trainer(tmp_path / name, **RUN) for name in ("plain", "copy")]
    trainers[1].__class__ = PassesACopy
    for trainer in trainers:
        torch.manual_seed(0)
        trainer.train()
    plain, copied = (trainer.model.parameters() for trainer in trainers)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(plain, copied, strict=True))
    logs = [entry for entry in trainers[1].state.log_history if "loss" in entry]
    assert logs[1]["trajectory_ratio/inner_2/log_std"] > 0

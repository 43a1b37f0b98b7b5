"""When a rollout is generated, and which micro-batch of which update each training step computes."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Position:
    """Where one micro-batch stands in the run."""

    rollout: int
    update: int  # among those made on the rollout: k − 1 in the papers' notation
    micro_batch: int  # its index in the rollout
    first: bool  # it is the first of its rollout, for which the rollout is generated
    last: bool  # no later micro-batch uses the rollout


@dataclass(frozen=True)
class RolloutSchedule:
    """How many responses each rollout, update and micro-batch has; names are those of `TICGRPOConfig`."""

    processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_generations: int
    num_iterations: int = 1

    @classmethod
    def of(cls, args: Any, processes: int) -> "RolloutSchedule":
        """Build the schedule that a configuration, or any object with its fields, describes."""
        steps = args.steps_per_generation
        if steps is None and args.generation_batch_size is not None:
            steps = args.generation_batch_size // (args.per_device_train_batch_size * processes)
        return cls(
            processes,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            steps or args.gradient_accumulation_steps,
            args.num_generations,
            args.num_iterations,
        )

    def at(self, step: int) -> Position:
        """Return the position of the micro-batch before which a process has computed `step` others."""
        rollout, within = divmod(step, self.rollout_steps)
        return Position(
            rollout,
            update=within // self.gradient_accumulation_steps,
            micro_batch=within % self.steps_per_generation,
            first=within == 0,
            last=within == self.rollout_steps - 1,
        )

    def end_of_rollout(self, rollout: int) -> int:
        """Return the step that begins the first update after the last one that uses this rollout alone."""
        end = (rollout + 1) * self.rollout_steps
        return end - end % self.gradient_accumulation_steps

    @property
    def rollout_steps(self) -> int:
        """Micro-batches that one process computes from one generation to the next."""
        return self.steps_per_generation * self.num_iterations

    @property
    def responses(self) -> int:
        """Responses of a rollout."""
        return self.processes * self.per_device_train_batch_size * self.steps_per_generation

    @property
    def prompts(self) -> int:
        """Prompts of a rollout."""
        return self.responses // self.num_generations

    @property
    def process_responses(self) -> int:
        """Responses of an update on one process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def update_responses(self) -> int:
        """Responses of an update."""
        return self.processes * self.process_responses

    @property
    def updates(self) -> float:
        """Optimizer steps per rollout: K, `num_iterations` times over."""
        return self.rollout_steps / self.gradient_accumulation_steps

    @property
    def has_inner_steps(self) -> bool:
        """Whether a rollout serves more than one update."""
        return self.rollout_steps > self.gradient_accumulation_steps

    @property
    def has_old_policy(self) -> bool:
        """Whether some update trains on a rollout of earlier weights: TRL's condition for scoring a rollout."""
        return self.gradient_accumulation_steps % self.rollout_steps != 0

    @property
    def starts_on_policy(self) -> bool:
        """Whether the first micro-batch of every rollout begins an update."""
        return self.rollout_steps % self.gradient_accumulation_steps == 0

    @property
    def regrouped_micro_batches(self) -> int:
        """Number of consecutive micro-batches that belong to one rollout and one update, so may trade responses."""
        window, steps = self.gradient_accumulation_steps, self.steps_per_generation
        return min(window, steps) if steps % window == 0 or window % steps == 0 else 1

    def updates_in(self, num_prompts: int) -> int:
        """Return the optimizer steps of one epoch; prompts that don't fill a rollout are left out."""
        return math.ceil(num_prompts // self.prompts * self.updates)

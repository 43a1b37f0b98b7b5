"""How many responses go where, and what to change where they do not come out even."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RolloutSchedule:
    """How many responses go where; the names are those of `TICGRPOConfig`.

    Attributes:
        processes: number of training processes.
        per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation, num_generations, num_iterations:
            the settings.
    """

    processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_generations: int
    num_iterations: int = 1

    @classmethod
    def of(cls, args: Any, processes: int) -> "RolloutSchedule":
        """Build the schedule that a configuration describes.

        Args:
            args: a `TICGRPOConfig`, or settings of the same names.
            processes: number of training processes.
        """
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

    @property
    def responses(self) -> int:
        """Responses of a rollout."""
        return self.processes * self.per_device_train_batch_size * self.steps_per_generation

    @property
    def prompts(self) -> int:
        """Prompts of a rollout."""
        return self.responses // self.num_generations

    @property
    def update_responses(self) -> int:
        """Responses of an update."""
        return self.processes * self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def updates(self) -> float:
        """Optimizer steps per rollout: K, `num_iterations` times over."""
        return self.steps_per_generation * self.num_iterations / self.gradient_accumulation_steps

    def updates_in(self, num_prompts: int) -> int:
        """Optimizer steps of one epoch over `num_prompts`; prompts that fill no rollout are left out."""
        return math.ceil(num_prompts // self.prompts * self.updates)

"""A factor of the learning rate for one update."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class LearningRateFactor(TrainerCallback):
    """
    Scale the learning rate of single updates.

    The rate is scaled before the update's backward pass, because DeepSpeed steps within it, and restored after the
    optimizer's step, so that the scheduler, the log and checkpoints have the rate of the schedule.
    """

    def __init__(self, optimizer: Callable[[], Any]):
        self._optimizer = optimizer
        self._scaled: list[tuple[dict[str, Any], Any, Any]] = []  # parameter groups, their rate and the scaled one

    def apply(self, factor: float):
        """Multiply the learning rate of every parameter group until the end of the update."""
        self._restore()
        optimizer = self._optimizer()
        for group in optimizer.param_groups if optimizer is not None else []:  # a loss alone needs no optimizer
            rate = group["lr"]
            group["lr"] = rate * factor
            self._scaled.append((group, rate, group["lr"]))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._restore()

    def _restore(self):
        for group, rate, scaled in self._scaled:
            if group["lr"] == scaled:  # else DeepSpeed's engine has already set the rate of the next update
                group["lr"] = rate
        self._scaled.clear()

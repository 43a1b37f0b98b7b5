"""Drops groups whose rewards are not numbers."""

import math
from typing import Any

import torch
from accelerate import Accelerator

from ..rewards.failures import _texts
from .non_finite import groups_without_rewards
from .reports import NumberReports


class RewardGuard:
    """
    Make the advantages of groups with a bad reward NaN, so that the update guard drops their responses.

    Args:
        accelerator: tells the process.
        reports: of the bad numbers.
        names: of reward functions and models.
        weights: (F,) of functions and models.
        models: columns of reward models. A bad reward of a function ends the run elsewhere.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        reports: NumberReports,
        names: list[str],
        weights: torch.Tensor,
        models: list[int],
    ):
        self.accelerator, self.reports, self.names = accelerator, reports, names
        self.weights, self.models = weights, models
        self._unrewarded: torch.Tensor | None = None  # (B,) bool: responses of the newest rollout

    def check(self, rewards: torch.Tensor, num_generations: int, prompts: list, completions: list) -> torch.Tensor:
        """Make the rewards of groups with a bad reward unknown.

        Args:
            rewards: (processes · B, F) of all processes, by function and model.
            num_generations: responses per prompt.
            prompts, completions: of this process.

        Returns:
            The rewards, NaN for all responses of such groups, which TRL then leaves out of every mean and deviation.
        """
        self._unrewarded = None
        functions = [column for column in range(len(self.names)) if column not in self.models]
        if rewards[:, functions].isinf().any():
            return rewards
        groups, own = groups_without_rewards(rewards, self.weights, self.models, num_generations)
        if not groups.any():
            return rewards
        first = self.accelerator.process_index * len(prompts)
        self._unrewarded = groups[first : first + len(prompts)]
        for index in own[first : first + len(prompts)].nonzero().flatten().tolist()[:1]:
            values = zip(self.names, rewards[first + index].tolist(), strict=True)
            numbers = ", ".join(f"reward of {name!r} {value:g}" for name, value in values)
            self.reports.add(f"{numbers}: its group is dropped.\n{_texts(index, prompts, completions)}")
        return rewards.masked_fill(groups.unsqueeze(1), math.nan)

    def mark(self, rollout: dict[str, Any]):
        """Make the advantages of responses with unknown reward NaN, where TRL made them 0."""
        if self._unrewarded is not None:
            rollout["advantages"] = rollout["advantages"].clone()
            rollout["advantages"][self._unrewarded] = math.nan

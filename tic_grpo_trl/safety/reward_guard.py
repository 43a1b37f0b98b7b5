"""Detection of groups whose rewards are not numbers."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..rewards.failures import describe_sample
from .non_finite import groups_without_rewards
from .reports import NumberReports


@dataclass
class RewardGuard:
    """Make the advantages of groups with a bad reward NaN, so that the update guard drops their responses."""

    accelerator: Accelerator
    reports: NumberReports
    names: list[str]  # (F,) of reward functions and models
    weights: torch.Tensor  # (F,)
    models: list[int]  # the columns of reward models
    has_reward: torch.Tensor | None = field(default=None, init=False)  # (B,) bool, of the newest responses
    _unrewarded: torch.Tensor | None = field(default=None, init=False)  # (B,) bool: those of groups with a bad reward

    @classmethod
    def of(cls, trainer: Any, reports: NumberReports) -> "RewardGuard":
        """Build the guard of a trainer's reward functions and models."""
        models = [column for column, function in enumerate(trainer.reward_funcs) if isinstance(function, nn.Module)]
        return cls(trainer.accelerator, reports, trainer.reward_func_names, trainer.reward_weights, models)

    def check(self, rewards: torch.Tensor, num_generations: int, prompts: list, completions: list) -> torch.Tensor:
        """Replace all rewards of groups with a bad one by NaN; TRL leaves those out of every mean and deviation.

        The rewards, (processes · B, F), are those of all processes, prompts and completions those of this one. Also
        note in `has_reward` for which of them some function returned a reward.
        """
        first = self.accelerator.process_index * len(prompts)
        self.has_reward = ~rewards[first : first + len(prompts)].isnan().all(dim=1)
        self._unrewarded = None
        functions = [column for column in range(len(self.names)) if column not in self.models]
        if rewards[:, functions].isinf().any():  # `raise_failures` ends the run
            return rewards
        groups, own = groups_without_rewards(rewards, self.weights, self.models, num_generations)
        if not groups.any():
            return rewards
        self._unrewarded = groups[first : first + len(prompts)]
        for index in own[first : first + len(prompts)].nonzero().flatten().tolist()[:1]:
            values = zip(self.names, rewards[first + index].tolist(), strict=True)
            numbers = ", ".join(f"reward of {name!r} {value:g}" for name, value in values)
            self.reports.add(f"{numbers}: its group is dropped.\n{describe_sample(index, prompts, completions)}")
        return rewards.masked_fill(groups.unsqueeze(1), math.nan)

    def mark(self, rollout: dict[str, Any]):
        """Make the advantages of responses with unknown rewards NaN; TRL has made them 0."""
        if self._unrewarded is not None:
            rollout["advantages"] = rollout["advantages"].clone()
            rollout["advantages"][self._unrewarded] = math.nan

"""Verifiable rewards in TRL's reward-function signature, and what happens when a reward function fails.

Importing this starts nothing: the processes that compare answers or run programs start at a function's first call.
"""

from .answers import answer_format_reward
from .failures import RewardError, checked
from .mathematics import MathReward, math_reward
from .programs import CodeReward, code_reward


__all__ = [
    "CodeReward",
    "MathReward",
    "RewardError",
    "answer_format_reward",
    "checked",
    "code_reward",
    "math_reward",
]

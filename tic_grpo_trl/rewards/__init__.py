"""Verifiable rewards in TRL's reward-function signature, and clear errors for reward functions that fail.

Importing this package starts no processes. They start at a reward function's first call.
"""

from .answers import answer_format_reward
from .failures import RewardError, checked
from .mathematics import MathReward, math_reward
from .programs import CodeReward, code_reward


__all__ = ["CodeReward", "MathReward", "RewardError", "answer_format_reward", "checked", "code_reward", "math_reward"]

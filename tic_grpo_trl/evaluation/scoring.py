"""Which reward function scores a set, and its answer to one batch."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from ..rewards import code_reward, math_reward
from ..scripts.imports import import_function
from ..starter import exact_match_reward


SUMS = ("starter", "few_shot_sums")  # where an unevaluated sum would be right for computer algebra


def choose_reward(problems: Dataset, reward_func: str | None = None) -> Callable:
    """The reward function of a set: `reward_func`, or what its solutions ask for.

    Solutions that are tests (`load_problems` of LiveCodeBench) are run in the package's sandbox, sums of one-digit
    numbers have to match exactly, everything else is mathematics.
    """
    if reward_func is not None:
        return import_function(reward_func, "--reward_func")
    if is_tests(problems[0]["solution"]):
        return code_reward
    return exact_match_reward if problems[0].get("source") in SUMS else math_reward


def is_tests(solution: str) -> bool:
    """Whether a solution is the JSON of a program's tests."""
    try:
        return solution.startswith("{") and "tests" in json.loads(solution)
    except ValueError:
        return False


def score(
    reward: Callable, prompts: Sequence[list[dict[str, str]]], texts: Sequence[str], columns: dict[str, list]
) -> tuple[list[float | None], dict[str, list]]:
    """Rewards of a batch, as the trainer would ask for them.

    Args:
        reward: in TRL's reward-function signature.
        prompts: messages, length B.
        texts: the answers, length B.
        columns: the data set's other columns, each of length B.

    Returns:
        Rewards, length B, and what the function logged per sample, such as the extracted answer.
    """
    logged: dict[str, list] = {}
    completions: Any = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = reward(
        prompts=list(prompts),
        completions=completions,
        **columns,
        log_extra=lambda name, values: logged.__setitem__(name, list(values)),
        log_metric=lambda name, value: None,
    )
    return [None if value is None else float(value) for value in rewards], logged
